"""A run on many machines: Ray workers and their leases, and processes that hold one model together."""
