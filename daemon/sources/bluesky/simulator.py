"""A raster scan as Bluesky documents, without bluesky: what a RunEngine and its publisher would send.

The simulator publishes to a proxy (`connect`), or plays the proxy itself (`bind`). Frames lie in the
events, or in an HDF5 file that grows while the documents come.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import h5py
import msgpack
import numpy as np
import numpy.typing as npt
import zmq

from daemon.sources.bluesky.scan import PlanGrid
from daemon.sources.zmq_reader import attach

DATASET: Final = "/entry/data/data"
DETECTOR: Final = "camera"
MOTORS: Final = ("sample_x", "sample_y", "sample_z")

Encoding = Literal["msgpack", "json"]
_SLICE_S: Final = 0.1


@dataclass(frozen=True)
class Options:
    """What is simulated.

    Attributes
    ----------
    address : str
        Of the proxy's in port, or to listen on with `bind`.
    shape : tuple of int
        Points along x, y and z; x is fastest.
    step_um : float
        Distance of the points. The motors count in mm.
    folder : Path or None
        Where the HDF5 file goes; None: frames lie in the events.
    peer_timeout_s : float or None
        How long to wait until somebody subscribes; None: for ever.
    linger_s : float
        How long to wait at the end until all has left.

    Raises
    ------
    ValueError
        If a value cannot be; the message begins with its name.
    """

    address: str
    bind: bool = False
    shape: tuple[int, ...] = (5, 4)
    step_um: float = 1.0
    snake: bool = False
    rate_hz: float = 20.0
    encoding: Encoding = "msgpack"
    folder: Path | None = None
    prefix: str = ""
    peer_timeout_s: float | None = None
    linger_s: float = 10.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise ValueError(f"scan: expected 1 to 3 numbers of points, got {self.shape}")
        if not self.step_um > 0:
            raise ValueError(f"step_um: expected more than 0, got {self.step_um}")
        if self.rate_hz < 0:
            raise ValueError(f"rate: expected 0 (no limit) or more, got {self.rate_hz}")
        if " " in self.prefix:
            raise ValueError(f"prefix: expected no spaces, got {self.prefix!r}")


@dataclass(frozen=True)
class Report:
    """What was sent; `complete`: to the end of the plan."""

    run: str
    documents: int
    frames: int
    seconds: float
    complete: bool

    def __str__(self) -> str:
        how = "" if self.complete else ", stopped early"
        return f"run {self.run}: {self.documents} documents, {self.frames} frames, {self.seconds:.1f} s{how}"


class Simulator:
    """Sends one run.

    Parameters
    ----------
    frames : sequence of (rows, columns) array
        Taken round and round.
    stop : callable
        Asked between documents whether to abort the plan, as an operator may; its stop document says so.

    Raises
    ------
    ValueError
        If there are no frames, or they are not of one shape and type.
    grainwatch.config.ConfigError
        If the address cannot be used.
    """

    def __init__(
        self,
        frames: Sequence[npt.NDArray[Any]],
        options: Options,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if not frames:
            raise ValueError("frames: there are none to send")
        forms = {(f.shape, f.dtype.str) for f in frames}
        if len(forms) > 1:
            raise ValueError(f"frames: expected one shape and type, got {sorted(map(str, forms))}")
        self._frames = frames
        self._options = options
        self._stop = stop
        self._sent = 0
        self._context = zmq.Context(io_threads=1)
        # XPUB, unlike PUB, says when somebody subscribes: before that, all would be lost.
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.set_hwm(0)
        try:
            attach(self._socket, options.address, options.bind, "address")
        except ValueError:
            self._context.destroy(linger=0)
            raise

    @property
    def address(self) -> str:
        """Where it listens in fact, or what it is connected to."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def run(self) -> Report:
        """Wait for a subscriber, send the documents of one run, and close the socket."""
        run = str(uuid.uuid4())
        taken, began, complete = 0, 0.0, False
        try:
            if self._wait_for_subscriber():
                began = time.monotonic()
                taken = self._send_run(run)
                complete = taken == math.prod(self._options.shape)
        finally:
            self._context.destroy(linger=round(1000 * self._options.linger_s))
        seconds = time.monotonic() - began if began else 0.0
        return Report(run, self._sent, taken, seconds, complete)

    def _wait_for_subscriber(self) -> bool:
        wait_s = self._options.peer_timeout_s
        deadline = math.inf if wait_s is None else time.monotonic() + wait_s
        while time.monotonic() < deadline and not self._stop():
            if self._socket.poll(round(1000 * _SLICE_S)) and self._socket.recv()[:1] == b"\x01":
                return True
        return False

    def _send_run(self, run: str) -> int:
        options = self._options
        points, descriptor = math.prod(options.shape), str(uuid.uuid4())
        self._send("start", _start(run, options))
        self._send("descriptor", self._descriptor(run, descriptor))
        origin, taken = time.monotonic(), 0
        with ExitStack() as files:
            write = self._files(files, run)
            for number, position in enumerate(_positions(options)):
                self._sleep_until(origin + (number / options.rate_hz if options.rate_hz else 0.0))
                if self._stop():
                    break
                frame = self._frames[number % len(self._frames)]
                data: dict[str, Any] = dict(zip(MOTORS, position, strict=False))
                if write is None:
                    data[DETECTOR] = frame
                else:
                    write(number, frame, descriptor)
                self._send("event", _event(descriptor, number + 1, data))
                taken += 1
        aborted = taken < points
        self._send(
            "stop",
            {
                "uid": str(uuid.uuid4()),
                "time": time.time(),
                "run_start": run,
                "exit_status": "abort" if aborted else "success",
                "reason": "stopped by the operator" if aborted else "",
                "num_events": {"primary": taken},
            },
        )
        return taken

    def _files(self, files: ExitStack, run: str) -> Callable[[int, npt.NDArray[Any], str], None] | None:
        """Announce the HDF5 file; return what writes a frame to it and says so. None without a folder."""
        if self._options.folder is None:
            return None
        first, resource = self._frames[0], str(uuid.uuid4())
        path = self._options.folder.absolute() / f"{run}.h5"
        file = files.enter_context(h5py.File(path, "w", libver="latest"))
        stack = file.create_dataset(
            DATASET, (0, *first.shape), first.dtype, chunks=(1, *first.shape), maxshape=(None, *first.shape)
        )
        file.swmr_mode = True
        self._send(
            "stream_resource",
            {
                "uid": resource,
                "run_start": run,
                "data_key": DETECTOR,
                "mimetype": "application/x-hdf5",
                "uri": f"file://localhost{path}",
                "parameters": {"dataset": DATASET, "chunk_shape": [1, *first.shape]},
            },
        )

        def write(number: int, frame: npt.NDArray[Any], descriptor: str) -> None:
            stack.resize(number + 1, axis=0)
            stack[number] = frame
            stack.flush()
            self._send(
                "stream_datum",
                {
                    "uid": f"{resource}/{number}",
                    "stream_resource": resource,
                    "descriptor": descriptor,
                    "indices": {"start": number, "stop": number + 1},
                    "seq_nums": {"start": number + 1, "stop": number + 2},
                },
            )

        return write

    def _descriptor(self, run: str, uid: str) -> dict[str, Any]:
        frame = self._frames[0]
        camera: dict[str, Any] = {
            "source": "SIM:camera",
            "dtype": "array",
            "dtype_numpy": frame.dtype.str,
            "shape": list(frame.shape),
        }
        if self._options.folder is not None:
            camera |= {"external": "STREAM:", "shape": [1, *frame.shape]}
        motors = {
            motor: {"source": f"SIM:{motor}", "dtype": "number", "shape": [], "units": "mm"}
            for motor in MOTORS[: len(self._options.shape)]
        }
        return {
            "uid": uid,
            "time": time.time(),
            "run_start": run,
            "name": "primary",
            "data_keys": {DETECTOR: camera, **motors},
            "object_keys": {key: [key] for key in (DETECTOR, *motors)},
            "configuration": {},
            "hints": {},
        }

    def _send(self, name: str, document: dict[str, Any]) -> None:
        encode = _msgpack if self._options.encoding == "msgpack" else _json
        self._socket.send(b" ".join([self._options.prefix.encode(), name.encode(), encode(document)]))
        self._sent += 1

    def _sleep_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0 and not self._stop():
            time.sleep(min(left, _SLICE_S))


