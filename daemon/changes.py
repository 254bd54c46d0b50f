"""What changes a running daemon happens here, one after the other: reloads, exchanges of models."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias

from grainwatch.config import ConfigError

log = logging.getLogger(__name__)

#: What a change answers to whoever asked for it.
Answer: TypeAlias = dict[str, Any]
Change: TypeAlias = Callable[[], Answer]


class ChangeRefused(ConfigError):
    """The daemon goes on as before; the message says why."""


class Changes:
    """A thread that does what it is asked, in order; reloads that wait together are one.

    Parameters
    ----------
    reload : callable
        Takes the configuration file over and says what changed; raises ConfigError when it refuses.
    """

    def __init__(self, reload: Change) -> None:
        self._reload = reload
        # It may be filled from a signal handler, which a queue.Queue may not.
        self._asked: queue.SimpleQueue[tuple[Change, Future[Answer]] | None] = queue.SimpleQueue()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="changes", daemon=True)

    def start(self) -> None:
        """Start the thread; what was asked before is done now."""
        self._thread.start()

    def ask_reload(self) -> Future[Answer]:
        """Ask for a reload. Safe in a signal handler."""
        return self.ask(self._reload)

    def ask(self, change: Change) -> Future[Answer]:
        """Ask for a change; the future raises what it raises, ValueError where it is refused."""
        answer: Future[Answer] = Future()
        self._asked.put((change, answer))
        if self._over:
            self._refuse()
        return answer

    def follow_up(self, change: Change) -> None:
        """Ask for a change that nobody waits for: what goes wrong in it is logged."""
        self.ask(change).add_done_callback(_complain)

    def stop(self, timeout: float) -> None:
        """Take no more; what is under way has to be broken off by the one who does it."""
        self._asked.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            waiting = [self._asked.get()]
            while not self._asked.empty():
                waiting.append(self._asked.get())
            if None in waiting:
                self._over = True
                for entry in waiting:
                    self._asked.put(entry)
                self._refuse()
                return
            self._work_off([entry for entry in waiting if entry is not None])

    def _refuse(self) -> None:
        """Refuse what waits and what came too late, whoever notices it."""
        while True:
            try:
                entry = self._asked.get_nowait()
            except queue.Empty:
                return
            if entry is not None:
                entry[1].set_exception(ChangeRefused("the daemon stops"))

    def _work_off(self, waiting: list[tuple[Change, Future[Answer]]]) -> None:
        while waiting:
            change = waiting[0][0]
            # A file that is read twice in a row holds the same.
            together = 1
            while change == self._reload and together < len(waiting) and waiting[together][0] == change:
                together += 1
            answers = [answer for _, answer in waiting[:together]]
            del waiting[:together]
            try:
                done = change()
            except Exception as error:
                # Told to everybody who asked; the thread has to go on.
                if not isinstance(error, ValueError):
                    log.exception("a change of the daemon failed")
                for answer in answers:
                    answer.set_exception(error)
                continue
            for answer in answers:
                answer.set_result(done)


def _complain(answer: Future[Answer]) -> None:
    error = answer.exception()
    # What is no ValueError was logged with its traceback.
    if isinstance(error, ValueError) and not isinstance(error, ChangeRefused):
        log.error("a change of the daemon failed: %s", error)
