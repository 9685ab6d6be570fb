"""Attention over compressed keys and values: the reference, NumPy's, a GPU's, and which of them runs where."""
