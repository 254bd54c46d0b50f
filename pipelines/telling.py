"""What commands that read many files tell of each: in which picture it is, and why it failed."""

from __future__ import annotations

import re
from pathlib import Path


def failure(path: str, why: str) -> str:
    """Return the line upon a file, or one of its images, that failed.

    >>> failure("a.tif", "a.tif: cannot be read: No such file or directory")
    'a.tif: failed: cannot be read: No such file or directory'
    >>> failure("a.h5", "a.h5::/entry/data#3: is too large")
    'a.h5::/entry/data#3: failed: is too large'
    """
    # Errors of files begin with its name, because most are read without a line about the file around them.
    named = re.match(rf"{re.escape(path)}(?:::[^:]*)?(?:#\d+)?(?=: )", why)
    label = named[0] if named else path
    return f"{label}: failed: {why[len(label) + 2 :] if named else why}"


def picture_path(plot: Path, number: int, *, only: bool) -> Path:
    """Return where the picture of an image goes: `plot` itself of the only one, else with a number from 1."""
    return plot if only else plot.with_stem(f"{plot.stem}-{number:04d}")
