"""Other programs' words in messages of our own."""

from __future__ import annotations

_LONGEST = 300


def one_line(error: Exception | str) -> str:
    """Return what an error says, without line breaks, and cut where it has no end."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
