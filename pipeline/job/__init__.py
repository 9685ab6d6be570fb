"""The job: its keys, defaults and checks, how its file is read, and the messages about mistakes in it."""
