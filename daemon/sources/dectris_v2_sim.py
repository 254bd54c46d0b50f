"""A DECTRIS detector without the detector: Stream V2 messages on a PUSH socket.

As the instrument does, it compresses ahead of sending, sends at the rate of the exposures
whatever the reader does, waits when nobody reads and its buffer is full, and deals its messages
out when several read.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self

import cbor2
import numpy as np
import numpy.typing as npt
import zmq
from cbor2 import CBORTag

from daemon.sources.dectris_v2_codec import COMPRESSED, ROW_MAJOR, typed_array_tag
from pipelines.images import ALGORITHMS, encode_image

#: Time base of the detector's clock, in ticks a second.
CLOCK_HZ: Final = 50_000_000

_POLL_MS: Final = 100


@dataclass(frozen=True)
class Options:
    """How the simulated detector behaves.

    Attributes
    ----------
    address : str
        "tcp://127.0.0.1:31001"; ``:*`` takes any free port.
    bind : bool
        Bind, as a detector does, or connect to a reader that binds.
    rate_hz : float
        Exposures a second; 0 sends as fast as the reader takes them.
    count : int, optional
        Exposures in a series; None sends each given frame `repeat` times.
    series : int
        How many series, one after the other.
    algorithm : str
        "bslz4", "lz4", or "none" for bytes without compression.
    channels : tuple of str
        Thresholds; each but the first carries a fraction of the first one's counts.
    high_water_mark : int
        Messages that wait in the socket before the simulator itself waits.
    first_series_id : int
    linger_s : float
        How long to wait at the end for the last messages to leave.
    peer_timeout_s : float, optional
        How long to wait for a reader; None waits for ever.
    metadata : dict
        More keys of the start message.
    """

    address: str = "tcp://127.0.0.1:31001"
    bind: bool = True
    rate_hz: float = 20.0
    count: int | None = None
    repeat: int = 1
    series: int = 1
    algorithm: str = "bslz4"
    channels: tuple[str, ...] = ("threshold_1",)
    high_water_mark: int = 100
    first_series_id: int = 1
    linger_s: float = 30.0
    peer_timeout_s: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks = [
            # When the sender of an ipc socket leaves, libzmq drops what a slow reader has not taken yet.
            (self.address.startswith("tcp://"), f"address: expected tcp://host:port, got {self.address!r}"),
            (self.rate_hz >= 0, "rate: expected 0 (no limit) or more"),
            (self.count is None or self.count >= 1, "count: expected 1 or more"),
            (self.repeat >= 1, "repeat: expected 1 or more"),
            (self.series >= 1, "series: expected 1 or more"),
            (self.algorithm in ALGORITHMS, f"algorithm: expected one of {', '.join(ALGORITHMS)}"),
            (len(set(self.channels)) == len(self.channels) > 0, "channels: expected different names"),
            (self.high_water_mark >= 1, "high water mark: expected 1 or more"),
        ]
        for good, message in checks:
            if not good:
                raise ValueError(message)


@dataclass(frozen=True)
class Report:
    """What a run came to. `cpu_s` is processor time of this process while it sent."""

    images: int
    series: int
    sent_bytes: int
    seconds: float
    cpu_s: float
    complete: bool

    def __str__(self) -> str:
        per_s = self.images / self.seconds if self.seconds else 0.0
        rate = self.sent_bytes / self.seconds / 1e6 if self.seconds else 0.0
        share = 100 * self.cpu_s / self.seconds if self.seconds else 0.0
        ending = "" if self.complete else "; stopped before all of it was taken"
        return (
            f"sent {self.images} images in {self.series} series, {self.seconds:.2f} s:"
            f" {per_s:.2f} images/s, {rate:.1f} MB/s, {share:.0f} % of a core{ending}"
        )


@dataclass(frozen=True)
class Exposure:
    """The part of an image message that is the same whenever it is sent, coded."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    data: bytes


