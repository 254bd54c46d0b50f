"""Training of the models that the pipelines run: simulators, networks, evaluation, export (torch lives here alone)."""
