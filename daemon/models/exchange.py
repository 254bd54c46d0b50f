"""Models are exchanged while the daemon runs: activated, put back, tried in the shadow.

All that changes something runs in the thread of `daemon.changes`, one after the other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from daemon.changes import Answer, ChangeRefused, Changes
from daemon.executors import Executors
from daemon.flow.dispatcher import Dispatcher
from daemon.flow.executor import Executor
from daemon.flow.succession import Switched
from daemon.models.at_work import AtWork
from daemon.models.registry import STATES, Model, Registry, RegistryError
from daemon.models.shadows import Shadows

log = logging.getLogger(__name__)

#: How long one who asked for an exchange waits, seconds: workers have to get warm.
ANSWER_S: Final = 900.0
#: How long the batches that a model has still in hand may take when it is put back, seconds.
SETTLE_S: Final = 120.0

Request = Mapping[str, Any]
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Trial:
    """A model that has to prove itself, and what comes back where it does not."""

    model: Model
    before: AtWork
    reserve: Executor
    switched: Future[Switched]
    undo: Callable[[str, str], object]
    over: bool = False


class ModelExchange:
    """Exchanges the models of a running daemon.

    Parameters
    ----------
    daemon_name : str
    registry : Registry
    executors : Executors
    changes : Changes
    dispatcher : Dispatcher
    at_work : AtWork
        What it computes by.

    Attributes
    ----------
    at_work : AtWork
        What it computes by now.
    problem : str
        Why a model was put back, "" where none was.
    """

    def __init__(
        self,
        daemon_name: str,
        registry: Registry,
        executors: Executors,
        changes: Changes,
        dispatcher: Dispatcher,
        at_work: AtWork,
    ) -> None:
        self.at_work = at_work
        self.problem = ""
        self._myself = f"daemon {daemon_name}: automatic"
        self._registry = registry
        self._executors = executors
        self._changes = changes
        self._dispatcher = dispatcher
        self._shadows = Shadows(registry, executors, dispatcher)
        self._trial: _Trial | None = None
        self._ending = threading.Lock()  # a stop may end a trial, too

    def adopt(self, at_work: AtWork) -> None:
        """Take note of what computes from now on; models in the shadow go on beside it."""
        self.at_work = at_work
        self._changes.follow_up(self._renew_shadows)

    def answer(self, request: Request) -> Answer:
        """Answer the control command ``models``.

        Raises
        ------
        ValueError
            If the request makes no sense or is refused.
        """
        doing = {"activate": self._activate, "rollback": self._roll_back, "shadow": self._shadow}
        what = request.get("do")
        if what not in doing:
            raise ValueError(f"do: expected one of {', '.join(doing)}, got {str(what)[:100]!r}")
        for key in ("name", "version", "by", "why"):
            if not isinstance(request.get(key, ""), str):
                raise ValueError(f"{key}: expected a text")
        if not request.get("name"):
            raise ValueError("name: expected the name of a model")
        begin = time.monotonic()
        try:
            done = self._changes.ask(partial(doing[str(what)], request)).result(ANSWER_S)
        except TimeoutError as error:
            raise ChangeRefused(
                f"not done after {ANSWER_S:g} s, and still to come: `grainwatch status` says when"
            ) from error
        return {"models": {**done, "took_s": time.monotonic() - begin}}

    def status(self) -> dict[str, Any]:
        """Return what `status` says of models: those in use, on probation and in the shadow."""
        trial = self._trial
        models = self.at_work.models
        return {
            "in_use": {name: {"folder": m.folder, "sha256": m.sha256} for name, m in models.items()},
            "on_probation": f"{trial.model.name} {trial.model.version}" if trial else "",
            "probation_left": self._dispatcher.probation_left,
            "in_shadow": self._shadows.status(),
        }

    @property
    def problems(self) -> list[str]:
        """What went wrong with models, each with the model's name in front."""
        return [*([self.problem] if self.problem else []), *self._shadows.problems]

    def close(self) -> None:
        """Compare no more, take back a model that failed last. The executors are closed with all others."""
        self._shadows.close()
        trial = self._trial
        if trial is not None and trial.switched.done():
            self._end_trial(trial, trial.switched.result(), self._myself)

    # In the thread of changes.

    def _activate(self, request: Request) -> Answer:
        version = request.get("version", "")
        # One that is retired was given up: who wants it back says which.
        model = self._registry.find(request["name"], version, STATES if version else ("candidate", "shadow"))
        if model.state == "active":
            raise RegistryError(f"{model.name} {model.version} is active already")
        self._registry.verify(model)
        note = partial(self._registry.set_state, model, "active", _who(request), request.get("why", ""))
        return self._exchange(model, note, partial(self._registry.rollback, model.name), request)

    def _roll_back(self, request: Request) -> Answer:
        name, who, why = request["name"], _who(request), request.get("why", "")
        trial = self._trial
        if trial is not None and trial.model.name == name:
            # What computed before is warm still.
            self._dispatcher.put_back(f"rolled back by {who}" + (f": {why}" if why else ""))
            switched = _in_time(trial.switched)
            self._end_trial(trial, switched, who)
            if switched.failed:
                return _answer(trial.model, "is put back, what computed before computes again")
            # It had proved itself a moment before.
        active, previous = self._registry.active(name), self._registry.previous(name)
        note = partial(self._registry.rollback, name, who, why)
        if previous is not None:
            self._registry.verify(previous)
            # Whoever does not like that either wants back what is active now.
            back = (previous, "retired") if active is None else (active, "active")
            undo = partial(self._registry.set_state, *back)
            return self._exchange(previous, note, undo, request, "again")
        if active is None:
            note()  # it says that there is nothing
            raise RegistryError(f"no version of {name} is active")
        if self.at_work.streams_of(name):
            executor, at_work = self.prepare(lambda: self.at_work.without_registry(name))
            self._put(executor, at_work, note, 0).add_done_callback(self._relieved)
            self._changes.follow_up(self._renew_shadows)
        else:
            note()
        return _answer(active, "is retired, no version of it is active; the bundle without it counts")

    def _exchange(
        self,
        model: Model,
        note: Callable[[], object],
        undo: Callable[[str, str], object],
        request: Request,
        again: str = "",
    ) -> Answer:
        """Warm a model beside the one at work, and put it in its place on probation.

        `note` writes that down in the registry; `undo` takes it back there, by whom and why.
        """
        if not self.at_work.streams_of(model.name):
            note()
            return _answer(model, "is active; no stream uses it")
        executor, at_work = self.prepare(lambda: self.at_work.with_model(model))
        before, reserve = self.at_work, self._dispatcher.executor
        frames = at_work.configuration.config.models.probation_frames
        switched = self._put(executor, at_work, note, frames)
        if frames:
            self._trial = trial = _Trial(model, before, reserve, switched, undo)
            switched.add_done_callback(
                lambda done: self._changes.follow_up(
                    partial(self._end_trial, trial, done.result(), self._myself)
                )
            )
        else:
            switched.add_done_callback(self._relieved)
        self._changes.follow_up(self._renew_shadows)
        did = " ".join(filter(None, ["computes", again]))
        answer = _answer(model, f"{did}, on probation for {frames} frames" if frames else did)
        log.info("model %s; asked by %s", answer["did"], _who(request))
        return answer

    def prepare(self, wanted: Callable[[], AtWork]) -> tuple[Executor, AtWork]:
        """Warm an executor of what is wanted, and end the probation that is on.

        From then on nothing puts another executor in the place of the one at work but who called this. A
        model that failed meanwhile is taken back first, and what is wanted looked up and built anew.

        Raises
        ------
        ConfigError
            If it cannot get ready.
        ChangeRefused
            If the daemon stops, or is too busy.
        """
        while True:
            at_work = wanted()
            executor = self._executors.make(at_work.configuration, at_work.models)
            self._executors.warm(executor)
            try:
                if self._settle():
                    return executor, at_work
            except Exception:
                self._executors.close(executor)
                raise
            self._executors.close(executor)

    def _settle(self) -> bool:
        """End the probation that is on; return whether its model stays."""
        computes = _in_time(self._dispatcher.settle())
        trial = self._trial
        if trial is None or computes is not trial.reserve:
            return True
        self._end_trial(trial, _in_time(trial.switched), self._myself)
        return False

    def _put(
        self, executor: Executor, at_work: AtWork, note: Callable[[], object], probation: int
    ) -> Future[Switched]:
        """Switch to an executor that was prepared; `note` writes that down just before."""
        switched = self._executors.put_in_place(executor, self._dispatcher, probation, note)
        self.problem = ""
        self.at_work = at_work
        for line in executor.engines:
            log.info("%s", line)
        return switched

    def _end_trial(self, trial: _Trial, switched: Switched, who: str) -> Answer:
        """Close the executor that nobody computes with any more; take back a model that failed."""
        with self._ending:
            if trial.over:
                return {}
            trial.over = True
        if self._trial is trial:
            self._trial = None
        name, version = trial.model.name, trial.model.version
        if not switched.failed:
            if switched.left:
                early = "its probation ended %d frames early, for another exchange or a reload"
                log.info(f"model %s %s: {early}", name, version, switched.left)
            else:
                log.info("model %s %s has proved itself", name, version)
            self._executors.close(switched.executor)
            return {}
        if who == self._myself:
            self.problem = f"{name} {version} was put back: {switched.failed}"
            log.error("model %s", self.problem)
        try:
            trial.undo(who, switched.failed)
        except RegistryError as error:
            # It computes no more all the same; at the next start it would.
            self.problem = (
                f"{name} {version} was put back, but is active in the registry ({error}):"
                " when that is mended, `grainwatch models rollback`"
            )
            log.error("model %s", self.problem)
        # Nothing else was put in place since: that settles a trial first.
        self.at_work = trial.before
        self._executors.close(switched.executor)
        self._changes.follow_up(self._renew_shadows)
        return {}

    def _relieved(self, switched: Future[Switched]) -> None:
        self._changes.follow_up(partial(self._close, switched.result().executor))

    def _close(self, executor: Executor) -> Answer:
        self._executors.close(executor)
        return {}

    def _shadow(self, request: Request) -> Answer:
        who, why = _who(request), request.get("why", "")
        share = _share(request, self.at_work.configuration.config.models.shadow_share)
        among = STATES if share else ("shadow",)
        model = self._registry.find(request["name"], request.get("version", ""), among)
        if not share:
            self._registry.set_state(model, "candidate", who, why)
            self._shadows.end(model.name)
            return _answer(model, "is in the shadow no more")
        if not self.at_work.streams_of(model.name):
            raise RegistryError(f"no stream uses {model.name}: there is nothing to compare it with")
        if model.state == "active":
            raise RegistryError(f"{model.name} {model.version} is active, it cannot be compared with itself")
        self._registry.verify(model)
        note = partial(self._registry.set_state, model, "shadow", who, why, share=share)
        self._shadows.begin(model, share, self.at_work, note)
        return _answer(model, f"computes {100 * share:.3g} % of the frames in the shadow")

    def _renew_shadows(self) -> Answer:
        self._shadows.renew(self.at_work)
        return {}


def _share(request: Request, default: float) -> float:
    share = request.get("share")
    if share is None:
        share = default
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"share: expected 0 to 1, got {share!r}")
    return float(share)


def _in_time(answer: Future[T]) -> T:
    """Return what the dispatcher answers."""
    try:
        return answer.result(SETTLE_S)
    except TimeoutError as error:
        raise ChangeRefused(
            f"the frames in hand are not through after {SETTLE_S:g} s: a sink or a worker holds them up,"
            " `grainwatch status` says which; try again"
        ) from error


def _who(request: Request) -> str:
    return str(request.get("by") or "somebody")


def _answer(model: Model, did: str) -> Answer:
    return {
        "did": f"{model.name} {model.version} ({model.sha256[:8]}) {did}",
        "name": model.name,
        "version": model.version,
        "sha256": model.sha256,
    }
