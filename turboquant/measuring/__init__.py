"""What compression does to a model, and how fast it is, as figures and pictures. Nothing that computes imports this."""
