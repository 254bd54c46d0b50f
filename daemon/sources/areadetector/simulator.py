"""areaDetector without EPICS: arrays as its ZeroMQ plug-in sends them, on a PUB or a PUSH socket.

As the plug-in does, it never waits for a reader: an array that finds the buffer full is dropped, and its
number never comes. Only with a rate of 0 it sends as fast as arrays are taken. Before the first array it
waits until somebody listens, which the plug-in does not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zmq

from daemon.flow.scan import grid_index
from daemon.sources.areadetector.codec import ENCODINGS, EPICS_EPOCH
from daemon.sources.areadetector.header import ARRAY, PIXEL_TYPES
from grainwatch.config import ScanTable
from pipelines.images import encode_image

#: NDAttributes that say where an array of a scan was taken, in um.
POSITIONS: Final = ("SampleX", "SampleY", "SampleZ")
PATTERNS: Final = ("pub", "push")
VERSIONS: Final = ("1.3", "1.4")
#: What a user calls the compression: the format's name for it.
ALGORITHMS: Final[Mapping[str, str]] = {"none": "", **{name: name for name in ENCODINGS if name}}

_SLICE_S: Final = 0.1
_FRAMING_BYTES: Final = 12


@dataclass(frozen=True)
class Options:
    """How the simulated plug-in behaves.

    Attributes
    ----------
    address : str
        "tcp://127.0.0.1:1234"; ``:*`` takes any free port.
    bind : bool
        Bind, or connect to a reader that binds.
    pattern : str
        "pub" for everybody who subscribes, "push" for one reader each array.
    version : str
        Of the plug-in: "1.3" has the shape as [x, y], "1.4" as [y, x].
    rate_hz : float
        Arrays a second; 0 sends as fast as they are taken.
    count : int, optional
        Arrays in a series; None sends each given frame `repeat` times, or one for each point of `scan`.
    series : int
        How often the counter of arrays starts over.
    first_id : int
        `uniqueId` of the first array of a series.
    algorithm : str
        "none", "bslz4", "lz4hdf5" or "lz4".
    scan : ScanTable, optional
        The grid that the arrays walk over; their positions are NDAttributes.
    attributes : dict
        More NDAttributes.
    high_water_mark : int
        Messages that wait in the socket before arrays are dropped.
    peer_timeout_s : float, optional
        How long to wait for a reader; None waits for ever.
    linger_s : float
        How long to wait at the end for the last messages to leave.
    """

    address: str = "tcp://127.0.0.1:1234"
    bind: bool = True
    pattern: str = "pub"
    version: str = "1.4"
    rate_hz: float = 20.0
    count: int | None = None
    repeat: int = 1
    series: int = 1
    first_id: int = 1
    algorithm: str = "none"
    scan: ScanTable | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    high_water_mark: int = 1000
    peer_timeout_s: float | None = None
    linger_s: float = 30.0

    def __post_init__(self) -> None:
        checks = [
            # When the sender of an ipc socket leaves, libzmq drops what a slow reader has not taken yet.
            (self.address.startswith("tcp://"), f"address: expected tcp://host:port, got {self.address!r}"),
            (self.pattern in PATTERNS, f"pattern: expected one of {', '.join(PATTERNS)}"),
            (self.version in VERSIONS, f"version: expected one of {', '.join(VERSIONS)}"),
            (self.algorithm in ALGORITHMS, f"algorithm: expected one of {', '.join(ALGORITHMS)}"),
            (self.rate_hz >= 0, "rate: expected 0 (no limit) or more"),
            (self.count is None or self.count >= 1, "count: expected 1 or more"),
            (self.repeat >= 1, "repeat: expected 1 or more"),
            (self.series >= 1, "series: expected 1 or more"),
            (self.first_id >= 0, "first id: expected 0 or more"),
            (self.high_water_mark >= 1, "high water mark: expected 1 or more"),
        ]
        for good, message in checks:
            if not good:
                raise ValueError(message)


def microscope_attributes(pixel_size_um: float) -> dict[str, Any]:
    """Return NDAttributes that say how micrographs were taken, under the names that the pipeline knows."""
    return {
        "pixel_size_um": pixel_size_um,
        "detector": "SIM-SE",
        "voltage_kV": 15.0,
        "working_distance_mm": 10.1,
        "data_bar_px": 0,
    }


@dataclass(frozen=True)
class Report:
    """What a run came to. `images` were sent, `dropped` found the buffer full."""

    images: int
    dropped: int
    series: int
    sent_bytes: int
    seconds: float
    complete: bool

    def __str__(self) -> str:
        per_s = self.images / self.seconds if self.seconds else 0.0
        ending = "" if self.complete else "; stopped before all of it was taken"
        return (
            f"sent {self.images} arrays, dropped {self.dropped}, in {self.series} series,"
            f" {self.seconds:.2f} s: {per_s:.2f} arrays/s{ending}"
        )


@dataclass(frozen=True)
class Exposure:
    """The pixels of an array as they are sent, (rows, columns)."""

    shape: tuple[int, int]
    kind: str
    encoding: str
    blob: bytes


def encode_exposure(image: npt.NDArray[Any], algorithm: str = "none") -> Exposure:
    """Compress an image (rows, columns) as NDPluginCodec does.

    Raises
    ------
    ValueError
        If areaDetector has no pixels of that type.
    """
    kind = image.dtype.newbyteorder("=").name
    if kind not in PIXEL_TYPES:
        raise ValueError(f"areaDetector has no pixels of type {image.dtype}")
    rows, columns = image.shape
    encoding = ALGORITHMS[algorithm]
    pixels = np.ascontiguousarray(image, dtype=f"<{PIXEL_TYPES[kind]}")
    blob = encode_image(pixels, ENCODINGS[encoding])
    # ADCore leaves bitshuffle's blocks without the framing of the HDF5 filter.
    return Exposure((rows, columns), kind, encoding, blob[_FRAMING_BYTES:] if encoding == "bslz4" else blob)


def encode_array(
    exposure: Exposure, unique_id: int, time_stamp: float, version: str, attributes: Mapping[str, Any]
) -> list[bytes]:
    """Return the parts of a message."""
    rows, columns = exposure.shape
    header = {
        "htype": ARRAY if version == "1.4" else [ARRAY],
        "type": exposure.kind,
        "shape": [rows, columns] if version == "1.4" else [columns, rows],
        "frame": unique_id,
        "timeStamp": time_stamp,
        "encoding": exposure.encoding,
        "ndattr": dict(attributes),
    }
    return [json.dumps(header).encode(), exposure.blob]


class Simulator:
    """The plug-in with its socket open and its frames compressed.

    Parameters
    ----------
    frames : iterable of ndarray (rows, columns)
        Taken round and round.
    options : Options
    stop : callable
        Asked about every 0.1 s; true ends the run.

    Raises
    ------
    ValueError
        If there are no frames, or areaDetector has no pixels of their type.
    zmq.ZMQError
        If the address cannot be used.
    """

    def __init__(
        self,
        frames: Iterable[npt.NDArray[Any]],
        options: Options,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._options = options
        self._stop = stop
        self._exposures = [encode_exposure(frame, options.algorithm) for frame in frames]
        if not self._exposures:
            raise ValueError("there are no frames to send")
        self._sent = self._dropped = self._sent_bytes = 0
        self._context = zmq.Context(io_threads=1)
        # XPUB, unlike PUB, says when somebody subscribes, and when an array would be lost.
        self._socket = self._context.socket(zmq.PUSH if options.pattern == "push" else zmq.XPUB)
        self._socket.set_hwm(options.high_water_mark)
        self._socket.sndtimeo = round(1000 * _SLICE_S)
        if options.pattern == "pub":
            self._socket.setsockopt(zmq.XPUB_NODROP, 1)
        try:
            (self._socket.bind if options.bind else self._socket.connect)(options.address)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise

    @property
    def address(self) -> str:
        """Where it listens in fact: the port that was taken when the address ended in ``:*``."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def run(self) -> Report:
        """Wait for a reader, send all series, wait until they are taken; then the socket is closed."""
        options = self._options
        began, series, complete = 0.0, 0, False
        try:
            if self._wait_for_reader():
                began = time.monotonic()
                while series < options.series and self._send_series():
                    series += 1
                complete = series == options.series
        finally:
            before = time.monotonic()
            linger_s = options.linger_s if complete else 0.0
            self._context.destroy(linger=round(1000 * linger_s))
            complete = complete and time.monotonic() - before < linger_s
        seconds = time.monotonic() - began if began else 0.0
        return Report(self._sent, self._dropped, series, self._sent_bytes, seconds, complete)

    def _wait_for_reader(self) -> bool:
        wait_s = self._options.peer_timeout_s
        deadline = math.inf if wait_s is None else time.monotonic() + wait_s
        flag = zmq.POLLIN if self._options.pattern == "pub" else zmq.POLLOUT
        while time.monotonic() < deadline and not self._stop():
            if not self._socket.poll(round(1000 * _SLICE_S), flag):
                continue
            if self._options.pattern == "push" or self._socket.recv()[:1] == b"\x01":
                return True
        return False

    def _send_series(self) -> bool:
        """Send one array after the other at its time; return whether none is left."""
        options = self._options
        period_s = 1 / options.rate_hz if options.rate_hz else 0.0
        origin = time.monotonic()
        for number, attributes in enumerate(self._attributes()):
            while (left := origin + number * period_s - time.monotonic()) > 0:
                if self._stop():
                    return False
                time.sleep(min(left, _SLICE_S))
            exposure = self._exposures[number % len(self._exposures)]
            stamp = time.time() - EPICS_EPOCH
            if not self._send(
                encode_array(exposure, options.first_id + number, stamp, options.version, attributes)
            ):
                return False
        return True

    def _send(self, parts: list[bytes]) -> bool:
        """Send or drop an array; return whether to go on."""
        while not self._stop():
            try:
                # Waiting, where there is no rate, ends after a moment, to look at `stop`.
                flags = zmq.DONTWAIT if self._options.rate_hz else 0
                self._socket.send_multipart(parts, flags, copy=False)
            except zmq.Again:
                if not self._options.rate_hz:
                    continue
                self._dropped += 1
                return True
            self._sent += 1
            self._sent_bytes += sum(map(len, parts))
            return True
        return False

    def _attributes(self) -> Iterator[dict[str, Any]]:
        """Yield the NDAttributes of each array of a series."""
        options = self._options
        common = {"ColorMode": 0, **options.attributes}
        scan = options.scan
        points = math.prod(scan.shape) if scan is not None else len(self._exposures) * options.repeat
        for number in range(options.count or points):
            index = grid_index(scan, number) if scan is not None else None
            if scan is None or index is None:
                yield common
                continue
            places = zip(POSITIONS, index, scan.step_um, strict=False)
            yield {**common, **{name: i * step for name, i, step in places}}