def encode_exposure(image: npt.NDArray[Any], channels: Sequence[str], algorithm: str) -> Exposure:
    """Compress and code the pixels of one exposure.

    Parameters
    ----------
    image : ndarray, (rows, columns)
        Channel number k (from 0) carries image // (k + 1).

    Raises
    ------
    ValueError
        If the format has no pixels of that type.
    """
    tag = typed_array_tag(image.dtype)
    data = {}
    for k, channel in enumerate(channels):
        pixels = image if k == 0 else (image // (k + 1)).astype(image.dtype)
        blob: Any = encode_image(pixels, algorithm)
        if algorithm != "none":
            elements = image.dtype.itemsize if algorithm == "bslz4" else 0
            blob = CBORTag(COMPRESSED, [algorithm, elements, blob])
        data[channel] = CBORTag(ROW_MAJOR, [list(image.shape), CBORTag(tag, blob)])
    rows, columns = image.shape
    return Exposure((rows, columns), image.dtype, cbor2.dumps("data") + cbor2.dumps(data))


class Ahead(Sequence[Exposure]):
    """Exposures that a thread makes while the first ones are sent; asking for one waits for it.

    Parameters
    ----------
    frames : iterable of ndarray (rows, columns)
    count : int
        How many there are.
    options : Options
    """

    def __init__(self, frames: Iterable[npt.NDArray[Any]], count: int, options: Options) -> None:
        self._frames = frames
        self._count = count
        self._options = options
        self._made: list[Exposure] = []
        self._more = threading.Condition()
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._make, name="exposures", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._thread.join()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if not isinstance(number, int) or not -self._count <= number < self._count:
            raise IndexError(f"exposure {number} of {self._count}")
        number %= self._count
        with self._more:
            self._more.wait_for(lambda: len(self._made) > number or self._over)
            if len(self._made) > number:
                return self._made[number]
        raise RuntimeError(f"exposure {number} was not made") from self._error

    def _make(self) -> None:
        try:
            for frame in self._frames:
                made = encode_exposure(frame, self._options.channels, self._options.algorithm)
                with self._more:
                    self._made.append(made)
                    self._more.notify_all()
                if self._over:
                    break
        except BaseException as error:  # told to whoever waits for an exposure
            self._error = error
            raise
        finally:
            with self._more:
                self._over = True
                self._more.notify_all()


@dataclass(frozen=True)
class SeriesCoder:
    """Codes the messages of one series."""

    series_id: int
    unique_id: str
    started: datetime

    def start(self, first: Exposure, channels: Sequence[str], n_images: int, extra: dict[str, Any]) -> bytes:
        """Return the start message."""
        rows, columns = first.shape
        return cbor2.dumps(
            {
                "type": "start",
                **self._identity(),
                "arm_date": self.started,
                "channels": list(channels),
                "number_of_images": n_images,
                "image_dtype": first.dtype.name,
                "image_size_x": columns,
                "image_size_y": rows,
                "detector_description": "grainwatch simulator",
                **extra,
            }
        )

    def image(self, number: int, exposure: Exposure, period_s: float, user_data: Any = None) -> bytes:
        """Return an image message: only its head is coded anew."""
        head: dict[str, Any] = {
            "type": "image",
            **self._identity(),
            "image_id": number,
            "series_date": self.started,
            "start_time": [round(number * period_s * CLOCK_HZ), CLOCK_HZ],
            "stop_time": [round((number + 1) * period_s * CLOCK_HZ), CLOCK_HZ],
            "real_time": [round(period_s * CLOCK_HZ), CLOCK_HZ],
        }
        if user_data is not None:
            head["user_data"] = user_data
        coded = bytearray(cbor2.dumps(head))
        coded[0] += 1  # a map of up to 23 pairs has their number in its first byte; data is one more
        return bytes(coded) + exposure.data

    def end(self) -> bytes:
        """Return the end message."""
        return cbor2.dumps({"type": "end", **self._identity()})

    def _identity(self) -> dict[str, Any]:
        return {"series_id": self.series_id, "series_unique_id": self.unique_id}


class Stopped(Exception):
    """The run was told to stop, or found no reader in time."""


class Simulator:
    """A detector with its socket open and its frames compressed.

    Parameters
    ----------
    frames : iterable of ndarray (rows, columns) or Exposure
        Compressed one by one as they are read, so that only the compressed ones stay in memory.
        What is an `Exposure` already is sent as it is; `Ahead` makes them while they are sent.
    options : Options
    positions_um : sequence of tuple, optional
        Scan position of each image number, sent as user data.
    stop : callable
        Asked about every 0.1 s; true ends the run.

    Raises
    ------
    ValueError
        If there are no frames or the format has no pixels of their type.
    zmq.ZMQError
        If the address cannot be used.
    """

    def __init__(
        self,
        frames: Iterable[npt.NDArray[Any] | Exposure] | Ahead,
        options: Options,
        *,
        positions_um: Sequence[Sequence[float]] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._options = options
        self._positions = positions_um
        self._stop = stop
        self._sent_bytes = 0
        self._images = 0
        self._exposures: Sequence[Exposure] = (
            frames
            if isinstance(frames, Ahead)
            else [
                f if isinstance(f, Exposure) else encode_exposure(f, options.channels, options.algorithm)
                for f in frames
            ]
        )
        if not self._exposures:
            raise ValueError("there are no frames to send")
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set_hwm(options.high_water_mark)
        try:
            (self._socket.bind if options.bind else self._socket.connect)(options.address)
        except zmq.ZMQError:
            self.close(0)
            raise

    @property
    def address(self) -> str:
        """Where it listens in fact: the port that was taken when the address ended in ``:*``."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def run(self) -> Report:
        """Send all series and wait until they are taken; then the socket is closed."""
        options = self._options
        count = options.count or len(self._exposures) * options.repeat
        done, began, cpu = 0, 0.0, 0.0
        complete = False
        try:
            for number in range(options.series):
                # A series starts when somebody is there: its times count from then.
                self._wait_for_reader(None if number else options.peer_timeout_s)
                coder = SeriesCoder(options.first_series_id + number, uuid.uuid4().hex, datetime.now(UTC))
                self._send(coder.start(self._exposures[0], options.channels, count, options.metadata))
                if number == 0:
                    began, cpu = time.monotonic(), time.process_time()
                self._send_images(coder, count)
                self._send(coder.end())
                done += 1
            complete = True
        except Stopped:
            pass
        finally:
            before = time.monotonic()
            self.close(self._options.linger_s if complete else 0)
            complete = complete and time.monotonic() - before < options.linger_s
        if not began:
            return Report(0, 0, 0, 0.0, 0.0, False)
        seconds = time.monotonic() - began
        return Report(self._images, done, self._sent_bytes, seconds, time.process_time() - cpu, complete)

    def close(self, linger_s: float) -> None:
        """Close the socket; what was sent may leave for `linger_s` more."""
        self._context.destroy(linger=round(1000 * linger_s))

    def _send_images(self, coder: SeriesCoder, count: int) -> None:
        rate = self._options.rate_hz
        period_s = 1 / rate if rate else 0.0
        origin = time.monotonic()
        for number in range(count):
            # Each exposure has its own time on the schedule, so that no delay adds up.
            self._sleep_until(origin + number * period_s)
            exposure = self._exposures[number % len(self._exposures)]
            position = self._positions[number] if self._positions and number < len(self._positions) else None
            user_data = None if position is None else {"position_um": [float(x) for x in position]}
            self._send(coder.image(number, exposure, period_s, user_data))
            self._images += 1

    def _sleep_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0:
            if self._stop():
                raise Stopped
            time.sleep(min(left, _POLL_MS / 1000))

    def _wait_for_reader(self, timeout_s: float | None = None) -> None:
        """Wait while nobody reads and the buffer is full."""
        began = time.monotonic()
        while not self._socket.poll(_POLL_MS, zmq.POLLOUT):
            if self._stop() or (timeout_s is not None and time.monotonic() - began > timeout_s):
                raise Stopped
        if self._stop():
            raise Stopped

    def _send(self, message: bytes) -> None:
        self._wait_for_reader()
        self._socket.send(message, copy=False)
        self._sent_bytes += len(message)


def run_simulator(
    frames: Iterable[npt.NDArray[Any]],
    options: Options,
    *,
    positions_um: Sequence[Sequence[float]] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Compress the frames, open the socket, send, report: `Simulator` in one call."""
    return Simulator(frames, options, positions_um=positions_um, stop=stop).run()
