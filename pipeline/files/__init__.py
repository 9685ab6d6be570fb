"""Files of any format, on this machine or at a URL: found, read, and written as a whole."""
