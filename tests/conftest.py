"""Shared fixtures: where the truth lies, and honest skips."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def data_dir() -> Path | None:
    """Return the folder of third-party truth: $GRAINWATCH_DATA, ../shared/data or .data (`make data`)."""
    candidates = [os.environ.get("GRAINWATCH_DATA"), ROOT.parent / "shared" / "data", ROOT / ".data"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "laue").is_dir():
            return Path(candidate)
    return None


@pytest.fixture(scope="session")
def truth_dir() -> Path:
    """The ``laue`` folder of the truth; the test is skipped where it is absent."""
    found = data_dir()
    if found is None:
        pytest.skip("third-party Laue frames are absent: run `make data` or set GRAINWATCH_DATA")
    return found / "laue"
