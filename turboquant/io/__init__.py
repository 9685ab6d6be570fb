"""Files: segments and prompt caches on disk, written atomically and verified when they are read."""
