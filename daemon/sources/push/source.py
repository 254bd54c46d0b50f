"""Images that somebody pushes: ``grainwatch push``, or a program with `grainwatch.push.ImagePusher`.

A ROUTER socket; docs/reference/push.md has the protocol. An image is acknowledged after the daemon's
accounts took it: they do when the generator `events` is resumed. What the accounts have need not come
again, whoever was killed in between; an image that a crash lost is asked for again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import sqlite3
import time
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from daemon.flow.ranges import Ranges
from daemon.sources.base import Arrival, Bad, Event, Idle, SeriesEnd, SeriesStart, SourceContext
from daemon.sources.push.catalogue import Catalogue
from daemon.sources.push.desk import Desk, Incoming
from daemon.sources.push.reader import FileReader
from grainwatch import __version__
from grainwatch.config import ConfigError, Table
from grainwatch.push_wire import (
    DEFAULT_ADDRESS,
    HELD_AT_ONCE,
    SUFFIXES,
    VERSION,
    Ack,
    Begin,
    Begun,
    Held,
    HeldImage,
    ImageHead,
    Leave,
    Left,
    Outcome,
    Refused,
    Welcome,
    metadata_error,
)
from pipelines.frame import BadFrame
from pipelines.images import EncodedImage

log = logging.getLogger(__name__)

_POLL_MS: Final = 100
_SAY_S: Final = 1.0
_ADDRESS: Final = re.compile(r"tcp://(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):([0-9]{1,5}|\*)")
#: A number this far beyond the highest of its series is a mistake.
MAX_JUMP: Final = 1_000_000
#: Earlier series of a name whose images need not come again.
MAX_EARLIER: Final = 100

_Decoded: TypeAlias = tuple[EncodedImage, dict[str, Any]]


class Config(Table, frozen=True, kw_only=True):
    """``[streams.NAME.source]`` of type "push".

    Attributes
    ----------
    address : str
        "tcp://host:port" to listen at. "tcp://0.0.0.0:31110" lets other machines push: whoever reaches
        the port can send images, so do that only on a network of your own.
    formats : list of str
        Which files are taken, of "tiff" (with MarCCD), "edf", "cbf" and "npy", packed by gzip or bzip2
        or not; arrays always are. HDF5 never is: it may refer to other files of this machine.
    window : int
        How many images a sender may have on the way before the first is acknowledged.
    max_file_bytes : int
        A larger file, or array, is refused.
    max_image_bytes : int
        An image that takes more, unpacked, fails.
    read_timeout_s : float
        A file that takes longer to decode fails.
    remember_days : float
        How long a name is kept in mind whose images need not come again; no longer than
        `daemon.ledger_days` either.
    mixed : bool
        Images of a series may differ in size and type, as micrographs do; otherwise those fail that are
        not like the first.
    """

    address: str = DEFAULT_ADDRESS
    formats: tuple[str, ...] = tuple(SUFFIXES)
    window: int = 4
    max_file_bytes: int = 128 * 1024 * 1024
    max_image_bytes: int = 256 * 1024 * 1024
    read_timeout_s: float = 20.0
    remember_days: float = 90.0
    mixed: bool = False

    def __post_init__(self) -> None:
        found = _ADDRESS.fullmatch(self.address)
        if found is None or (found[2] != "*" and not 1 <= int(found[2]) <= 65535):
            raise ValueError(f"address: expected tcp://host:port, got {self.address!r}")
        unknown = [name for name in self.formats if name not in SUFFIXES]
        if unknown:
            why = " (it may refer to other files: copy them here)" if "hdf5" in unknown else ""
            raise ValueError(f"formats: {unknown[0]!r} is not one of {', '.join(SUFFIXES)}{why}")
        if not 1 <= self.window <= 1000:
            raise ValueError(f"window: expected 1 to 1000, got {self.window}")
        for key in ("max_file_bytes", "max_image_bytes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected 1 or more, got {getattr(self, key)}")
        for key in ("read_timeout_s", "remember_days"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: expected more than 0, got {getattr(self, key)}")


def open_source(config: Config, stream: str, context: SourceContext) -> PushSource:
    """Bind the socket and start the reader of files.

    Raises
    ------
    ConfigError
        If the address cannot be bound, or the catalogue in the state folder not be used.
    """
    return PushSource(config, stream, context)


@dataclass(slots=True)
class _Series:
    """The series of the sender that has the turn."""

    name: str
    id: str
    first: int
    resumed: bool
    numbers: Ranges = field(default_factory=Ranges)  # in the accounts, and not lost


class PushSource:
    """Implements `daemon.sources.base.Source`."""

    def __init__(self, config: Config, stream: str, context: SourceContext) -> None:
        self._config = config
        self._context = context
        self._closed = False
        self._series: _Series | None = None
        self._open = ""  # the series that the daemon has open through this source
        self._ended: set[str] = set()  # the ledger may not know yet, while frames are in flight
        self._said = 0.0
        where = f"streams.{stream}.source"
        welcome = Welcome(
            VERSION, stream, f"grainwatch {__version__}", config.window, config.max_file_bytes, config.formats
        )
        try:
            self._catalogue = Catalogue(context.state_dir / f"push-{stream}.sqlite", config.remember_days)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        try:
            self._desk = Desk(config.address, config.max_file_bytes, welcome, f"{where}.address")
        except ConfigError:
            self._catalogue.close()
            raise
        self._reader = FileReader(
            config.formats, config.max_file_bytes, config.max_image_bytes, config.read_timeout_s
        )

    @property
    def address(self) -> str:
        """Where it listens in fact: the port that was taken when the address ended in ``:*``."""
        return self._desk.address

    def events(self) -> Iterator[Event]:
        """Yield what arrives until the source is closed."""
        while not self._closed:
            incoming = self._desk.receive(_POLL_MS)
            if incoming is not None:
                yield from self._handle(incoming)
            granted = self._desk.next_turn()
            if granted is not None:
                self._grant(*granted)
            self._desk.probe_if_due()
            yield from self._say_unreadable()
            yield Idle()

    def describe(self) -> str:
        """Say where it listens and to how many."""
        desk = self._desk
        senders = f"{desk.senders} sender{'s' if desk.senders != 1 else ''}"
        senders += f", {desk.waiting} of them waiting" if desk.waiting else ""
        unreadable = f", {desk.unreadable} messages not understood" if desk.unreadable else ""
        return f"push, bound to {self._config.address}, {senders}{unreadable}"

    def close(self) -> None:
        """Close the socket, the reader and the catalogue."""
        self._closed = True
        self._desk.close()
        self._reader.close()
        self._catalogue.close()

    def _handle(self, incoming: Incoming) -> Iterator[Event]:
        match incoming.head:
            case Begin() as begin if self._desk.turn == incoming.sender:
                self._grant(incoming.sender, begin)
            case Begin() as begin:
                self._desk.ask(incoming.sender, begin, self._series.name if self._series else "")
            case ImageHead() as head:
                outcome, reason = yield from self._image(incoming.sender, head, incoming.data)
                self._desk.send(incoming.sender, Ack(head.id, outcome, reason[:2000]))
            case Leave(end):
                yield from self._leave(incoming.sender, end)

    def _say_unreadable(self) -> Iterator[Bad]:
        """Count what was not understood, but not each message of a flood by itself."""
        now = time.monotonic()
        if now - self._said < _SAY_S:
            return
        count, why = self._desk.take_unreadable()
        if count:
            self._said = now
            what = "a message that is" if count == 1 else f"{count} messages that are"
            yield Bad(f"{what} not understood: {why}", detector_series="")

    # Series.

    def _grant(self, sender: bytes, begin: Begin) -> None:
        """Give a sender the turn: choose its series, and say what of it is here."""
        try:
            series, held = self._choose(begin)
        except sqlite3.Error as error:
            log.error("the catalogue of pushed images cannot be read: %s", error)
            self._desk.send(sender, Refused(f"the daemon's catalogue cannot be read: {error}", fatal=True))
            self._desk.forget(sender)
            return
        for start in range(0, len(held), HELD_AT_ONCE):
            if not self._desk.send(sender, Held(tuple(held[start : start + HELD_AT_ONCE]))):
                return
        if self._desk.send(sender, Begun(series.id, series.first, series.resumed)):
            self._series = series
            log.debug("sender %s has the turn for series %s", self._desk.client(sender), series.id)

    def _choose(self, begin: Begin) -> tuple[_Series, list[HeldImage]]:
        known = self._catalogue.series_of(begin.series, MAX_EARLIER)
        candidate = begin.series_id or (known[0] if known else "")
        series = _Series(begin.series, f"push/{begin.series}/{uuid.uuid4().hex[:12]}", begin.first, False)
        held: list[HeldImage] = []
        for earlier in known:
            standing = self._context.standing(earlier)
            if standing is None:
                continue
            current = (
                earlier == candidate and standing.open and earlier not in self._ended and not begin.fresh
            )
            if current:
                first = self._catalogue.first(earlier)
                series = _Series(begin.series, earlier, first, True, standing.held)
            held += [
                HeldImage(number, fingerprint, current)
                for number, fingerprint in self._catalogue.images(earlier)
                if number in standing.held
            ]
        return series, held

    def _enter(self, series: _Series, client: str) -> Iterator[Event]:
        """Open the series with its first image, or go on with it."""
        if self._open and self._open != series.id:
            yield from self._end(self._open)
        if self._open != series.id:
            self._catalogue.add_series(series.id, series.name, series.first)
            if not series.resumed:
                metadata = {"name": series.name, "pushed_by": client}
                yield SeriesStart(series.id, first_frame=series.first, metadata=metadata)
            self._open = series.id

    def _end(self, series_id: str) -> Iterator[Event]:
        yield SeriesEnd(series_id)
        self._ended.add(series_id)
        self._open = "" if self._open == series_id else self._open

    def _leave(self, sender: bytes, end: bool) -> Iterator[Event]:
        series = self._series
        if self._desk.turn == sender and series is not None:
            if end and (series.resumed or self._open == series.id):
                yield from self._end(series.id)
            self._series = None
        self._desk.send(sender, Left())
        self._desk.forget(sender)

    # Images.

    def _image(
        self, sender: bytes, head: ImageHead, data: memoryview | None
    ) -> Generator[Event, None, tuple[Outcome, str]]:
        series = self._series
        if series is None or self._desk.turn != sender:
            return "refused", "no series was begun, or another sender has the turn"
        if data is None:
            return "refused", "the message has no second part with the image"
        reason = _head_error(head, series) or self._size_error(data.nbytes)
        if reason:
            return "refused", reason
        try:
            known = self._catalogue.find(series.id, head.number)
            if head.number in series.numbers:
                return _compare(head, known)
            if hashlib.sha256(data).digest() != head.sha256:
                return "refused", "arrived damaged: its sha256 is another one"
            decoded, failure = yield from self._decode(head, data)
            yield from self._enter(series, self._desk.client(sender))
            self._catalogue.add(series.id, head.number, head.fingerprint, head.name)
        except sqlite3.Error as error:
            log.error("the catalogue of pushed images cannot be written: %s", error)
            return "refused", f"the daemon's catalogue cannot be written: {error}"
        if decoded is None:
            yield Bad(failure, series.id, head.number)
        else:
            image, found = decoded
            yield Arrival(
                series.id,
                head.number,
                image,
                acquired=head.acquired,
                position_um=head.position_um,
                metadata=_metadata(head, found),
                mixed=self._config.mixed,
            )
        # Resumed: the accounts have it.
        series.numbers.add(head.number)
        return ("taken", "") if decoded is not None else ("failed", failure)

    def _decode(
        self, head: ImageHead, data: memoryview
    ) -> Generator[Event, None, tuple[_Decoded | None, str]]:
        try:
            if head.form == "file":
                return (yield from self._reader.read(head.name, data)), ""
            if len(head.shape) != 2:
                raise BadFrame(f"an array of {len(head.shape)} dimensions, an image has 2")
            rows, columns = head.shape
            limit = self._config.max_image_bytes
            return (EncodedImage(data, (rows, columns), head.dtype, max_bytes=limit), {}), ""
        except BadFrame as error:
            reason = str(error)
            return None, reason if head.name in reason else f"{head.name}: {reason}"

    def _size_error(self, size: int) -> str:
        limit = self._config.max_file_bytes
        return f"of {size} bytes, the limit is {limit} (max_file_bytes of the source)" if size > limit else ""


def _head_error(head: ImageHead, series: _Series) -> str:
    """Say what is wrong with what a sender says of an image."""
    highest = series.numbers.highest
    highest = series.first - 1 if highest is None else highest
    if head.number < series.first:
        return (
            f"number {head.number} is before the first of the series, {series.first}:"
            " begin the series with a lower one (--first)"
        )
    if head.number > max(highest, series.first) + MAX_JUMP:
        return f"number {head.number} makes no sense, expected {series.first} to about {highest + 1}"
    position = head.position_um
    if position is not None and not (1 <= len(position) <= 3 and all(map(math.isfinite, position))):
        return "position_um: expected 1 to 3 finite numbers"
    if not (math.isfinite(head.acquired) and math.isfinite(head.modified)):
        return "acquired and modified: expected finite numbers"
    return metadata_error(head.metadata, head.sidecars)


def _compare(head: ImageHead, known: tuple[bytes, str] | None) -> tuple[Outcome, str]:
    """Say what an image is whose number is in the accounts: the same, or another one."""
    # After a power cut the catalogue may know less than the ledger; a detector's numbers are trusted too.
    if known is None or known[0] == head.fingerprint:
        return "held", ""
    return (
        "refused",
        f"number {head.number} of this series is another image, {known[1]}:"
        " begin a new series (--again, or another --series)",
    )


def _metadata(head: ImageHead, found: dict[str, Any]) -> dict[str, Any]:
    metadata = {**found, **head.metadata, "file": head.name, "file_sha256": head.sha256.hex()}
    if head.modified:
        metadata["file_modified"] = head.modified
    if head.sidecars:
        metadata["sidecars"] = head.sidecars
    return metadata
