"""Documents and queries: read, rendered, tokenised and put into groups. It runs no model and writes nothing."""
