"""Training of the networks that name Laue spots."""
