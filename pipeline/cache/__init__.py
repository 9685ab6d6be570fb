"""The store of prefixes on disk: what is in it, what is needed, what may go. A segment's inside is turboquant's."""
