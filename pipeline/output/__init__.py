"""The output of a run: rows, the result file, and the run file."""
