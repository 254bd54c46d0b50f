"""A card that is none: TensorRT's runtime and CUDA's memory, played on the host.

What it plays is their contract alone: memory has addresses, nothing happens before a stream is waited
for, shapes outside of the range are refused, what is recorded runs when it is launched. Networks are
run by ONNX Runtime from and to those addresses. It shows that the engine keeps to the contract; it
shows nothing of a real card.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import runtime as real

from pipelines.engines.bundle import MODEL, Bundle
from pipelines.engines.flavours import Flavour
from pipelines.engines.onnxruntime_session import open_session
from pipelines.engines.plans import Batch
from pipelines.engines.tensors import ports_of

GOOD, NO_MEMORY, LOST = (
    real.cudaError_t.cudaSuccess,
    real.cudaError_t.cudaErrorMemoryAllocation,
    real.cudaError_t.cudaErrorDevicesUnavailable,
)


class Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


@dataclass
class Card:
    """Its memory, its stream and what it counted.

    Attributes
    ----------
    room : int
        Bytes that it has.
    lost : bool
        Whether it fell off the bus.
    off : float
        By how much it computes wrongly.
    runs, launches, allocations : int
    """

    room: int = 1 << 40
    lost: bool = False
    off: float = 0.0
    runs: int = 0
    launches: int = 0
    allocations: int = 0
    memory: dict[int, Any] = field(default_factory=dict)
    queue: list[Callable[[], None]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None

    def runtime(self) -> Any:
        """What stands for the module `cuda.bindings.runtime`."""
        played = (name for name in dir(self) if name.startswith("cuda"))
        return SimpleNamespace(
            **{name: getattr(self, name) for name in played},
            cudaGetErrorString=real.cudaGetErrorString,
            cudaStreamNonBlocking=real.cudaStreamNonBlocking,
            cudaMemcpyKind=real.cudaMemcpyKind,
            cudaStreamCaptureMode=real.cudaStreamCaptureMode,
        )

    def cudaMalloc(self, size: int) -> tuple[Any, int | None]:
        self.allocations += 1
        if self.lost or sum(map(len, self.memory.values())) + size > self.room:
            return (LOST if self.lost else NO_MEMORY), None
        # Filled with what an uninitialised memory may hold.
        block = (ctypes.c_ubyte * size)(*b"\x7f" * size) if size < 4096 else (ctypes.c_ubyte * size)()
        self.memory[ctypes.addressof(block)] = block
        return GOOD, ctypes.addressof(block)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple[Any]:
        del self.memory[address]
        return (GOOD,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, Any]:
        return (LOST, None) if self.lost else (GOOD, real.cudaStream_t(7))

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any]:
        return (GOOD,)

    def start(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: Any) -> tuple[Any]:
        assert int(stream) == 7
        for address in (to, source):
            assert any(a <= address and address + size <= a + len(b) for a, b in self.memory.items())
        self.start(lambda: ctypes.memmove(to, source, size))
        return (LOST if self.lost else GOOD,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any]:
        assert self.recording is None
        if self.lost:
            return (LOST,)
        while self.queue:
            self.queue.pop(0)()
        return (GOOD,)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        assert not self.queue
        self.recording = []
        return (GOOD,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:
        graph, self.recording = self.recording, None
        return GOOD, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        return GOOD, list(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any]:
        return (GOOD,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> tuple[Any]:
        self.launches += 1
        self.queue.extend(graph)
        return (GOOD,)


class Context:
    """An execution context."""

    def __init__(self, card: Card, bundle: Bundle, batch: Batch) -> None:
        self._card, self._batch = card, batch
        self._ports = ports_of(bundle)
        self._session = open_session(bundle.file(MODEL))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        fits = self._batch.low <= shape[0] <= self._batch.high
        return fits and shape[1:] == self._ports.inputs[name].shape[1:]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._ports.inputs or name in self._ports.outputs

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        rows = {shape[0] for shape in self._shapes.values()}
        if len(rows) != 1 or self._card.lost:
            return False
        self._card.start(lambda shapes=dict(self._shapes): self._run(shapes))  # type: ignore[misc]
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._card.runs += 1
        given = {n: self._at(n, shapes[n], t.dtype) for n, t in self._ports.inputs.items()}
        rows = next(iter(shapes.values()))[0]
        answers = self._session.run(list(self._ports.outputs), given)
        for (name, tensor), answer in zip(self._ports.outputs.items(), answers, strict=True):
            self._at(name, (rows, *tensor.shape[1:]), tensor.dtype)[:] = answer + self._card.off

    def _at(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        address, size = self._addresses[name], int(np.prod(shape)) * dtype.itemsize
        assert len(self._card.memory[address]) >= size
        raw = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))
        return raw.view(dtype).reshape(shape)


@dataclass(frozen=True)
class SimulatedFlavour(Flavour):
    """tensorrt_rtx, whose builder is the real one and whose runtime is played.

    `refusals` is how many plans the runtime refuses before it takes one.
    """

    card: Card = field(default_factory=Card)
    bundle: Bundle | None = None
    batch: Batch = field(default_factory=Batch)
    refusals: list[int] = field(default_factory=lambda: [0])

    def load(self) -> ModuleType:
        trt: Any = SimpleNamespace(**vars(super().load()))
        flavour, bundle = self, self.bundle
        assert bundle is not None
        ports = ports_of(bundle)
        tensors = {**ports.inputs, **ports.outputs}

        class Plan:
            num_io_tensors = len(tensors)

            def get_tensor_name(self, number: int) -> str:
                return list(tensors)[number]

            def get_tensor_mode(self, name: str) -> Mode:
                return Mode.INPUT if name in ports.inputs else Mode.OUTPUT

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                return tensors[name].shape

            def get_tensor_dtype(self, name: str) -> str:
                return str(tensors[name].dtype)

            def create_execution_context(self) -> Context:
                assert bundle is not None
                return Context(flavour.card, bundle, flavour.batch)

        class Runtime:
            def __init__(self, logger: object) -> None: ...

            def deserialize_cuda_engine(self, content: bytes) -> Plan | None:
                assert content
                flavour.refusals[0] -= 1
                return Plan() if flavour.refusals[0] < 0 else None

        trt.Runtime, trt.TensorIOMode, trt.nptype = Runtime, Mode, np.dtype
        return trt  # type: ignore[no-any-return]
