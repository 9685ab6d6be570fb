"""Rows and the files they end in. It does not know how an answer comes about."""
