"""Log lines: with times for a terminal or a file, with priorities for systemd's journal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Final

#: How syslog, and the journal after it, calls the levels; sd-daemon(3).
PRIORITIES: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


class JournalFormatter(logging.Formatter):
    """Puts ``<N>``, the priority, before each line; the journal notes times and processes itself."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record, each line of it (a traceback has many) with its priority."""
        level = max((known for known in PRIORITIES if known <= record.levelno), default=logging.DEBUG)
        mark = f"<{PRIORITIES[level]}>"
        return "\n".join(mark + line for line in super().format(record).splitlines())


def configure_logging(who: str = "") -> None:
    """Send log lines to standard error.

    Parameters
    ----------
    who : str
        Which process it is, where several share a standard error ("worker 4711").
    """
    handler = logging.StreamHandler(sys.stderr)
    name = f"{who}: " if who else ""
    if goes_to_journal(os.environ):
        handler.setFormatter(JournalFormatter(f"{name}%(message)s"))
    else:
        who = f" {who}" if who else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)


def goes_to_journal(environment: Mapping[str, str]) -> bool:
    """Return whether standard error is the journal: $JOURNAL_STREAM names its device and inode.

    The name alone says little: whoever redirects standard error leaves the variable in the
    environment.
    """
    named = environment.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return named == f"{status.st_dev}:{status.st_ino}"
