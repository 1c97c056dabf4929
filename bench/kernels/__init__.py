"""`python -m bench kernels`: paged attention and KV fill-in by themselves, each implementation in turn."""

from bench.kernels.command import main as main
