"""The work of each command of ``pipeline``. The arguments and most of the printed text are in cli.py."""
