"""The job: what may be said of one, how its file is read, and what is wrong with it. It knows no tensors, no rows."""
