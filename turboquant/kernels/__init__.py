"""Kernels for CUDA and Metal from one text, how they are launched, and encoding on a GPU."""
