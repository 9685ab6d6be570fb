"""A run on many machines: who gets which documents, and what becomes of those whose worker is lost."""
