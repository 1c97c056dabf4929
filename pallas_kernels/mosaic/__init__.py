"""Kernels for NVIDIA's Hopper GPUs (Pallas, Mosaic GPU): `paged_attention` and `kv_fill`, a module each.

They lie in a package of their own because `pallas_kernels.paged_attention` is the function. Nothing here is imported
before a program uses it: Mosaic's own modules take a quarter of a second to load.
"""
