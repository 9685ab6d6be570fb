"""Measure how compression changes a model's predictions, and how fast attention and encoding are."""
