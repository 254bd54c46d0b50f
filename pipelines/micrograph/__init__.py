"""Micrographs: what an SEM file says of itself, preparation, morphology, drift."""
