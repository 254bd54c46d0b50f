"""A stream's watch (for a detector that moves) between the results and their publication."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from grainwatch.messages import AnyMessage, AnyResult
from pipelines.frame import Watch

log = logging.getLogger(__name__)


class Watching:
    """Shows each result to the watch, says in the log when it raises an alarm, survives its defects."""

    def __init__(self, stream: str, watch: Watch | None) -> None:
        self._stream = stream
        self._watch = watch
        self._alarm = False

    @property
    def text(self) -> str:
        """What the watch knows, in words; "" without one."""
        return self._watch.text if self._watch is not None else ""

    def followed_by(self, other: Watching) -> Watching:
        """Return which of two goes on under another configuration: this one where both watch for the same."""
        same = self._watch is not None and other._watch is not None and self._watch.same_as(other._watch)
        return self if same else other

    def take(self, result: AnyResult) -> tuple[AnyResult, Sequence[AnyMessage]]:
        """Return the result as it is to be published, and what is to be published after it."""
        watch = self._watch
        if watch is None:
            return result, ()
        try:
            result, messages = watch.take(result)
        except Exception:
            log.exception("%s: the watch over the results is given up", self._stream)
            self._watch = None
            return result, ()
        if watch.alarm and not self._alarm:
            log.warning("%s: %s", self._stream, watch.text)
        self._alarm = watch.alarm
        return result, messages
