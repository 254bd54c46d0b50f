from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from testkit.process import eventually

from daemon.flow.ledger import SEQ_AHEAD, AccountError, Ledger, Series
from daemon.flow.ledger_store import LedgerStore, audit
from grainwatch.config import ConfigError
from grainwatch.messages import FrameKey


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def opened(ledger: Ledger, n_frames: int | None = None, channels: tuple[str, ...] = ("",)) -> Series:
    return ledger.open_series("s", "1/a", 0, n_frames, channels, time.time())


def key(series: Series, frame: int, channel: str = "") -> FrameKey:
    return FrameKey(series.stream, series.uid, frame, channel)


def exceptions(path: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as db:
        return db.execute("SELECT state, first, last, beside, reason FROM exceptions ORDER BY id").fetchall()


def rows(path: Path, table: str) -> int:
    with sqlite3.connect(path) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_a_series_from_start_to_end(path: Path) -> None:
    ledger = Ledger(path)
    series = opened(ledger, n_frames=10)
    for n in (0, 1, 2, 5, 4, 7):
        ledger.received(series, "", n)
    for n in (1, 0, 5, 7):
        ledger.end(key(series, n), "done")
    ledger.end(key(series, 2), "failed", "all zero")
    ledger.beside(series, "", 5, "dropped", "repeated")
    ledger.end_series(series)
    assert ledger.take_completed() == []
    assert ledger.totals("s")["in_flight"] == 1
    ledger.end(key(series, 4), "dropped", "full")
    assert ledger.take_completed() == [series]
    assert series.counts() == {
        "received": 7, "done": 4, "failed": 1, "dropped": 2, "lost": 0, "missing": 4, "in_flight": 0
    }  # fmt: skip
    assert ledger.balance() == []
    ledger.close()
    assert audit(path) == []
    assert ("missing", 8, 9, 0, "a gap in the numbering") in exceptions(path)
    assert ("dropped", 5, 5, 1, "repeated") in exceptions(path)


def test_done_and_dropped_frames_cost_few_rows(path: Path) -> None:
    ledger = Ledger(path)
    series = opened(ledger)
    for n in range(10_000):
        ledger.received(series, "", n)
    for n in range(5000):
        ledger.end(key(series, n), "done")
    for n in range(5000, 10_000):
        ledger.end(key(series, n), "dropped", "full")
    ledger.close()
    assert rows(path, "ranges") == 2
    assert rows(path, "exceptions") == 1
    assert audit(path) == []


def test_a_frame_ends_once(path: Path) -> None:
    ledger = Ledger(path)
    series = opened(ledger)
    ledger.received(series, "", 0)
    with pytest.raises(AccountError, match="received before"):
        ledger.received(series, "", 0)
    ledger.end(key(series, 0), "done")
    with pytest.raises(AccountError, match="not in flight"):
        ledger.end(key(series, 0), "failed", "x")
    with pytest.raises(AccountError, match="not in flight"):
        ledger.end(FrameKey("s", "unknown", 0), "done")
    ledger.close()


def test_channels_have_their_own_accounts(path: Path) -> None:
    ledger = Ledger(path)
    series = opened(ledger, channels=("low", "high"))
    for n in range(5):
        ledger.received(series, "low", n)
        ledger.end(key(series, n, "low"), "done")
    ledger.received(series, "high", 4)
    ledger.end(key(series, 4, "high"), "done")
    assert ledger.totals("s")["missing"] == 4
    ledger.end_series(series)
    ledger.close()
    assert audit(path) == []
    store = LedgerStore(path)
    assert [(a.channel, a.counts["missing"]) for a in store.accounts(series.row)] == [("low", 0), ("high", 4)]
    store.close()


def test_what_was_in_flight_when_the_daemon_died_is_lost(path: Path) -> None:
    dead = Ledger(path)
    series = opened(dead)
    for n in range(8):
        dead.received(series, "", n)
    for n in (0, 1, 2, 5):
        dead.end(key(series, n), "done")
    dead.end(key(series, 3), "failed", "bad")
    dead._flush()  # what the thread does every 0.1 s; then it is gone

    ledger = Ledger(path)
    (again,) = ledger.recover()
    assert (again.uid, again.detector_series, again.counts()["lost"]) == (series.uid, "1/a", 3)
    assert audit(path) == []
    assert ("lost", 6, 7, 0, "the daemon died") in exceptions(path)
    # The series goes on: a gap, a frame that was lost and comes again, one that was done.
    assert [ledger.whether_new(again, "", n) for n in (12, 6, 5)] == ["new", "lost", "repeated"]
    ledger.received(again, "", 12)
    ledger.received(again, "", 6)
    assert ledger.totals("s") == {
        "received": 9, "done": 4, "failed": 1, "dropped": 0, "lost": 2, "missing": 4, "in_flight": 2
    }  # fmt: skip
    ledger.end(key(again, 6), "done")
    ledger.end(key(again, 12), "done")
    ledger.end_series(again)
    ledger.close()
    assert audit(path) == []
    assert again.counts()["missing"] == 4
    assert Ledger(path).recover() == []


def test_a_frame_that_was_lost_twice_is_lost_once(path: Path) -> None:
    first = Ledger(path)
    series = opened(first)
    first.received(series, "", 0)
    first._flush()
    second = Ledger(path)
    (again,) = second.recover()
    second.received(again, "", 0)
    second._flush()
    third = Ledger(path)
    assert third.recover()[0].counts()["lost"] == 1
    assert audit(path) == []
    third.close()


def test_an_orderly_stop_in_mid_series_lets_it_go_on(path: Path) -> None:
    ledger = Ledger(path)
    series = opened(ledger, n_frames=100)
    for n in (0, 1, 4):
        ledger.received(series, "", n)
        ledger.end(key(series, n), "done")
    ledger.end_series(series, suspend=True)
    assert ledger.take_completed() == [series]
    assert series.counts()["missing"] == 2  # not the 95 that were not due yet
    ledger.close()
    assert audit(path) == []
    ledger = Ledger(path)
    (again,) = ledger.recover()
    ledger.received(again, "", 2)
    ledger.end(key(again, 2), "done")
    ledger.end_series(again)
    ledger.close()
    assert again.counts()["missing"] == 96
    assert audit(path) == []


def test_messages_of_no_series_are_counted(path: Path) -> None:
    ledger = Ledger(path)
    ledger.beside(ledger.no_series("s"), "", None, "failed", "garbage")
    ledger.beside(ledger.no_series("s"), "", 7, "failed", "did not start")
    assert ledger.totals("s")["failed"] == 2
    ledger.close()
    assert audit(path) == []
    again = Ledger(path)
    assert again.recover() == []
    again.beside(again.no_series("s"), "", None, "failed", "garbage")
    again.close()
    assert audit(path) == []


def test_seq_never_goes_back_and_jumps_little(path: Path) -> None:
    ledger = Ledger(path)
    first = [ledger.next_seq() for _ in range(2500)]
    assert first == list(range(1, 2501))
    after_crash = Ledger(path)
    jumped = after_crash.next_seq()
    assert 2500 < jumped <= 2500 + SEQ_AHEAD + 1
    after_crash.close()
    after_stop = Ledger(path)
    assert after_stop.next_seq() == jumped + 1
    after_stop.close()


def test_old_series_are_forgotten(path: Path) -> None:
    ledger = Ledger(path, keep_days=1.0)
    old, new, still_open = opened(ledger), opened(ledger), opened(ledger)
    for series in (old, new, still_open):
        ledger.received(series, "", 0)
        ledger.end(key(series, 0), "failed", "x")
    ledger.end_series(old)
    ledger.end_series(new)
    ledger.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE series SET ended = ended - 100000 WHERE uid = ?", (old.uid,))
    ledger = Ledger(path, keep_days=1.0)
    ledger.close()
    store = LedgerStore(path)
    assert {s.uid for s in store.series()} == {new.uid, still_open.uid}
    store.close()
    assert rows(path, "exceptions") == rows(path, "accounts") == 2
    assert audit(path) == []


def test_what_may_still_get_arrivals_is_not_forgotten_however_old(path: Path) -> None:
    ledger = Ledger(path, keep_days=1.0)
    stray = ledger.no_series("s")
    ledger.beside(stray, "", None, "failed", "garbage")
    ledger._flush()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE series SET ended = ended - 100000")
    ledger._next_forget = 0.0
    ledger.beside(ledger.no_series("s"), "", None, "failed", "more garbage")
    ledger.close()
    assert rows(path, "accounts") == 1
    assert audit(path) == []


def test_the_memory_of_ended_series_is_bounded_and_their_counts_stay(path: Path) -> None:
    ledger = Ledger(path)
    for _ in range(100):
        series = opened(ledger)
        ledger.received(series, "", 0)
        ledger.end(key(series, 0), "done")
        ledger.end_series(series)
    assert len(ledger._series) < 40
    assert ledger.totals("s")["done"] == 100
    ledger.close()


def test_a_file_that_cannot_be_written_costs_nothing_in_memory_and_is_made_up_for(path: Path) -> None:
    ledger = Ledger(path)
    series = opened(ledger)
    other = sqlite3.connect(path, isolation_level=None)
    ledger._store._db.execute("PRAGMA busy_timeout = 10")
    other.execute("BEGIN IMMEDIATE")
    for n in range(100):
        ledger.received(series, "", n)
        ledger.end(key(series, n), "done" if n % 3 else "dropped", "full")
        if n % 20 == 0:
            ledger._flush()
    assert "cannot be written" in ledger.fault
    assert ledger.next_seq() == 1
    other.execute("ROLLBACK")
    other.close()
    ledger._flush()
    assert ledger.fault == ""
    ledger.close()
    assert audit(path) == []


def test_a_file_that_is_no_ledger_is_named(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be taken for one" * 30)
    with pytest.raises(ConfigError, match=r"ledger\.sqlite cannot be used"):
        Ledger(path)


def test_the_audit_sees_what_is_wrong(path: Path) -> None:
    ledger = Ledger(path)
    series = opened(ledger)
    for n in range(5):
        ledger.received(series, "", n)
        ledger.end(key(series, n), "done")
    ledger.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE accounts SET done = 4")
        db.execute("UPDATE ranges SET last = 7 WHERE kind = 1")
    found = "\n".join(audit(path))
    assert "done: counted 4, the frames say 8" in found
    assert "never received" in found


_KILLED = """
import sys, time
from pathlib import Path
from daemon.flow.ledger import Ledger
from grainwatch.messages import FrameKey
ledger = Ledger(Path(sys.argv[1])); ledger.start()
series = ledger.open_series("s", "1/a", 0, None, ("",), time.time())
print(series.uid, flush=True)
n = 0
while True:
    ledger.received(series, "", n)
    if n >= 20:
        ledger.end(FrameKey("s", series.uid, n - 20), ("done", "failed", "dropped")[n // 7 % 3], "why")
    ledger.next_seq()
    n += 1
    time.sleep(0.0002)
"""


def written(path: Path) -> int:
    """How many frames the file has as received."""
    with closing(sqlite3.connect(path)) as db:
        (found,) = db.execute("SELECT sum(received) FROM accounts").fetchone()
    return int(found or 0)


@pytest.mark.system
def test_killed_at_any_moment_the_file_balances(path: Path) -> None:
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        before = written(path)
        eventually(lambda least=before + 100: written(path) > least)
        time.sleep(0.05 + 0.04 * attempt)
        process.kill()
        process.wait()
        process.stdout.close()
        assert audit(path) == []
        ledger = Ledger(path)
        (series,) = ledger.recover()
        counts = series.counts()
        assert counts["received"] > 100
        assert counts["lost"] >= 20
        assert counts["in_flight"] == 0
        ledger.end_series(series)
        ledger.close()
        assert audit(path) == []


class LedgerLife(RuleBasedStateMachine):
    """A ledger through receptions, ends, deaths and restarts, beside a model that is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "ledger.sqlite"
        self.ledger = Ledger(self.path)
        self.series = opened(self.ledger)
        self.state: dict[int, str] = {}
        self.repeats = 0

    @rule(frame=st.integers(0, 30))
    def receive(self, frame: int) -> None:
        new = self.ledger.whether_new(self.series, "", frame)
        known = self.state.get(frame)
        assert new == {None: "new", "lost": "lost"}.get(known, "repeated")
        if new == "repeated":
            self.ledger.beside(self.series, "", frame, "dropped", "repeated")
            self.repeats += 1
        else:
            self.ledger.received(self.series, "", frame)
            self.state[frame] = "in_flight"

    @rule(state=st.sampled_from(["done", "failed", "dropped"]), which=st.integers(0, 100))
    def end(self, state: Any, which: int) -> None:
        flying = [n for n, s in self.state.items() if s == "in_flight"]
        if flying:
            frame = flying[which % len(flying)]
            self.ledger.end(key(self.series, frame), state, "why")
            self.state[frame] = state

    @rule()
    def flush(self) -> None:
        self.ledger._flush()
        assert audit(self.path) == []

    @rule()
    def die(self) -> None:
        self.ledger._flush()
        self.ledger._store.close()
        self.state = {n: "lost" if s == "in_flight" else s for n, s in self.state.items()}
        self.ledger = Ledger(self.path)
        (self.series,) = self.ledger.recover()
        assert audit(self.path) == []

    @invariant()
    def counts_agree(self) -> None:
        counts = self.series.counts()
        states = list(self.state.values())
        for state in ("done", "failed", "lost", "in_flight"):
            assert counts[state] == states.count(state)
        assert counts["dropped"] == states.count("dropped") + self.repeats
        assert counts["received"] == len(states) + self.repeats
        assert counts["missing"] == max(self.state, default=-1) + 1 - len(states)
        assert self.ledger.balance() == []

    def teardown(self) -> None:
        self.ledger.end_series(self.series)
        self.ledger.close()
        assert audit(self.path) == []
        shutil.rmtree(self.folder)


TestLedgerLife = LedgerLife.TestCase
TestLedgerLife.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_threads_share_a_ledger(path: Path) -> None:
    ledger = Ledger(path)
    ledger.start()
    series = opened(ledger)
    seqs: list[list[int]] = [[] for _ in range(3)]

    def work(part: int) -> None:
        for n in range(part, 900, 3):
            ledger.received(series, "", n)
            seqs[part].append(ledger.next_seq())
            ledger.end(key(series, n), "done")

    threads = [threading.Thread(target=work, args=(p,)) for p in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.close()
    assert series.counts()["done"] == 900
    assert len(set(itertools.chain(*seqs))) == 900
    assert audit(path) == []
    assert os.path.getsize(path) < 1_000_000


def test_how_a_series_stands(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.standing("s", "1/a") is None
    series = opened(ledger)
    for n in (0, 1, 2, 4):
        ledger.received(series, "", n)
    for n in (0, 1):
        ledger.end(key(series, n), "done")
    ledger.end(key(series, 2), "failed", "all zero")
    ledger.beside(series, "", 9, "failed", "makes no sense")
    now = ledger.standing("s", "1/a")
    assert now is not None
    assert (now.open, list(now.held)) == (True, [(0, 2), (4, 4)])
    assert ledger.standing("t", "1/a") is None
    ledger.close()  # as if killed: frame 4 has no end

    ledger = Ledger(path)
    (series,) = ledger.recover()
    after = ledger.standing("s", "1/a")
    assert after is not None
    assert (after.open, list(after.held)) == (True, [(0, 2)])
    ledger.received(series, "", 4)
    ledger.end(key(series, 4), "done")
    ledger.end_series(series)
    ended = ledger.standing("s", "1/a")
    assert ended is not None
    assert (ended.open, list(ended.held)) == (False, [(0, 2), (4, 4)])
    ledger.close()
