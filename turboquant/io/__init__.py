"""Write segments and prompt caches to files atomically, and verify them when they are read."""
