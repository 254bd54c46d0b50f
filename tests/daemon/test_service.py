"""What is told to a service manager, and when a part counts as hung."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from testkit.process import eventually
from testkit.service_manager import ServiceManager

from daemon.logs import JournalFormatter, goes_to_journal
from daemon.service import Notifier, Service
from daemon.watchdog import Part, Watchdog


@pytest.mark.parametrize("abstract", [False, True])
def test_a_message_arrives_with_all_its_fields(tmp_path: Path, abstract: bool) -> None:
    with ServiceManager(tmp_path, abstract=abstract) as manager:
        Notifier(manager.address).send(READY=1, STATUS="runs: 12.0 frames/s = well")
        (message,) = eventually(lambda: manager.messages)
    assert message.fields == {"READY": "1", "STATUS": "runs: 12.0 frames/s = well"}


def test_a_manager_that_is_gone_is_said_once_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(str(tmp_path / "nobody"))
    for _ in range(3):
        notifier.send(WATCHDOG=1)
    (record,) = caplog.records
    assert "the service manager cannot be told (NOTIFY_SOCKET)" in record.getMessage()


def test_an_address_of_another_kind_is_said(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier("vsock:2:1234")
    notifier.send(READY=1)
    assert not notifier.enabled
    assert "NOTIFY_SOCKET=vsock:2:1234 is neither a path nor an abstract socket" in caplog.text


@pytest.mark.parametrize(
    ("environment", "pings"),
    [
        ({}, False),
        ({"WATCHDOG_USEC": "8000000"}, True),
        ({"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": str(os.getpid())}, True),
        # It is meant for somebody else who left it in the environment.
        ({"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "1"}, False),
        ({"WATCHDOG_USEC": "soon"}, False),
        ({"WATCHDOG_USEC": "0"}, False),
    ],
)
def test_the_watchdog_is_served_when_it_is_asked_for(
    tmp_path: Path, environment: dict[str, str], pings: bool
) -> None:
    with ServiceManager(tmp_path) as manager:
        given_ = {"NOTIFY_SOCKET": manager.address, **environment, "HOME": "/"}
        service = Service.of_environment(given_)
        assert given_ == {"HOME": "/"}, "what is started later must not speak for the daemon"
        service.begin(10.0)
        service.ready(Still())
        eventually(lambda: len(manager.having("STATUS")) >= 2)
        if pings:
            eventually(lambda: manager.having("WATCHDOG"))
        service.end()
    assert bool(manager.having("WATCHDOG")) == pings


def test_a_reload_is_extended_like_a_start(tmp_path: Path) -> None:
    with ServiceManager(tmp_path) as manager:
        service = Service(Notifier(manager.address), 1.0)
        service.begin(0.0)
        service.ready(Still())
        eventually(lambda: len(manager.having("WATCHDOG")) >= 3)
        assert manager.having("EXTEND_TIMEOUT_USEC") == []
        service.reloading()
        eventually(lambda: len(manager.having("EXTEND_TIMEOUT_USEC")) >= 2)
        service.ready(Still())
        (*_, ready) = eventually(lambda: manager.having("READY", since=manager.having("RELOADING")[0].at))
        eventually(lambda: len(manager.having("WATCHDOG", since=ready.at)) >= 4)
        service.end()
        # One may have been on its way.
        assert len(manager.having("EXTEND_TIMEOUT_USEC", since=ready.at)) <= 1


class Still:
    """A daemon that has nothing to do, and says something else each time."""

    said = 0

    def parts(self) -> list[Part]:
        return [Part("the source of s", 0, waits=True)]

    def status_line(self) -> str:
        self.said += 1
        return f"line\n{self.said} " + "x" * 1000


def test_a_line_is_one_line_and_short(tmp_path: Path) -> None:
    with ServiceManager(tmp_path) as manager:
        service = Service(Notifier(manager.address), None)
        service.ready(Still())
        (message,) = eventually(lambda: manager.messages)
    assert message.fields["STATUS"].startswith("line 1 xxx")
    assert len(message.fields["STATUS"]) == 500


# Hung or not.


def test_a_part_that_stands_still_hangs_after_the_limit_and_moves_again() -> None:
    watchdog = Watchdog(10.0)
    marks = {"a": 0, "b": 0}

    def look(now: float) -> dict[str, float]:
        return watchdog.hung([Part(name, mark) for name, mark in marks.items()], now)

    assert look(100.0) == {}
    marks["b"] = 1
    assert look(109.0) == {}
    assert look(110.5) == {"a": 10.5}
    assert look(119.5) == {"a": 19.5, "b": 10.5}
    marks["a"] = 7
    assert look(120.0) == {"b": 11.0}


def test_a_part_that_waits_does_not_hang_and_its_time_begins_when_it_waits_no_more() -> None:
    watchdog = Watchdog(10.0)
    assert watchdog.hung([Part("a", 0, waits=True)], 0.0) == {}
    assert watchdog.hung([Part("a", 0, waits=True)], 100.0) == {}
    assert watchdog.hung([Part("a", 0)], 105.0) == {}
    assert watchdog.hung([Part("a", 0)], 111.0) == {"a": 11.0}


def test_patience_comes_on_top() -> None:
    watchdog = Watchdog(10.0)
    watchdog.hung([Part("a", 0, patience_s=60.0)], 0.0)
    assert watchdog.hung([Part("a", 0, patience_s=60.0)], 70.0) == {}
    assert watchdog.hung([Part("a", 0, patience_s=60.0)], 70.5) == {"a": 70.5}


@given(st.lists(st.tuples(st.floats(0.01, 30.0), st.booleans(), st.booleans()), max_size=40))
def test_hung_is_who_neither_moved_nor_waited_for_longer_than_the_limit(
    looks: list[tuple[float, bool, bool]],
) -> None:
    watchdog, now, mark, alive = Watchdog(20.0), 0.0, 0, 0.0
    watchdog.hung([Part("a", mark)], now)
    for pause, moves, waits in looks:
        now += pause
        mark += moves
        if moves or waits:
            alive = now
        assert ("a" in watchdog.hung([Part("a", mark, waits)], now)) == (now - alive > 20.0)


# Lines of the log.


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7)],
)
def test_each_line_has_the_priority_of_its_level(level: int, priority: int) -> None:
    record = logging.LogRecord("daemon", level, __file__, 1, "two\nlines of %s", ("text",), None)
    lines = JournalFormatter("%(message)s").format(record).splitlines()
    assert lines == [f"<{priority}>two", f"<{priority}>lines of text"]


def test_a_standard_error_that_was_redirected_is_not_the_journal(tmp_path: Path) -> None:
    other = tmp_path.stat()
    assert not goes_to_journal({"JOURNAL_STREAM": f"{other.st_dev}:{other.st_ino}"})
    assert not goes_to_journal({})
