"""Measurements: what compression does to a model's predictions, and how fast attention and encoding are."""
