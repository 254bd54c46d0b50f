"""Who asks for a reload waits here for its end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias

from grainwatch.config import ConfigError

#: What a reload answers: which keys changed, the hash that results carry from now on, how long it took.
Reloaded: TypeAlias = dict[str, Any]


class ReloadRefused(ConfigError):
    """The file cannot be taken over; the daemon goes on as before."""


class Reloader:
    """A thread that reloads when asked; what is asked meanwhile is one more reload.

    Parameters
    ----------
    reload : callable
        Does it and says what changed; raises ConfigError when it refuses.
    """

    def __init__(self, reload: Callable[[], Reloaded]) -> None:
        self._reload = reload
        # It may be filled from a signal handler, which a queue.Queue may not.
        self._asked: queue.SimpleQueue[Future[Reloaded] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reload", daemon=True)

    def start(self) -> None:
        """Start the thread; what was asked before is done now."""
        self._thread.start()

    def ask(self) -> Future[Reloaded]:
        """Ask for a reload. Safe in a signal handler."""
        answer: Future[Reloaded] = Future()
        self._asked.put(answer)
        return answer

    def stop(self, timeout: float) -> None:
        """Take no more; the reload under way has to be broken off by the one who does it."""
        self._asked.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            asked = [self._asked.get()]
            while not self._asked.empty():
                asked.append(self._asked.get())
            answers = [a for a in asked if a is not None]
            if len(answers) < len(asked):
                for answer in answers:
                    answer.set_exception(ReloadRefused("the daemon stops"))
                return
            self._once(answers)

    def _once(self, answers: list[Future[Reloaded]]) -> None:
        try:
            reloaded = self._reload()
        except Exception as error:  # noqa: BLE001 - told to everybody who asked; the thread has to go on
            for answer in answers:
                answer.set_exception(error)
            return
        for answer in answers:
            answer.set_result(reloaded)
