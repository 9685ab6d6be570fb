"""A run from its first document to its last: the loop, and the process that it runs in."""
