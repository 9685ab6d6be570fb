"""A group of documents in, its rows out: prefilled or restored, asked, answered. It does not know in which process."""
