"""The dispatcher changes over from one executor to the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.flow.dispatcher import Dispatcher
from daemon.flow.ledger import Ledger
from daemon.flow.local import LocalExecutor
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


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


class Eager(Dispatcher):
    """Its thread runs at the worst moment: right after the next executor was put down for it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_next" and value is not None:
            self._relieve()


def test_who_switches_gets_the_earlier_executor_however_fast_the_thread_is(ledger: Ledger) -> None:
    config, config_hash = parse_config(CONFIG, "x")
    first, second, third = (LocalExecutor(config, config_hash, "x") for _ in range(3))
    dispatcher = Eager({}, first, Outbox("d", ledger, []), ledger, lambda _: None, threading.Event())
    assert dispatcher.switch(second).result(0) is first
    assert dispatcher.executor is second
    assert dispatcher.switch(third).result(0) is second
