"""Training of the models that describe micrographs."""
