"""Where this package meets mlx-lm: the patch of its attention, and its model families."""
