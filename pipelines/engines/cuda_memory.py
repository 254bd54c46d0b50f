"""Memory on the host that a GPU reads at full speed, memory on the GPU, and the stream between them.

Through `cuda.bindings.runtime`, which brings the CUDA runtime with it and answers every call with a
status: without a driver too it loads, and says what is wrong.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipelines.engines.engine import EngineFailure
from pipelines.engines.flavours import EngineError


def import_runtime() -> ModuleType:
    """Import the bindings.

    Raises
    ------
    EngineError
        If they are not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(
            f"the package cuda-bindings does not load ({error}): pip install 'grainwatch[tensorrt]' or"
            " 'grainwatch[tensorrt-rtx]'"
        ) from error
    return cast(ModuleType, runtime)


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; return what it gives beside its status.

    Raises
    ------
    EngineFailure
        If the status is an error: out of memory, a device that is lost.
    """
    status, *values = function(*arguments)
    if int(status):
        runtime = import_runtime()
        _, words = runtime.cudaGetErrorString(status)
        raise EngineFailure(f"{function.__name__}: {words.decode()} ({status.name})")
    return values[0] if values else None


class Stream:
    """A stream of its own, so that nothing else on the device is waited for.

    Attributes
    ----------
    handle : object
        As the bindings take it; `int` gives the address.
    """

    def __init__(self) -> None:
        """Make it; `EngineFailure` if the device cannot."""
        self._runtime = import_runtime()
        self.handle = call(self._runtime.cudaStreamCreateWithFlags, self._runtime.cudaStreamNonBlocking)
        weakref.finalize(self, self._runtime.cudaStreamDestroy, self.handle)

    def copy(self, to: int, source: int, size: int, *, to_device: bool) -> None:
        """Start copying `size` bytes between addresses of pinned host memory and of the device."""
        kinds = self._runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
        call(self._runtime.cudaMemcpyAsync, to, source, size, kind, self.handle)

    def wait(self) -> None:
        """Wait for all that was started."""
        call(self._runtime.cudaStreamSynchronize, self.handle)

    def record(self, start: Callable[[], None]) -> Callable[[], None]:
        """Record what `start` starts, as a graph; return what starts all of it at once."""
        runtime = self._runtime
        call(
            runtime.cudaStreamBeginCapture,
            self.handle,
            runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
        )
        try:
            start()
        finally:
            graph = call(runtime.cudaStreamEndCapture, self.handle)
        runnable = call(runtime.cudaGraphInstantiate, graph, 0)
        runtime.cudaGraphDestroy(graph)
        # Set free with the stream, whose graph it is.
        weakref.finalize(self, runtime.cudaGraphExecDestroy, runnable)
        return lambda: call(runtime.cudaGraphLaunch, runnable, self.handle)


class Buffer:
    """Room for a tensor on both sides.

    Attributes
    ----------
    host : array
        Pinned memory.
    device : int
        Address of as many bytes on the device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Allocate it; `EngineFailure` if there is no memory left, on either side."""
        runtime = import_runtime()
        size = int(np.prod(shape)) * dtype.itemsize
        pinned = int(call(runtime.cudaMallocHost, size))
        weakref.finalize(self, runtime.cudaFreeHost, pinned)
        self.device = int(call(runtime.cudaMalloc, size))
        weakref.finalize(self, runtime.cudaFree, self.device)
        raw = np.ctypeslib.as_array((ctypes.c_byte * size).from_address(pinned))
        self.host: npt.NDArray[Any] = raw.view(dtype).reshape(shape)
        # What lay there before could be an index that reaches out of a table.
        self.host[:] = 0

    @property
    def address(self) -> int:
        """Address of the pinned memory."""
        return self.host.ctypes.data
