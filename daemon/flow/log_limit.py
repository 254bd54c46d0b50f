"""Warnings about frames, so few that a detector gone mad cannot fill the disk with them."""

from __future__ import annotations

import logging
import time
from typing import Final

MOST: Final = 50
PERIOD_S: Final = 10.0


class LogLimit:
    """Passes the first `MOST` warnings of each `PERIOD_S` seconds on to a logger and counts the others.

    Every frame's own reason stands in the ledger all the same.
    """

    def __init__(self, log: logging.Logger, name: str) -> None:
        self._log = log
        self._name = name
        self._begun = 0.0
        self._said = 0

    def warning(self, message: str, *arguments: object) -> None:
        """Warn, unless that was done too often."""
        now = time.monotonic()
        if now - self._begun >= PERIOD_S:
            if self._said > MOST:
                self._log.warning("%s: %d more such lines: see the ledger", self._name, self._said - MOST)
            self._begun, self._said = now, 0
        self._said += 1
        if self._said <= MOST:
            self._log.warning(message, *arguments)
