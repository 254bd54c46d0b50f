"""Which backend runs a bundle here, and which one goes on when it breaks down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy.typing as npt

from grainwatch.config import EnginesTable
from pipelines.engines.bundle import Bundle
from pipelines.engines.cuda import Cuda, probe
from pipelines.engines.engine import Arrays, Engine, EngineFailure, EngineInfo
from pipelines.engines.flavours import FLAVOURS, EngineError, Flavour
from pipelines.engines.onnxruntime_engine import OnnxEngine
from pipelines.engines.onnxruntime_session import has_cuda
from pipelines.engines.openvino_engine import OpenVinoEngine
from pipelines.engines.tensorrt_engine import TensorrtEngine
from pipelines.engines.tensors import Tensor

ON_CPU = "onnxruntime"
"""Runs everywhere: what is left when nothing better works."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A backend that may run a bundle, in one precision.

    Attributes
    ----------
    backend, precision : str
    open : callable
        Returns the engine, proven by the self-test, or raises `EngineError`.
    """

    backend: str
    precision: str
    open: Callable[[], Engine]


@dataclass(frozen=True)
class Prospect:
    """What can be said without a bundle.

    Attributes
    ----------
    backends : tuple of str
        Worth trying, the best first.
    lacking : tuple of str
        Why better ones are not among them.
    """

    backends: tuple[str, ...]
    lacking: tuple[str, ...]


class FallbackEngine:
    """The first engine of a list that works; the next one where it breaks down.

    Attributes
    ----------
    inputs, outputs : mapping of str to Tensor
        Of the network.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        spare: Sequence[Candidate] = (),
        passed: Sequence[str] = (),
        why: str = "it is the best of those that could run it",
        name: str = "",
    ) -> None:
        """Open the first candidate that works.

        Parameters
        ----------
        candidates : sequence of Candidate
            The best first.
        spare : sequence of Candidate
            Not good enough to begin with, but to go on with.
        passed : sequence of str
            Why better ones are not among them.
        why : str
            This one, where nothing better was passed over.
        name : str
            Of the model, for the log.

        Raises
        ------
        EngineError
            If none works; it says why of each.
        """
        self._left = list(candidates)
        self._passed = list(passed)
        self._why = why
        self._name = name
        self._failures = 0
        self._engine = self._next()
        self._left += spare
        self.inputs: Mapping[str, Tensor] = self._engine.inputs
        self.outputs: Mapping[str, Tensor] = self._engine.outputs

    @property
    def about(self) -> EngineInfo:
        """Which one runs now, why, and how many broke down before it."""
        why = "; ".join(self._passed) or self._why
        return replace(self._engine.about, why=why, failures=self._failures)

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs of a batch; see `pipelines.engines.engine.Engine`.

        An engine that breaks down is let go for good, and the next one repeats the batch.

        Raises
        ------
        EngineFailure
            If the last one breaks down.
        """
        while True:
            try:
                return self._engine.run(inputs)
            except EngineFailure as error:
                if not self._left:
                    raise
                self._replace(error)

    def _replace(self, error: EngineFailure) -> None:
        broken = self._engine.about
        # In fewer bits or more, it is the same library on the same device.
        self._left = [candidate for candidate in self._left if candidate.backend != broken.backend]
        # The error holds the frames that hold the engine, and the engine may hold the memory that lacks.
        self._passed.append(f"{broken.backend} broke down while it ran: {error.with_traceback(None)}")
        self._failures += 1
        try:
            self._engine = self._next()
        except EngineError as nothing_left:
            raise EngineFailure(str(nothing_left)) from error
        _log.error(
            "%s: %s on %s broke down (%s): going on with %s",
            self._name or "a model",
            broken.backend,
            broken.device,
            error,
            self.about,
        )

    def _next(self) -> Engine:
        while self._left:
            candidate = self._left.pop(0)
            try:
                return candidate.open()
            except EngineError as error:
                self._passed.append(f"{candidate.backend} in {candidate.precision}: {error}")
        raise EngineError("; ".join(self._passed))


def prospect(choice: EnginesTable, cuda: Cuda) -> Prospect:
    """Return the backends that are worth trying on this machine."""
    if choice.backend != "auto":
        return Prospect((choice.backend,), ())
    lacking = {backend: _lack(backend, cuda) for backend in (*_flavours(), "onnxruntime-cuda")}
    able = [backend for backend, lack in lacking.items() if not lack]
    # Without a device there is one reason for all of them.
    reasons = [cuda.problem] if cuda.problem else [f"{b}: {lack}" for b, lack in lacking.items() if lack]
    return Prospect((*able, ON_CPU), tuple(reasons))


def open_engine(
    bundle: Bundle, choice: EnginesTable | None = None, cuda: Cuda | None = None
) -> FallbackEngine:
    """Return the best engine for a bundle that works here, tested with the bundle's batch.

    Parameters
    ----------
    bundle : Bundle
    choice : EnginesTable, optional
        What the configuration says of backend and precision; the best of all by default.
    cuda : Cuda, optional
        What `probe` found; asked where it matters and was not given.

    Raises
    ------
    EngineError
        If a backend that is asked for by name cannot be used; the message says why and what to do.
    BundleError
        If the bundle does not fit together.
    """
    choice = choice or EnginesTable()
    if cuda is None:
        cuda = Cuda("it was not asked for") if choice.backend in (ON_CPU, "openvino") else probe()
    ahead = prospect(choice, cuda)
    model = bundle.model
    name = " ".join(word for word in ("bundle", model.name, model.version, bundle.part) if word)

    def candidates(backend: str) -> list[Candidate]:
        wanted: str = choice.precision
        if wanted == "auto":
            wanted = bundle.description.precision.get(backend, "fp32")
        # What cannot be had, or is off by too much, is had in float32.
        return [
            Candidate(backend, precision, partial(_open, bundle, backend, precision, cuda))
            for precision in dict.fromkeys((wanted, "fp32"))
        ]

    if choice.backend == "auto":
        listed = [candidate for backend in ahead.backends for candidate in candidates(backend)]
        return FallbackEngine(listed, passed=ahead.lacking, name=name)
    # While frames come, results count for more than the wish.
    spare = candidates(ON_CPU) if choice.backend != ON_CPU else []
    try:
        if choice.backend not in (ON_CPU, "openvino") and (lack := _lack(choice.backend, cuda)):
            raise EngineError(lack)
        return FallbackEngine(candidates(choice.backend), spare, why="it was asked for", name=name)
    except EngineError as error:
        raise EngineError(
            f'engines.backend {choice.backend!r} cannot be used: {error}; "auto" takes the best that works'
        ) from error


def _flavours() -> dict[str, Flavour]:
    return {flavour.extra: flavour for flavour in FLAVOURS}


def _lack(backend: str, cuda: Cuda) -> str:
    """Return what a backend for GPUs lacks here, "" where it is worth a try."""
    if cuda.problem:
        return cuda.problem
    if backend == "onnxruntime-cuda":
        return (
            "" if has_cuda() else "the ONNX Runtime that is installed has none: pip install onnxruntime-gpu"
        )
    flavour = _flavours()[backend]
    if not flavour.version:
        return f"not installed: pip install 'grainwatch[{flavour.extra}]'"
    return cuda.lacks(flavour.needs_cuda)


def _open(bundle: Bundle, backend: str, precision: str, cuda: Cuda) -> Engine:
    if backend == ON_CPU:
        return OnnxEngine(bundle, precision)
    if backend == "openvino":
        return OpenVinoEngine(bundle, precision)
    if backend == "onnxruntime-cuda":
        return OnnxEngine(bundle, precision, "cuda", cuda.device)
    return TensorrtEngine(bundle, _flavours()[backend], cuda, precision)
