"""One run of a job: from a document and its queries to committed rows, and the process that runs the model."""
