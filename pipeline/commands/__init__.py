"""What each command does, and how it is said at the command line."""
