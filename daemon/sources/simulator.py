"""What the simulated detectors have in common: socket, schedule, series, and a report.

As an instrument does, they compress ahead of sending, send at the rate of the exposures whatever
the reader does, wait when nobody reads and the buffer is full, and deal their messages out when
several read. What a message looks like is the `Options` of a wire format.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import zmq

_POLL_MS: Final = 100

E = TypeVar("E")
E_contra = TypeVar("E_contra", contravariant=True)


class Coder(Protocol[E_contra]):
    """Codes the messages of one series, each as its parts."""

    def start(self, first: E_contra, n_images: int) -> list[bytes]:
        """Return what opens the series; `first` is its first exposure."""
        ...

    def image(
        self, number: int, exposure: E_contra, period_s: float, position_um: Sequence[float] | None = None
    ) -> list[bytes]:
        """Return an image; what is the same whenever the exposure is sent is not coded anew."""
        ...

    def end(self) -> list[bytes]:
        """Return what closes the series."""
        ...


@dataclass(frozen=True)
class Options(ABC, Generic[E]):
    """How a simulated detector behaves. A wire format adds options of its own, and how it codes.

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
    high_water_mark : int
        Messages that wait in the socket before the simulator itself waits.
    first_series_id : int
    linger_s : float
        How long to wait at the end for the last messages to leave.
    peer_timeout_s : float, optional
        How long to wait for a reader; None waits for ever.
    metadata : dict
        More keys of the message that opens a series.
    """

    address: str
    bind: bool = True
    rate_hz: float = 20.0
    count: int | None = None
    repeat: int = 1
    series: int = 1
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
            (self.high_water_mark >= 1, "high water mark: expected 1 or more"),
            *self.own_checks(),
        ]
        for good, message in checks:
            if not good:
                raise ValueError(message)

    @abstractmethod
    def own_checks(self) -> list[tuple[bool, str]]:
        """Return what must hold of the format's own options, with the error where it does not."""

    @abstractmethod
    def expose(self, image: npt.NDArray[Any]) -> E:
        """Compress and code an image, (rows, columns).

        Raises
        ------
        ValueError
            If the format has no pixels of that type.
        """

    @abstractmethod
    def coder(self, series_id: int) -> Coder[E]:
        """Return what codes the messages of a series that begins now."""


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


class Ahead(Sequence[E]):
    """Exposures that a thread makes while the first ones are sent; asking for one waits for it.

    Parameters
    ----------
    frames : iterable of ndarray (rows, columns)
    count : int
        How many there are.
    options : Options
    """

    def __init__(self, frames: Iterable[npt.NDArray[Any]], count: int, options: Options[E]) -> None:
        self._frames = frames
        self._count = count
        self._options = options
        self._made: list[E] = []
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
                made = self._options.expose(frame)
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


class Stopped(Exception):
    """The run was told to stop, or found no reader in time."""


class Simulator(Generic[E]):
    """A detector with its socket open and its frames compressed.

    Parameters
    ----------
    frames : iterable of ndarray (rows, columns), or of what the format makes of them
        Compressed one by one as they are read, so that only the compressed ones stay in memory.
        What is an exposure already is sent as it is; `Ahead` makes them while they are sent.
    options : Options
    positions_um : sequence of tuple, optional
        Scan position of each image number, sent with it.
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
        frames: Iterable[npt.NDArray[Any] | E] | Ahead[E],
        options: Options[E],
        *,
        positions_um: Sequence[Sequence[float]] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._options = options
        self._positions = positions_um
        self._stop = stop
        self._sent_bytes = 0
        self._images = 0
        self._exposures: Sequence[E] = (
            frames
            if isinstance(frames, Ahead)
            else [options.expose(f) if isinstance(f, np.ndarray) else f for f in frames]
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
                coder = options.coder(options.first_series_id + number)
                self._send(coder.start(self._exposures[0], count))
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

    def _send_images(self, coder: Coder[E], count: int) -> None:
        rate = self._options.rate_hz
        period_s = 1 / rate if rate else 0.0
        origin = time.monotonic()
        for number in range(count):
            # Each exposure has its own time on the schedule, so that no delay adds up.
            self._sleep_until(origin + number * period_s)
            exposure = self._exposures[number % len(self._exposures)]
            position = self._positions[number] if self._positions and number < len(self._positions) else None
            self._send(coder.image(number, exposure, period_s, position))
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

    def _send(self, parts: list[bytes]) -> None:
        self._wait_for_reader()
        self._socket.send_multipart(parts, copy=False)
        self._sent_bytes += sum(map(len, parts))


def run_simulator(
    frames: Iterable[npt.NDArray[Any]],
    options: Options[Any],
    *,
    positions_um: Sequence[Sequence[float]] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Compress the frames, open the socket, send, report: `Simulator` in one call."""
    return Simulator(frames, options, positions_um=positions_um, stop=stop).run()
