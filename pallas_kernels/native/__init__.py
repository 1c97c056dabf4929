"""Kernels for CPUs, in C: products that read weights at the memory's pace, and attention over pages as they lie.

XLA:CPU multiplies a matrix by few columns at a fraction of either limit of the machine, and visits pages for all rows
of a batch as long as the longest. These kernels are calls of XLA's foreign function interface on its own threads. They
are compiled by the system's C compiler for the processor at hand, once, and kept beside the compiled programs; where
there is no compiler, XLA does the work.
"""
