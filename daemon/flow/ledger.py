"""The frame accounts: every frame that was received ends in exactly one state.

At all times received = done + failed + dropped + lost + in flight, for each stream, series and
channel. The accounts live in memory; a thread writes what changed every 0.1 s in one
transaction, which holds a consistent state: after kill -9 the file lags by 0.1 s at most and
balances nevertheless.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

from daemon.flow.ledger_store import (
    COUNTERS,
    DONE,
    NO_SERIES,
    RECEIVED,
    Exceptional,
    LedgerStore,
    SeriesRow,
    unsettled,
)
from daemon.flow.ranges import Ranges
from daemon.sources.base import Standing
from grainwatch.messages import FrameKey

log = logging.getLogger(__name__)

End: TypeAlias = Literal["done", "failed", "dropped"]

FLUSH_S: Final = 0.1
#: How far sequence numbers jump after a crash, at most.
SEQ_AHEAD: Final = 1000
#: Ended series that stay in memory, so that late frames find their account.
REMEMBERED: Final = 32
#: Seconds between looks for series to forget.
FORGET_S: Final = 3600.0


class AccountError(RuntimeError):
    """A frame was ended that is not in flight: a defect of the daemon, never of a detector."""


@dataclass(slots=True, eq=False)
class _Account:
    """One channel of one series."""

    row: int
    counts: dict[str, int]
    received: Ranges = field(default_factory=Ranges)
    lost: Ranges = field(default_factory=Ranges)
    in_flight: set[int] = field(default_factory=set)
    new_received: Ranges = field(default_factory=Ranges)
    new_done: Ranges = field(default_factory=Ranges)
    new_exceptions: list[Exceptional] = field(default_factory=list)
    came_again: Ranges = field(default_factory=Ranges)

    def note(self, state: str, frame: int | None, beside: bool, reason: str, now: float) -> None:
        """Append an exception, or lengthen the last one by its neighbour."""
        last = self.new_exceptions[-1] if self.new_exceptions else None
        if (
            last is not None
            and frame is not None
            and last.last == frame - 1
            and (last.state, last.beside, last.reason) == (state, beside, reason)
        ):
            last.last = frame
            return
        self.new_exceptions.append(Exceptional(state, frame, frame, beside, reason, now))


@dataclass(slots=True, eq=False)
class Series:
    """A series in memory. `uid` "" collects what belongs to none; frames are missing only in `expected`."""

    row: int
    stream: str
    uid: str
    detector_series: str
    first_frame: int
    n_frames: int | None
    started: float
    accounts: dict[str, _Account] = field(default_factory=dict)
    expected: set[str] = field(default_factory=set)
    ending: bool = False
    suspended: bool = False
    complete: bool = False

    def highest(self) -> int:
        """Return the largest number that came on any channel."""
        came = [a.received.highest for a in self.accounts.values()]
        return max((h for h in came if h is not None), default=self.first_frame - 1)

    def missing_now(self, account: _Account) -> int:
        """Return how many numbers below the highest have not come (yet)."""
        return self.highest() + 1 - self.first_frame - len(account.received)

    def counts(self) -> dict[str, int]:
        """Return the sum over the channels, with `in_flight`."""
        total = dict.fromkeys((*COUNTERS, "in_flight"), 0)
        for channel, account in self.accounts.items():
            for name in COUNTERS:
                total[name] += account.counts[name]
            total["in_flight"] += len(account.in_flight)
            if not self.complete and channel in self.expected:
                total["missing"] += self.missing_now(account)
        return total


class Ledger:
    """The accounts of all streams. Safe between threads.

    Parameters
    ----------
    path : Path
        The SQLite file.
    keep_days : float
        How long an ended series is remembered.
    """

    def __init__(self, path: Path, keep_days: float = 90.0) -> None:
        self._store = LedgerStore(path)
        self._keep_s = keep_days * 86400.0
        self._lock = threading.Lock()  # the accounts in memory
        self._disk = threading.Lock()  # the file; taken before the other where both are
        self._series: dict[tuple[str, str], Series] = {}
        self._ended: deque[Series] = deque()
        self._forgotten: dict[str, dict[str, int]] = {}
        self._completed: list[Series] = []
        self._to_close: list[tuple[int, float]] = []
        self._dirty: set[_Account] = set()
        self._seq = self._reserved = self._store.meta("seq", 0)
        self._fault = ""
        self._next_forget = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="ledger", daemon=True)

    def start(self) -> None:
        """Start the thread that writes."""
        self._thread.start()

    def close(self) -> None:
        """Write what is left, give back unused sequence numbers and close the file."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._disk:
            self._flush()
            if not self._fault:
                self._store.set_meta_durably("seq", self._seq)
            self._store.close()

    @property
    def fault(self) -> str:
        """Why the file cannot be written at present, "" when it can."""
        return self._fault

    # Series.

    def recover(self) -> list[Series]:
        """Settle what a daemon that died left behind; return the series that are still open.

        Frames that were received and have no end are lost. Numbers that were given up as missing
        by an orderly stop may still come.
        """
        now = time.time()
        with self._disk, self._lock:
            self._store.begin()
            opened = [self._recover_series(row, now) for row in reversed(self._store.series(only_open=True))]
            self._store.commit()
        return opened

    def open_series(
        self,
        stream: str,
        detector_series: str,
        first_frame: int,
        n_frames: int | None,
        channels: Iterable[str],
        started: float,
    ) -> Series:
        """Write a new series, with a uid of its own because detectors reuse their numbers."""
        uid = uuid.uuid4().hex
        with self._disk, self._lock:
            row = self._store.add_series(stream, uid, detector_series, first_frame, n_frames, started)
            series = Series(row, stream, uid, detector_series, first_frame, n_frames, started)
            for channel in channels:
                series.accounts[channel] = self._new_account(row, channel)
            series.expected = set(series.accounts)
            self._series[stream, uid] = series
        return series

    def end_series(self, series: Series, suspend: bool = False) -> None:
        """Say that no more frames of a series will come: with its last frame it is complete.

        `suspend` is for the stop of the daemon in mid-series: the accounts are closed, but the
        series stays open in the file and may go on after a restart.
        """
        with self._lock:
            series.ending = True
            series.suspended = suspend
            self._complete_if_settled(series)

    def take_completed(self) -> list[Series]:
        """Return the series that became complete since the last call."""
        with self._lock:
            completed, self._completed = self._completed, []
        return completed

    def set_results_file(self, uid: str, path: Path) -> None:
        """Note where the results of a series are: the latest part, the others lie beside it."""
        with self._disk:
            self._store.set_results_file(uid, str(path.absolute()))

    def results_file(self, uid: str) -> Path | None:
        """Return where the results of a series are, if somebody wrote them."""
        with self._disk:
            name = self._store.results_file(uid)
        return Path(name) if name else None

    # Frames.

    def whether_new(self, series: Series, channel: str, frame: int) -> Literal["new", "repeated", "lost"]:
        """Say whether a number comes for the first time, again, or again after it was lost."""
        with self._lock:
            account = series.accounts.get(channel)
            if account is None or frame not in account.received:
                return "new"
            return "lost" if frame in account.lost else "repeated"

    def received(self, series: Series, channel: str, frame: int) -> None:
        """Note a frame; it is in flight until `end`. One that was lost is taken back into flight."""
        account = self._account(series, channel)
        with self._lock:
            if account.lost.remove(frame):
                account.counts["lost"] -= 1
                account.came_again.add(frame)
            else:
                if not account.received.add(frame):
                    raise AccountError(f"frame {frame} of series {series.uid} was received before")
                account.counts["received"] += 1
                account.new_received.add(frame)
            account.in_flight.add(frame)
            self._dirty.add(account)

    def end(self, key: FrameKey, state: End, reason: str = "") -> None:
        """Note how a frame in flight ended.

        Raises
        ------
        AccountError
            If it is not in flight.
        """
        with self._lock:
            series = self._series.get((key.source, key.series_uid))
            account = series.accounts.get(key.channel) if series is not None else None
            if series is None or account is None or key.frame not in account.in_flight:
                raise AccountError(f"frame {key.frame} of series {key.series_uid} is not in flight")
            account.in_flight.remove(key.frame)
            account.counts[state] += 1
            if state == "done":
                account.new_done.add(key.frame)
            else:
                account.note(state, key.frame, False, reason, time.time())
            self._dirty.add(account)
            if series.ending:
                self._complete_if_settled(series)

    def beside(self, series: Series, channel: str, frame: int | None, state: End, reason: str) -> None:
        """Note an arrival that ends at once and is no frame of its own.

        Such are a repeat, a late image, a message without a number. One of a channel that has no
        account counts in that of the first channel.
        """
        known = channel if channel in series.accounts else next(iter(series.accounts), "")
        account = self._account(series, known)
        with self._lock:
            account.counts["received"] += 1
            account.counts[state] += 1
            account.note(state, frame, True, reason, time.time())
            self._dirty.add(account)

    def no_series(self, stream: str) -> Series:
        """Return where messages of a stream are counted that belong to no series."""
        with self._disk, self._lock:
            series = self._series.get((stream, ""))
            if series is None:
                now = time.time()
                row = self._store.add_series(stream, f"{NO_SERIES}{uuid.uuid4().hex}", "", 0, None, now)
                self._store.set_ended(row, now)
                series = self._series[stream, ""] = Series(row, stream, "", "", 0, None, now)
        return series

    # Sequence numbers.

    def next_seq(self) -> int:
        """Return the next sequence number: larger than any before, also of a daemon that was killed.

        Numbers are reserved on disk ahead of their use.
        """
        with self._lock:
            if self._seq < self._reserved:
                self._seq += 1
                return self._seq
        with self._disk:
            try:
                self._reserve()
            except sqlite3.Error as error:
                # Results matter more than what a crash would do to their numbers.
                self._say_fault(error)
                self._reserved = self._seq + SEQ_AHEAD
        return self.next_seq()

    def _reserve(self) -> None:
        """Reserve ahead, when half is used. The lock of the file is held."""
        ahead = self._seq + SEQ_AHEAD
        if self._reserved - self._seq <= SEQ_AHEAD // 2:
            self._store.set_meta_durably("seq", ahead)
            self._reserved = ahead

    # Questions.

    def totals(self, stream: str) -> dict[str, int]:
        """Return the counters of a stream, with `in_flight`.

        They sum up the series that were open when the daemon started and all since.
        """
        with self._lock:
            total = dict(self._forgotten.get(stream, dict.fromkeys((*COUNTERS, "in_flight"), 0)))
            for series in self._series.values():
                if series.stream == stream:
                    for name, n in series.counts().items():
                        total[name] += n
        return total

    def standing(self, stream: str, detector_series: str) -> Standing | None:
        """Return how the latest series of that name stands, None if there is none."""
        with self._disk:
            self._flush()
            return self._store.standing(stream, detector_series)

    def balance(self) -> list[str]:
        """Return what does not balance in the accounts, one line each: an empty list."""
        wrong = []
        with self._lock:
            for series in self._series.values():
                for channel, account in series.accounts.items():
                    c = account.counts
                    ends = c["done"] + c["failed"] + c["dropped"] + c["lost"] + len(account.in_flight)
                    if c["received"] != ends:
                        at = f"{series.stream} {series.uid} {channel!r}"
                        wrong.append(f"{at}: received {c['received']}, settled {ends}")
        return wrong

    def latest(self, limit: int) -> list[tuple[SeriesRow, dict[str, int]]]:
        """Return the latest series with their counters as the file has them."""
        with self._disk:
            found = []
            for row in self._store.series(limit=limit):
                counts = [account.counts for account in self._store.accounts(row.row)]
                found.append((row, {name: sum(c[name] for c in counts) for name in COUNTERS}))
        return found

    # Inside.

    def _account(self, series: Series, channel: str) -> _Account:
        account = series.accounts.get(channel)
        if account is None:
            with self._disk, self._lock:
                account = series.accounts[channel] = self._new_account(series.row, channel)
        return account

    def _new_account(self, series_row: int, channel: str) -> _Account:
        return _Account(self._store.add_account(series_row, channel), dict.fromkeys(COUNTERS, 0))

    def _recover_series(self, row: SeriesRow, now: float) -> Series:
        series = Series(
            row.row, row.stream, row.uid, row.detector_series, row.first_frame, row.n_frames, row.started
        )
        for found in self._store.accounts(row.row):
            account = _Account(found.row, dict(found.counts))
            account.counts["missing"] = 0
            self._store.drop_missing(found.row)
            died = unsettled(self._store, found.row)
            rows = [Exceptional("lost", a, b, False, "the daemon died", now) for a, b in died]
            self._store.add_exceptions(found.row, rows)
            account.counts["lost"] += len(died)
            self._store.set_counts(found.row, account.counts)
            account.received = self._store.ranges(found.row, RECEIVED)
            for e in self._store.exceptions(found.row):
                if e.state == "lost" and e.first is not None and e.last is not None:
                    account.lost.add_range(e.first, e.last)
            series.accounts[found.channel] = account
        series.expected = set(series.accounts)  # the file does not say which were announced
        self._series[row.stream, row.uid] = series
        return series

    def _complete_if_settled(self, series: Series) -> None:
        """Count what is missing once nothing of an ending series is in flight. The lock is held."""
        if series.complete or any(a.in_flight for a in series.accounts.values()):
            return
        last = series.highest()
        if series.n_frames is not None and not series.suspended:
            last = max(last, series.first_frame + series.n_frames - 1)
        now = time.time()
        for channel, account in series.accounts.items():
            if channel not in series.expected:
                continue
            gaps = account.received.gaps(series.first_frame, last)
            account.counts["missing"] = len(gaps)
            why = "a gap in the numbering"
            account.new_exceptions += [Exceptional("missing", a, b, False, why, now) for a, b in gaps]
            self._dirty.add(account)
        series.complete = True
        self._completed.append(series)
        if not series.suspended:
            self._to_close.append((series.row, now))
        self._ended.append(series)
        while len(self._ended) > REMEMBERED:
            old = self._ended.popleft()
            del self._series[old.stream, old.uid]
            total = self._forgotten.setdefault(old.stream, dict.fromkeys((*COUNTERS, "in_flight"), 0))
            for name, n in old.counts().items():
                total[name] += n

    def _keep_writing(self) -> None:
        while not self._stop.wait(FLUSH_S):
            with self._disk:
                self._flush()

    def _flush(self) -> None:
        """Write what changed, in one transaction. The lock of the file is held."""
        with self._lock:
            batch = [(a, dict(a.counts), *_take_new(a)) for a in self._dirty]
            self._dirty = set()
            to_close, self._to_close = self._to_close, []
            # What is in memory may still get arrivals, however long ago it ended.
            keep = {series.row for series in self._series.values()}
        forget = time.monotonic() >= self._next_forget
        try:
            self._reserve()
            if not batch and not to_close and not forget:
                return
            self._store.begin()
            for account, counts, received, done, again, exceptions in batch:
                self._store.set_counts(account.row, counts)
                self._store.add_ranges(account.row, RECEIVED, received)
                self._store.take_back(account.row, "lost", again)
                self._store.add_ranges(account.row, DONE, done)
                self._store.add_exceptions(account.row, exceptions)
            for row, ended in to_close:
                self._store.set_ended(row, ended)
            if forget:
                self._store.forget(time.time() - self._keep_s, keep)
            self._store.commit()
        except sqlite3.Error as error:
            self._put_back(batch, to_close)
            self._say_fault(error)
            return
        if forget:
            self._next_forget = time.monotonic() + FORGET_S
        if self._fault:
            log.warning("the ledger %s can be written again", self._store.path)
            self._fault = ""

    def _say_fault(self, error: sqlite3.Error) -> None:
        if not self._fault:
            log.error("the ledger %s cannot be written: %s; trying on", self._store.path, error)
        self._fault = f"the ledger cannot be written: {error}"

    def _put_back(self, batch: list[_Change], to_close: list[tuple[int, float]]) -> None:
        self._store.rollback()
        with self._lock:
            for account, _, received, done, again, exceptions in batch:
                mine = account.new_received, account.new_done, account.came_again
                for kept, news in zip(mine, (received, done, again), strict=True):
                    for a, b in news:
                        kept.add_range(a, b)
                account.new_exceptions[:0] = exceptions
                self._dirty.add(account)
            self._to_close[:0] = to_close


_Change: TypeAlias = tuple[_Account, dict[str, int], Ranges, Ranges, Ranges, list[Exceptional]]


def _take_new(account: _Account) -> tuple[Ranges, Ranges, Ranges, list[Exceptional]]:
    taken = account.new_received, account.new_done, account.came_again, account.new_exceptions
    account.new_received, account.new_done, account.came_again = Ranges(), Ranges(), Ranges()
    account.new_exceptions = []
    return taken
