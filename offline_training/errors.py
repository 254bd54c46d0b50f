"""What can go wrong in a training, in words for the person who started it."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot go on, and why."""


class DivergedError(TrainingError):
    """The loss is no number."""


class Interrupted(TrainingError):
    """Somebody stopped the training; what was learned is kept."""


class StudyError(TrainingError):
    """A file that is no study, or that of another run."""
