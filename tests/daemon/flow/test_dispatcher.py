"""The dispatcher changes over from one executor to the next, on probation or not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from testkit.process import eventually

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
LONG_S = 60.0


@pytest.fixture
def executors() -> list[LocalExecutor]:
    config, config_hash = parse_config(CONFIG, "x")
    return [LocalExecutor(config, config_hash, "x") for _ in range(5)]


@pytest.fixture
def dispatcher(tmp_path: Path, executors: list[LocalExecutor]) -> Iterator[Dispatcher]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    dispatcher = Dispatcher(
        {}, executors[0], Outbox("d", ledger, []), ledger, lambda _: None, threading.Event()
    )
    yield dispatcher
    assert dispatcher.stop(LONG_S)
    ledger.close()


def test_who_switches_gets_the_earlier_executor(
    dispatcher: Dispatcher, executors: list[LocalExecutor]
) -> None:
    first, second, third, *_ = executors
    # Both before the thread looks, as when two ask at the same time.
    switches = [dispatcher.switch(second), dispatcher.switch(third)]
    dispatcher.start()
    assert [s.result(LONG_S).executor for s in switches] == [first, second]
    assert [s.result(LONG_S).failed for s in switches] == ["", ""]
    assert dispatcher.executor is third


def test_on_probation_the_earlier_one_is_held_in_reserve(
    dispatcher: Dispatcher, executors: list[LocalExecutor]
) -> None:
    first, second, *_ = executors
    dispatcher.start()
    switch = dispatcher.switch(second, probation=3)
    eventually(lambda: dispatcher.executor is second)
    assert not switch.done()
    dispatcher.put_back("somebody does not like it")
    ended = switch.result(LONG_S)
    assert ended.executor is second
    assert ended.failed == "somebody does not like it"
    assert dispatcher.executor is first


def test_another_switch_ends_a_probation(dispatcher: Dispatcher, executors: list[LocalExecutor]) -> None:
    first, second, third, fourth, _ = executors
    dispatcher.start()
    on_probation = dispatcher.switch(second, probation=3)
    assert dispatcher.switch(third).result(LONG_S).executor is second
    assert on_probation.result(LONG_S).executor is first
    assert on_probation.result(LONG_S).failed == ""
    # Too late: nothing is in reserve any more.
    dispatcher.put_back("somebody does not like it")
    assert dispatcher.switch(fourth).result(LONG_S).executor is third


def test_what_was_asked_for_is_done_in_that_order(
    dispatcher: Dispatcher, executors: list[LocalExecutor]
) -> None:
    """A wish to put one executor back does not hit the next one, however late it is heard."""
    first, second, third, *_ = executors
    switch = dispatcher.switch(second, probation=3)
    dispatcher.put_back("the second is not liked")
    following = dispatcher.switch(third, probation=3)
    dispatcher.start()
    ended = switch.result(LONG_S)
    assert (ended.executor, ended.failed) == (second, "the second is not liked")
    eventually(lambda: dispatcher.executor is third)
    assert not following.done()
    assert dispatcher.settle().result(LONG_S) is third
    # It is there to stay.
    assert following.result(LONG_S).executor is first
    dispatcher.put_back("too late")
    assert dispatcher.settle().result(LONG_S) is third
