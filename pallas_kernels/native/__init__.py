"""Kernels for CPUs, in C: products that read weights at the speed of memory, and attention that reads pages in place.

XLA:CPU multiplies a matrix by few columns at a fraction of either limit of the machine, and visits as many pages for
each row of a batch as the longest row has. These kernels are calls of XLA's foreign function interface. The system's C
compiler compiles them for the processor of the machine, once, and they are kept beside the compiled programs; where
there is no compiler, XLA does the work.
"""
