"""Files of any kind, here or at a URL: found, read and written whole. It does not know what a job is."""
