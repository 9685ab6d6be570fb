"""Documents and queries: read, rendered, tokenised and put into groups that share a batch."""
