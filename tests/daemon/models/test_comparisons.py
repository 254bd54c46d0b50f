"""What the shadow found: kept, forgotten when old, summed up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon.models.comparisons import Comparison
from daemon.models.registry import Model, Registry, RegistryError
from daemon.sinks.simulator import synthetic_result
from grainwatch.messages import decode, encode

Make = Callable[..., Path]


@pytest.fixture
def model(registry: Registry, bundle: Make) -> Model:
    return registry.set_state(registry.add(bundle("2"), "me"), "shadow", "me", share=0.3)


def comparison(frame: int, live: str = "a" * 64, **more: Any) -> Comparison:
    row = Comparison(
        1000.0 + frame, "laue", "f" * 32, frame, "", live, agree=True, live_ms=10.0, shadow_ms=20.0
    )
    return replace(row, **more)


def test_what_is_put_in_comes_out(registry: Registry, model: Model) -> None:
    rng = np.random.default_rng(1)
    shadow = synthetic_result(7, rng, seq=1, series_uid="f" * 32)
    result = encode(shadow)
    rows = [
        comparison(
            n,
            agree=bool(rng.integers(2)),
            figures={"angle_deg": float(rng.random()), "crystals": -1.0},
            live_ms=float(rng.random()),
            shadow_ms=float(rng.random()),
            result=result if n else b"",
        )
        for n in range(5)
    ]
    rows.append(comparison(5, agree=False, error="RuntimeError: no memory"))
    for row in rows:
        registry.compare_put(model, row, kept=100)
    assert registry.comparisons(model) == rows[::-1]
    assert registry.comparisons(model, limit=2) == rows[:3:-1]
    assert encode(decode(registry.comparisons(model)[-2].result)) == result


def test_the_newest_are_kept_of_each_model(registry: Registry, model: Model, bundle: Make) -> None:
    other = registry.add(bundle("3"), "me")
    for n in range(30):
        registry.compare_put(model, comparison(n), kept=10)
        if n < 5:
            registry.compare_put(other, comparison(n), kept=10)
    assert [c.frame for c in registry.comparisons(model)] == list(range(29, 19, -1))
    assert len(registry.comparisons(other)) == 5
    # Fewer from now on.
    registry.compare_put(model, comparison(30), kept=3)
    assert [c.frame for c in registry.comparisons(model)] == [30, 29, 28]
    registry.compare_put(model, comparison(31), kept=0)
    assert registry.comparisons(model) == []


def test_the_sum(registry: Registry, model: Model) -> None:
    assert registry.comparison_summary(model) == {"n": 0}
    rng = np.random.default_rng(2)
    angle, live, shadow = rng.random(101), rng.gamma(2.0, 10.0, 101), rng.gamma(2.0, 20.0, 101)
    for n in range(101):
        figures = {"angle_deg": angle[n]} | ({"rare": float(n)} if n % 10 == 0 else {})
        row = comparison(
            n, agree=n % 4 != 0, figures=figures, live_ms=float(live[n]), shadow_ms=float(shadow[n])
        )
        registry.compare_put(model, row, kept=5000)
    for n in (101, 102):
        row = comparison(n, agree=False, error="broke down", live_ms=1e9, shadow_ms=1e9)
        registry.compare_put(model, row, kept=5000)
    found = registry.comparison_summary(model)
    assert (found["n"], found["errors"], found["others"]) == (103, 2, 0)
    assert found["agree"] == pytest.approx(75 / 103)
    assert found["figures"] == pytest.approx({"angle_deg": np.median(angle), "rare": 50.0})
    for name, values in (("live_ms", live), ("shadow_ms", shadow)):
        assert found[name] == pytest.approx({"median": np.median(values), "p95": np.quantile(values, 0.95)})
    assert (found["first"], found["last"]) == (1000.0, 1102.0)


def test_only_the_present_live_model_counts(registry: Registry, model: Model) -> None:
    for n in range(6):
        registry.compare_put(model, comparison(n, live="a" * 64, agree=False), kept=100)
    for n in range(6, 10):
        registry.compare_put(model, comparison(n, live="b" * 64), kept=100)
    found = registry.comparison_summary(model)
    assert (found["n"], found["agree"], found["others"]) == (4, 1.0, 6)
    assert found["live_sha256"] == "b" * 64


def test_figures_that_are_no_numbers_do_not_spoil_the_rest(registry: Registry, model: Model) -> None:
    for n, value in enumerate((math.nan, 1.0, math.inf, 3.0)):
        registry.compare_put(model, comparison(n, figures={"angle_deg": value, "none": math.nan}), kept=100)
    assert registry.comparison_summary(model)["figures"] == {"angle_deg": 2.0}
    assert math.isnan(registry.comparisons(model)[-1].figures["angle_deg"])


def test_a_shadow_that_only_fails(registry: Registry, model: Model) -> None:
    registry.compare_put(model, comparison(0, agree=False, error="no memory"), kept=100)
    found = registry.comparison_summary(model)
    assert (found["n"], found["agree"], found["errors"]) == (1, 0.0, 1)
    assert (found["figures"], found["live_ms"], found["shadow_ms"]) == ({}, None, None)


def test_of_a_model_that_is_not_there(registry: Registry, model: Model, tmp_path: Path) -> None:
    elsewhere = Registry(tmp_path / "elsewhere")
    assert elsewhere.comparisons(model) == []
    assert elsewhere.comparison_summary(model) == {"n": 0}
    with pytest.raises(RegistryError, match="is not in the registry"):
        elsewhere.compare_put(model, comparison(0), kept=10)
    elsewhere.close()
