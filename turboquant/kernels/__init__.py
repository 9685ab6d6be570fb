"""Attention and encoding, fast: NumPy on a CPU, kernels on a GPU. What a prefix is kept for it does not know."""
