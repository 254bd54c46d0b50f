"""Executors are put in place, or not: a stop does not come in between."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from daemon.changes import ChangeRefused
from daemon.configuration import Configuration
from daemon.executors import Executors
from daemon.flow.dispatcher import Dispatcher
from daemon.flow.ledger import Ledger
from daemon.flow.outbox import Outbox
from grainwatch.config import parse_config

CONFIG = b"""
[daemon]
workers = 0
[streams.s.source]
type = "replay"
[streams.s.pipeline]
type = "laue"
"""
LONG_S = 60.0


def test_what_is_written_down_is_done_also_when_the_daemon_stops_at_that_moment(tmp_path: Path) -> None:
    configuration = Configuration(*parse_config(CONFIG, "x"), CONFIG, "x")
    executors = Executors(tmp_path)
    first, second, third = (executors.make(configuration, {}) for _ in range(3))
    ledger = Ledger(tmp_path / "ledger.sqlite")
    wake = threading.Event()
    dispatcher = Dispatcher({}, first, Outbox("d", ledger, []), ledger, lambda _: None, wake)
    noted: list[str] = []
    stop = threading.Thread(target=executors.break_off)

    def note() -> None:
        stop.start()
        stop.join(0.2)
        noted.append("the second")

    switched = executors.put_in_place(second, dispatcher, note=note)
    stop.join(LONG_S)
    assert not stop.is_alive()
    with pytest.raises(ChangeRefused, match="the daemon stops"):
        executors.put_in_place(third, dispatcher, note=lambda: noted.append("the third"))
    assert noted == ["the second"]
    dispatcher.start()
    assert switched.result(LONG_S).executor is first
    assert dispatcher.executor is second
    assert dispatcher.stop(LONG_S)
    ledger.close()
