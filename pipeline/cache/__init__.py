"""The store of prefixes on disk: its entries, the pins of unfinished jobs, eviction and maintenance."""
