"""Training of the models that the pipelines run: simulators, networks, evaluation, export.

Torch lives here alone; the daemon starts training as another process.
"""
