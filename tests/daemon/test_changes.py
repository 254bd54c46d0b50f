"""Changes are done one after the other, and whoever asks too late is told."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from daemon.changes import Answer, ChangeRefused, Changes

LONG_S = 60.0


def test_who_asks_during_or_after_a_stop_is_refused_at_once() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def long_change() -> Answer:
        begun.set()
        assert go_on.wait(LONG_S)
        return {"done": True}

    changes = Changes(dict)
    changes.start()
    under_way = changes.ask(long_change)
    assert begun.wait(LONG_S)
    waits = changes.ask_reload()
    changes.stop(0.0)
    after_stop = changes.ask(dict)
    go_on.set()
    assert under_way.result(LONG_S) == {"done": True}
    for refused in (waits, after_stop):
        with pytest.raises(ChangeRefused, match="the daemon stops"):
            refused.result(LONG_S)
    changes.stop(LONG_S)
    with pytest.raises(ChangeRefused, match="the daemon stops"):
        changes.ask_reload().result(LONG_S)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("the registry is full"), "a change of the daemon failed: the registry is full"),
        (RuntimeError("a defect"), "RuntimeError: a defect"),
    ],
)
def test_what_goes_wrong_where_nobody_waits_is_logged(
    error: Exception, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> Answer:
        raise error

    changes = Changes(dict)
    changes.start()
    changes.follow_up(fails)
    assert changes.ask(_nothing).result(LONG_S) == {}
    changes.stop(LONG_S)
    assert said in caplog.text


_nothing: Callable[[], Answer] = dict
