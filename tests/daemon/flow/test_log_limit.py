from __future__ import annotations

import logging

import pytest

from daemon.flow import log_limit
from daemon.flow.log_limit import LogLimit


def test_a_flood_is_cut_and_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = LogLimit(logging.getLogger("flood"), "s")
    for n in range(1000):
        limit.warning("%s: frame %d", "s", n)
    assert [r.getMessage() for r in caplog.records] == [f"s: frame {n}" for n in range(log_limit.MOST)]
    monkeypatch.setattr(log_limit, "PERIOD_S", 0.0)
    limit.warning("one more")
    assert [r.getMessage() for r in caplog.records[-2:]] == [
        f"s: {1000 - log_limit.MOST} more such lines: see the ledger",
        "one more",
    ]
