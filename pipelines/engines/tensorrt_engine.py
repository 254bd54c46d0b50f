"""Run the network of a bundle with TensorRT, in either flavour, on a GPU that `probe` has found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.engines.builder import BuiltEngine, build_engine
from pipelines.engines.bundle import MODEL, Bundle, BundleError
from pipelines.engines.cuda import Cuda
from pipelines.engines.cuda_memory import Buffer, Stream, import_runtime
from pipelines.engines.engine import Arrays, EngineFailure, EngineInfo
from pipelines.engines.flavours import EngineError, Flavour
from pipelines.engines.plans import Batch, Listener
from pipelines.engines.selftest import prove
from pipelines.engines.tensors import Ports, Tensor, nothing, ports_of, rows_of
from pipelines.engines.wording import one_line

_log = logging.getLogger(__name__)


class TensorrtEngine:
    """One network, ready: its plan built or found, loaded, compared with what its bundle says, tested.

    Batches that are larger than the plan allows are computed in parts.
    """

    def __init__(
        self,
        bundle: Bundle,
        flavour: Flavour,
        cuda: Cuda,
        precision: str = "fp32",
        batch: Batch | None = None,
        folder: Path | None = None,
    ) -> None:
        """Load the plan, built where it is not there yet, and run the bundle's self-test.

        Parameters
        ----------
        bundle : Bundle
        flavour : Flavour
        cuda : Cuda
            What `pipelines.engines.cuda.probe` found: without a device nothing of TensorRT is touched, since
            some of its runtimes crash then.
        precision : str
            "fp32", "fp16" or "int8".
        batch : Batch, optional
            What the bundle says by default.
        folder : Path, optional
            Of plans, instead of the cache.

        Raises
        ------
        EngineError
            If something is not installed, the driver is too old, the plan cannot be built or loaded, or its
            answers are off by more than the bundle allows.
        BundleError
            If the network takes or gives something else than the bundle says.
        """
        if lack := cuda.lacks(flavour.needs_cuda):
            raise EngineError(lack)
        import_runtime()
        trt = flavour.load()
        ports = ports_of(bundle)
        self.inputs, self.outputs = ports
        built = build_engine(bundle, flavour, cuda, precision, batch, folder)
        self._said = Listener.attach(trt, to_run=True)
        self._batch = built.key.batch
        try:
            self._plan = _loaded(trt, self._said, built)
        except EngineError as error:
            # Whole, but of no use: of another build of the library, or of a device that was exchanged.
            _log.warning("%s: %s: it is built again", built.path, error)
            built = build_engine(bundle, flavour, cuda, precision, batch, folder, again=True)
            self._plan = _loaded(trt, self._said, built)
        try:
            _ports(trt, self._plan).compare(ports)
        except ValueError as error:
            raise BundleError(f"{bundle.path(MODEL)}: {error}") from error
        self._context = self._plan.create_execution_context()
        if self._context is None:
            raise EngineError(f"{flavour.name} gets no memory to work in: {self._said.words()}")
        self._stream = Stream()
        self._capacity = 0
        self._buffers: dict[str, Buffer] = {}
        self._graph: Callable[[], None] | None = None
        self.about = EngineInfo(flavour.extra, precision, cuda.device, flavour.version)
        prove(self, bundle)

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs of a batch; see `pipelines.engines.engine.Engine`."""
        rows = rows_of(inputs, self.inputs)
        if rows == 0:
            return nothing(self.outputs)
        answers = {name: np.empty((rows, *t.shape[1:]), t.dtype) for name, t in self.outputs.items()}
        for part in parts(rows, self._batch.high):
            self._run_part(inputs, part, answers)
        return answers

    def _run_part(self, inputs: Arrays, part: slice, answers: Mapping[str, npt.NDArray[Any]]) -> None:
        given = part.stop - part.start
        rows = max(given, self._batch.low)
        self._make_room(rows)
        for name in self.inputs:
            host = self._buffers[name].host
            host[:given] = inputs[name][part]
            host[given:rows] = 0
        if self._graph is not None:
            self._graph()
        else:
            self._start(rows)
        self._stream.wait()
        for name, answer in answers.items():
            answer[part] = self._buffers[name].host[:given]

    def _start(self, rows: int) -> None:
        """Have the inputs copied there, the network run and the outputs copied back."""
        for name, tensor in self.inputs.items():
            self._check(self._context.set_input_shape(name, (rows, *tensor.shape[1:])))
            buffer = self._buffers[name]
            self._stream.copy(buffer.device, buffer.address, buffer.host[:rows].nbytes, to_device=True)
        self._check(self._context.execute_async_v3(int(self._stream.handle)))
        for name in self.outputs:
            buffer = self._buffers[name]
            self._stream.copy(buffer.address, buffer.device, buffer.host[:rows].nbytes, to_device=False)

    def _make_room(self, rows: int) -> None:
        """Have buffers for so many rows; they grow by doubling, up to the most that the plan allows."""
        if rows <= self._capacity:
            return
        capacity = capacity_for(rows, self._batch)
        # The old ones first: the device may not have room for both.
        self._buffers.clear()
        self._capacity, self._graph = 0, None
        for name, tensor in {**self.inputs, **self.outputs}.items():
            self._buffers[name] = Buffer((capacity, *tensor.shape[1:]), tensor.dtype)
            self._check(self._context.set_tensor_address(name, self._buffers[name].device))
        self._capacity = capacity
        if self._batch.low == self._batch.high:
            # Shapes and addresses stay for ever: all launches in one. What is done at the first run of a
            # shape cannot be recorded, so it comes first.
            self._start(capacity)
            self._stream.wait()
            self._graph = self._stream.record(lambda: self._start(capacity))

    def _check(self, worked: bool) -> None:
        if not worked:
            words = self._said.words()
            self._said.errors.clear()
            raise EngineFailure(f"TensorRT: {words or 'it fails and does not say why'}")


def parts(rows: int, most: int) -> list[slice]:
    """Return the parts that a batch is computed in, `most` rows each, the last one what is left."""
    return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]


def capacity_for(rows: int, batch: Batch) -> int:
    """Return for how many rows there shall be room: a power of two times the fewest, at most the most."""
    capacity = batch.low
    while capacity < rows:
        capacity *= 2
    return min(capacity, batch.high)


def _loaded(trt: Any, said: Listener, built: BuiltEngine) -> Any:
    try:
        plan = trt.Runtime(said.logger).deserialize_cuda_engine(built.content)
    except Exception as error:  # the bindings raise TypeError, RuntimeError and others
        raise EngineError(f"{built.key.flavour} does not start: {one_line(error)}") from error
    if plan is None:
        words = said.words()
        said.errors.clear()
        raise EngineError(f"{built.key.flavour} does not load the plan: {words or 'it does not say why'}")
    return plan


def _ports(trt: Any, plan: Any) -> Ports:
    found = Ports({}, {})
    for name in map(plan.get_tensor_name, range(plan.num_io_tensors)):
        into = found.inputs if plan.get_tensor_mode(name) == trt.TensorIOMode.INPUT else found.outputs
        # A range of one length only is a length to TensorRT; to callers it is a batch.
        _, *rest = (int(n) for n in plan.get_tensor_shape(name))
        into[name] = Tensor(np.dtype(trt.nptype(plan.get_tensor_dtype(name))), (-1, *rest))
    return found
