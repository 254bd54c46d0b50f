"""Which executor computes: one follows another between two batches, on probation or not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from daemon.flow.executor import Executor, Outcome
from pipelines.frame import Failure

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Switched:
    """How a switch ended.

    Attributes
    ----------
    executor : Executor
        Which computes no more: whoever made it closes it.
    failed : str
        Why the earlier one was put back, "" where the new one serves on.
    left : int
        Frames by which its probation ended early.
    """

    executor: Executor
    failed: str = ""
    left: int = 0


@dataclass(slots=True, eq=False)
class Post:
    """An executor at work, and how many batches of it have not been settled.

    `trial` is there while it has to prove itself, and stays where it failed to; `switched` is done when
    the switch to it has ended. What fails by a fault of one that was `given_up` does not count.
    """

    executor: Executor
    probation: int = 0
    outstanding: int = 0
    trial: _Trial | None = None
    given_up: bool = False
    switched: Future[Switched] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class _Trial:
    """Frames that are left to prove itself, who is in reserve, what ran the networks at the beginning."""

    left: int
    reserve: Post
    engines: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Leaving:
    """A post that gets no more batches, and who hears of its end."""

    post: Post
    failed: str
    switched: Future[Switched]
    left: int = 0


class Succession:
    """Who computes the next batch. What asks (`switch`, `settle`, ...) is for any thread, the rest for one.

    Attributes
    ----------
    post : Post
        Who computes.
    """

    def __init__(self, executor: Executor) -> None:
        self.post = Post(executor)
        self._leaving: list[_Leaving] = []
        # What was asked for, in order: a switch, a reason to put back, somebody who wants it settled.
        self._asked: SimpleQueue[Post | str | Future[Executor]] = SimpleQueue()

    def switch(self, executor: Executor, probation: int = 0) -> Future[Switched]:
        """Have another executor, which is warm, compute from the next batch on.

        The switch lies between two batches, so that it costs no frame. The batches that the earlier
        executor has end there.

        Parameters
        ----------
        executor : Executor
        probation : int
            So many frames have to be served without a fault until the earlier executor is let go. A fault
            before that puts the earlier one back. Another switch ends the probation early.

        Returns
        -------
        Future
            Done when one of the two executors has settled its last batch.
        """
        post = Post(executor, probation)
        self._asked.put(post)
        return post.switched

    def ask_to_put_back(self, reason: str) -> None:
        """Let the earlier executor compute again, if one is in reserve still."""
        self._asked.put(reason)

    def settle(self) -> Future[Executor]:
        """End a probation that is on in favour of who is on it.

        Returns
        -------
        Future
            Who computes then, which nothing but a switch changes any more: the one that was on probation,
            or the earlier one where that was put back before.
        """
        settled: Future[Executor] = Future()
        self._asked.put(settled)
        return settled

    def posts(self) -> list[Post]:
        """Return all that have batches, or could get one again. For any thread."""
        # Whatever changes hands meanwhile is in it once at least.
        post = self.post
        trial = post.trial
        leaving = [x.post for x in tuple(self._leaving)]
        return [post, *([trial.reserve] if trial else []), *leaving]

    def turn(self) -> None:
        """Put the next executor in its place, and let go of those that are through."""
        while not self._asked.empty():
            match self._asked.get():
                case Post() as post:
                    self._install(post)
                case str(reason):
                    self._put_back(reason)
                case settled:
                    self._accept()
                    settled.set_result(self.post.executor)
        if self.post.trial is not None and (problem := self.post.executor.problem):
            self._put_back(problem)
        for leaving in self._leaving:
            if problem := leaving.post.executor.problem:
                self._give_up(leaving.post, problem)
        for leaving in [x for x in self._leaving if not x.post.outstanding]:
            self._leaving.remove(leaving)
            leaving.switched.set_result(Switched(leaving.post.executor, leaving.failed, leaving.left))

    def judge(self, post: Post, outcomes: Sequence[Outcome]) -> list[bool]:
        """Look at what came back from an executor; return of each outcome whether it must not count.

        Those are the faults of one on probation, or of one that was given up: another computes them anew.
        """
        trial = post.trial
        if trial is None and not post.given_up:
            return [False] * len(outcomes)
        faults = [o for o in outcomes if isinstance(o, Failure) and o.fault]
        if trial is not None and post is self.post:
            trial.left -= len(outcomes)
            if faults:
                self._put_back(f"frame {faults[0].key.frame} of {faults[0].key.source}: {faults[0].reason}")
            elif post.executor.engines != trial.engines:
                changed = [e for e in post.executor.engines if e not in trial.engines]
                self._put_back("; ".join(changed) or "an engine gave up")
            elif trial.left <= 0:
                self._accept()
        return [isinstance(o, Failure) and o.fault for o in outcomes]

    def _install(self, post: Post) -> None:
        self._accept()
        if post.probation:
            post.trial = _Trial(post.probation, self.post, post.executor.engines)
        else:
            self._leaving.append(_Leaving(self.post, "", post.switched))
        self.post = post

    def _accept(self) -> None:
        """End the probation of the executor at work: it serves on, the one in reserve goes."""
        trial = self.post.trial
        if trial is not None:
            left = max(0, trial.left)
            self._leaving.append(_Leaving(trial.reserve, "", self.post.switched, left))
            self.post.trial = None

    def _put_back(self, reason: str) -> None:
        """Let the executor in reserve compute again, if there is one."""
        failed, trial = self.post, self.post.trial
        if trial is None:
            return
        log.warning("what computed before is put back: %s", reason)
        self._leaving.append(_Leaving(failed, reason, failed.switched))
        self.post = trial.reserve
        self._give_up(failed, reason)

    def _give_up(self, post: Post, reason: str) -> None:
        """Have what waits in one that leaves computed anew: its workers may never start again."""
        if not post.given_up:
            post.given_up = True
            post.executor.give_up(reason)
