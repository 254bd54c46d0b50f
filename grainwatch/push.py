"""Send images to a daemon: `ImagePusher`, which other programs can use, and ``grainwatch push`` does.

Each image is acknowledged after the daemon's accounts took it. A few are on the way at once and no
more: a daemon that is slow makes the sender wait. What the daemon has already is not sent again, so
a sender that was killed goes on where it was; a daemon that comes back is told what it lost.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import numpy.typing as npt
import zmq

from grainwatch.push_link import Link, Session, client_name
from grainwatch.push_parcel import FileChangedError, Parcel, Receipt, array_parcel, file_parcel, image_array
from grainwatch.push_wire import (
    DEFAULT_ADDRESS,
    VERSION,
    Ack,
    Begin,
    Begun,
    Busy,
    FromDaemon,
    Held,
    Hello,
    Leave,
    Left,
    Outcome,
    Refused,
    Welcome,
)

log = logging.getLogger("grainwatch.push")

SLICE_S: Final = 0.1  # a wait is cut into slices, so that Ctrl-C works on Windows too
#: After so long without a daemon, or without an answer of one, a person is told.
SILENCE_S: Final = 3.0
STALL_S: Final = 15.0
#: How long `close` waits for what is on the way.
PARTING_S: Final = 5.0
#: Delivered images that are sent again if a crash of the daemon loses them: more than it has in flight.
DELIVERED: Final = 4096


__all__ = ["FileChangedError", "ImagePusher", "PushError", "Receipt"]


class PushError(RuntimeError):
    """Images cannot be pushed there; the message says why."""


class ImagePusher:
    """Sends the images of one series to a daemon. Not for use by several threads at once.

    Use it in a ``with`` statement: at the end of the block it waits for all acknowledgements and ends
    the series; after an error it leaves the series open, to be gone on with.

    Parameters
    ----------
    address : str
        ``streams.NAME.source.address`` of the daemon, where the source is of type "push".
    series : str
        Name of the series. One of the same name that was not ended goes on.
    first : int
        The number that the series starts from.
    again : bool
        Begin a new series and send everything, whatever the daemon has under this name.
    patience_s : float, optional
        Give up after so many seconds without a daemon; without it, wait for ever.
    say : callable, optional
        Is told what a person should know ("the daemon is gone"); by default it is logged.
    acknowledged : callable, optional
        Is told each `Receipt`.

    Attributes
    ----------
    series_id : str
        What the daemon calls the series.
    counts : dict of str to int
        How many images had which outcome.
    problems : list of Receipt
        Those that failed or were refused.
    lost : int
        Arrays that the daemon lost in a crash and that cannot be sent again: keep your own copy.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        series: str = "push",
        *,
        first: int = 0,
        again: bool = False,
        patience_s: float | None = None,
        say: Callable[[str], None] | None = None,
        acknowledged: Callable[[Receipt], None] | None = None,
    ) -> None:
        self.address = address
        self.series = series
        self.first = first
        self.series_id = ""
        self.resumed = False
        self.counts: dict[Outcome, int] = {"taken": 0, "held": 0, "failed": 0, "refused": 0}
        self.problems: list[Receipt] = []
        self.lost = 0
        self._again = again
        self._fresh = again
        self._patience_s = patience_s
        self._say = say or log.warning
        self._acknowledged = acknowledged
        self._on_the_way: dict[int, Parcel] = {}
        self._backlog: deque[Parcel] = deque()
        self._delivered: OrderedDict[bytes, Parcel] = OrderedDict()
        self._id = 0
        self._complained = False
        self._stalled = False
        self._closed = False
        self._alone_since: float | None = None  # since somebody waits
        self._heard = time.monotonic()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._session = Session(Link(self._context, address))
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.end()
        finally:
            self.close()

    # What a program calls.

    def begin(self, *, fresh: bool = False) -> None:
        """Wait until it is our turn to send; the pushing methods do it by themselves.

        Parameters
        ----------
        fresh : bool
            Begin a new series although one of this name is open.

        Raises
        ------
        PushError
            If the daemon refuses, or patience ends.
        """
        if fresh and self._session.begun:
            self.flush()
            self._session.begun = False
            self._fresh = True
            self._ask_turn()
        self._until(lambda: self._session.begun)

    def has(self, fingerprint: bytes) -> bool:
        """Return whether the daemon has an image with this fingerprint under the name of the series."""
        return fingerprint in self._session.held

    def number_of(self, fingerprint: bytes) -> int | None:
        """Return the number under which the daemon has an image, None if it has not."""
        return self._session.held.get(fingerprint)

    def holder_of(self, number: int) -> bytes | None:
        """Return the fingerprint of the image that has a number in the series, None if it is free."""
        return self._session.numbers.get(number)

    def next_number(self) -> int:
        """Return the number after the highest that was given so far."""
        waiting = (parcel.head.number for parcel in self._waiting())
        return max(self.first - 1, self._session.highest, *waiting) + 1

    def push_file(
        self,
        path: str | os.PathLike[str],
        number: int | None = None,
        *,
        name: str = "",
        position_um: tuple[float, ...] | None = None,
        metadata: Mapping[str, Any] | None = None,
        sidecars: Mapping[str, str] | None = None,
    ) -> None:
        """Send a file as it is; returns when it is on its way, and waits while too many are.

        Parameters
        ----------
        path : path
        number : int, optional
            By default the next one.
        name : str
            What it is called there; by default its name without the folders.
        position_um : tuple of 1 to 3 float, optional
        metadata : mapping, optional
            Plain values; travels with the results of the frame into the pipeline.
        sidecars : mapping of str to str, optional
            Texts that belong to it, by name.

        Raises
        ------
        OSError
            If it cannot be read; `FileChangedError` if it changes meanwhile.
        PushError
            As `begin`.
        """
        self.begin()
        file = Path(path)
        number = self.next_number() if number is None else number
        self._offer(file_parcel(file, number, name or file.name, position_um, metadata, sidecars))

    def push_array(
        self,
        pixels: npt.ArrayLike,
        number: int | None = None,
        *,
        name: str = "",
        acquired: float = 0.0,
        position_um: tuple[float, ...] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Send pixels, (rows, columns) of whole or floating numbers.

        They are kept until they are acknowledged, so the array may be changed after the call.
        `acquired` is in UTC seconds; see `push_file` for the rest.

        Raises
        ------
        ValueError
            If it is not an image.
        PushError
            As `begin`.
        """
        array = image_array(pixels)
        self.begin()
        number = self.next_number() if number is None else number
        self._offer(array_parcel(array, number, name, acquired, position_um, metadata))

    def attend(self, seconds: float) -> None:
        """Wait so long, and meanwhile look after the connection."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._pump(min(SLICE_S, left))

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything is acknowledged; return whether it is."""
        return self._until(lambda: self._session.begun and not self._waiting(), timeout_s)

    def end(self) -> None:
        """Wait for all acknowledgements, then end the series.

        Raises
        ------
        PushError
            As `begin`.
        """
        asked: Session | None = None
        while not self._session.left:
            self._until(lambda: self._session.left or (self._session.begun and not self._waiting()))
            if asked is not self._session and not self._session.left:  # a daemon that came back is asked anew
                asked = self._session if self._session.link.send(Leave(end=True)) else None
            self._pump(SLICE_S)

    def close(self) -> None:
        """Disconnect. A series that was not ended stays open, and goes on with the next push of its name."""
        if self._closed:
            return
        self._closed = True
        session = self._session
        try:
            if session.begun and not session.left and not session.link.lost:
                deadline = time.monotonic() + PARTING_S
                self.flush(PARTING_S)
                if self._session is session and session.link.send(Leave(end=False)):
                    while not (session.left or session.link.lost) and time.monotonic() < deadline:
                        self._pump(SLICE_S)
        except PushError as error:
            log.info("while leaving: %s", error)
        finally:
            self._session.link.close()
            self._context.destroy(linger=0)

    # Sending.

    def _waiting(self) -> list[Parcel]:
        return [*self._on_the_way.values(), *self._backlog]

    def _offer(self, parcel: Parcel) -> None:
        head = parcel.head
        if self.has(head.fingerprint):
            self._settle(parcel, "held")
            return
        welcome = self._session.welcome
        reason = parcel.error(welcome.max_bytes) if welcome else ""
        if reason:
            self._settle(parcel, "refused", reason)
            return
        self._until(lambda: self._session.begun and not self._backlog and self._room())
        if not self._transmit(parcel):
            self._backlog.append(parcel)

    def _room(self) -> bool:
        welcome = self._session.welcome
        return welcome is not None and len(self._on_the_way) < welcome.window

    def _transmit(self, parcel: Parcel) -> bool:
        """Read and send an image; return False if it has to wait. Raises what reading it raises."""
        assert parcel.load is not None
        data = parcel.load()
        parcel.nbytes = len(data)
        self._id += 1
        head = msgspec.structs.replace(parcel.head, id=self._id, sha256=hashlib.sha256(data).digest())
        if not self._session.link.send(head, data):
            return False
        if not self._on_the_way:
            self._heard = time.monotonic()
        self._on_the_way[self._id] = parcel
        return True

    def _send_backlog(self) -> None:
        while self._backlog and self._session.begun and self._room():
            parcel = self._backlog[0]
            if self.has(parcel.head.fingerprint):
                self._settle(self._backlog.popleft(), "held")
                continue
            try:
                if not self._transmit(parcel):
                    return
            except OSError as error:
                self._settle(self._backlog.popleft(), "refused", f"cannot be read again: {error}")
                continue
            self._backlog.popleft()

    def _settle(self, parcel: Parcel, outcome: Outcome, reason: str = "") -> None:
        head = parcel.head
        parcel.outcome, parcel.reason = outcome, reason
        self.counts[outcome] += 1
        receipt = Receipt(head.number, head.name, outcome, reason, parcel.nbytes)
        if outcome in ("failed", "refused"):
            self.problems.append(receipt)
        if outcome != "refused":
            self._session.held.setdefault(head.fingerprint, head.number)
        if outcome in ("taken", "failed"):
            self._session.note(head.number, head.fingerprint)
            if head.form == "array":
                parcel.load = None
            self._delivered[head.fingerprint] = parcel
            if len(self._delivered) > DELIVERED:
                self._delivered.popitem(last=False)
        if self._acknowledged is not None:
            self._acknowledged(receipt)

    # The connection.

    def _until(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not done():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self._pump(SLICE_S)
        return True

    def _pump(self, wait_s: float) -> None:
        """Wait at most so long for something to arrive and deal with all that has."""
        session = self._session
        if self._alone_since is None:
            self._alone_since = time.monotonic()
        for message in session.link.receive(wait_s):
            self._heard = time.monotonic()
            self._stalled = False
            self._take(session, message)
            if session is not self._session:
                return
        if session.link.lost and not session.left:
            self._connect_anew("the daemon is gone: waiting for it")
        elif session.link.up and not session.greeted:
            session.greeted = session.link.send(Hello(VERSION, client_name()))
        self._send_backlog()
        self._complain()

    def _connect_anew(self, why: str) -> None:
        self._say(f"{self.address}: {why}")
        self._complained = True
        self._alone_since = time.monotonic()
        self._session.link.close()
        self._session = Session(Link(self._context, self.address))

    def _ask_turn(self) -> None:
        session = self._session
        session.held, session.numbers, session.highest = {}, {}, -1
        session.fresh = self._fresh
        # A series that goes on is asked for by its id, so that a series begun anew is not begun twice.
        series_id = "" if self._fresh else self.series_id
        session.link.send(Begin(self.series, self.first, series_id, self._fresh))

    def _take(self, session: Session, message: FromDaemon) -> None:
        match message:
            case Welcome():
                session.welcome = message
                if self._complained:
                    self._say(f"{self.address}: {message.program} answers")
                self._complained = False
                self._ask_turn()
            case Busy(series, client, ahead):
                what = f"series {series} of {client} is under way"
                self._say(f"{self.address}: busy, {what}: waiting for our turn ({ahead} to go before)")
            case Held(images):
                for image in images:
                    if image.current:
                        session.note(image.number, image.fingerprint)
                    if image.current or not self._again:
                        session.held.setdefault(image.fingerprint, image.number)
            case Begun():
                self._begun(session, message)
            case Ack(id, outcome, reason):
                parcel = self._on_the_way.pop(id, None)
                if parcel is not None:
                    self._settle(parcel, outcome, reason)
            case Left():
                session.left = True
            case Refused(reason, fatal):
                self._refused(session, reason, fatal)

    def _begun(self, session: Session, begun: Begun) -> None:
        session.begun = True
        self._fresh = False
        self.series_id, self.first, self.resumed = begun.series_id, begun.first, begun.resumed
        # What was on its way may have arrived; what had arrived may have been lost.
        parcels, self._on_the_way = list(self._on_the_way.values()), {}
        if session.fresh:
            self._delivered.clear()
        gone = [f for f in self._delivered if f not in session.held]
        for parcel in map(self._delivered.pop, gone):
            if parcel.load is None:
                self.lost += 1
                continue
            self.counts[parcel.outcome] -= 1
            self.problems = [p for p in self.problems if p.number != parcel.head.number]
            parcels.append(parcel)
        if self.lost:
            self._say(f"{self.address}: arrays that the daemon lost and that are not kept here: {self.lost}")
        if parcels:
            again = [parcel for parcel in parcels if parcel.head.fingerprint not in session.held]
            self._say(f"{self.address}: {len(again)} images are sent again")
        self._backlog.extendleft(reversed(parcels))

    def _refused(self, session: Session, reason: str, fatal: bool) -> None:
        if session.welcome is None or not fatal:
            raise PushError(f"{self.address} answers: {reason}")
        # It knew us and does so no more: we did not read its answers.
        self._connect_anew(f"the daemon says: {reason}; connecting again")

    def _complain(self) -> None:
        """Tell a person when nothing happens, and give up when patience ends."""
        session, now = self._session, time.monotonic()
        if session.welcome is not None:
            stalled = bool(self._on_the_way) and now - self._heard > STALL_S
            if stalled and not self._stalled:
                self._stalled = True
                self._say(
                    f"{self.address}: the daemon takes no images at present (is it overloaded?): waiting"
                )
            return
        alone_s = now - (self._alone_since or now)
        what = f"nothing answers at {self.address}"
        if session.link.strange:
            what = f"what answers at {self.address} is no image port of a daemon (source 'push')"
        if self._patience_s is not None and alone_s > self._patience_s:
            raise PushError(f"{what}; waited {self._patience_s:g} s")
        if alone_s > SILENCE_S and not self._complained:
            self._complained = True
            self._say(f"{what}: waiting")
