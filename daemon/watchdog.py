"""Whether the daemon moves: which of its parts stand still that should not.

A part shows a mark that changes when it gets on (a counter). Nothing here takes a lock, so that a
part that hangs with one in its hand cannot stop the one who looks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """What can hang, at one moment.

    Attributes
    ----------
    name : str
        For an operator: "the receive thread of laue".
    mark : object
        Differs from the last one if the part has moved.
    waits : bool
        It may stand still: it has nothing to do, or waits for another part that is watched.
    patience_s : float
        How long it may stand still beyond what every part may.
    """

    name: str
    mark: Any
    waits: bool = False
    patience_s: float = 0.0


class Watchdog:
    """Remembers when each part moved last.

    Parameters
    ----------
    limit_s : float
        How long a part that has something to do may stand still.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._seen: dict[str, tuple[Any, float]] = {}

    def hung(self, parts: Iterable[Part], now: float) -> dict[str, float]:
        """Look at the parts; return those that hang, and for how long each has stood still, seconds.

        Parameters
        ----------
        parts : iterable of Part
        now : float
            Monotonic seconds.
        """
        seen: dict[str, tuple[Any, float]] = {}
        found: dict[str, float] = {}
        for part in parts:
            mark, since = self._seen.get(part.name, (part.mark, now))
            if part.waits or mark != part.mark:
                since = now
            seen[part.name] = (part.mark, since)
            if now - since > self.limit_s + part.patience_s:
                found[part.name] = now - since
        self._seen = seen
        return found
