"""The machine: which BLAS MLX uses, threads, the default device."""