def checked_encoding(name: str) -> Encoding:
    """Return the encoding of that name.

    Raises
    ------
    ValueError
        If there is none.
    """
    known: dict[str, Encoding] = {"msgpack": "msgpack", "json": "json"}
    if name in known:
        return known[name]
    raise ValueError(f"encoding: expected msgpack or json, got {name!r}")


def _start(run: str, options: Options) -> dict[str, Any]:
    """Return what bluesky's grid_scan says of itself: the slowest motor first."""
    slow_first = list(reversed(options.shape))
    motors = list(reversed(MOTORS[: len(slow_first)]))
    return {
        "uid": run,
        "time": time.time(),
        "scan_id": 1,
        "plan_name": "grid_scan",
        "plan_type": "generator",
        "plan_pattern": "outer_product",
        "detectors": [DETECTOR],
        "motors": motors,
        "num_points": math.prod(slow_first),
        "num_intervals": math.prod(slow_first) - 1,
        "shape": slow_first,
        "extents": [[0.0, (n - 1) * options.step_um / 1000] for n in slow_first],
        "snaking": [False] + [options.snake] * (len(slow_first) - 1),
        "hints": {"gridding": "rectilinear", "dimensions": [[[m], "primary"] for m in motors]},
        "sample_name": "simulated",
    }


def _positions(options: Options) -> Iterator[tuple[float, ...]]:
    """Yield where each frame is taken, mm, x first."""
    axes = len(options.shape)
    grid = PlanGrid(options.shape, MOTORS[:axes], (options.snake,) * (axes - 1) + (False,))
    for number in range(math.prod(options.shape)):
        index = grid.by_number(number)
        assert index is not None
        yield tuple(i * options.step_um / 1000 for i in index)


def _event(descriptor: str, seq_num: int, data: dict[str, Any]) -> dict[str, Any]:
    now = time.time()
    return {
        "uid": str(uuid.uuid4()),
        "time": now,
        "descriptor": descriptor,
        "seq_num": seq_num,
        "data": data,
        "timestamps": dict.fromkeys(data, now),
        "filled": {},
    }


def _msgpack(document: dict[str, Any]) -> bytes:
    """Encode as bluesky's publisher does with the serializer of msgpack-numpy."""
    encoded: bytes = msgpack.packb(document, default=_array)
    return encoded


def _array(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} does not go into a document")
    return {
        b"nd": True,
        b"type": value.dtype.str,
        b"kind": b"",
        b"shape": value.shape,
        b"data": value.tobytes(),
    }


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, default=lambda array: array.tolist()).encode()
