"""The benchmark report: limits, seeds and bounds mean what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, poisson

from bench import BENCHES
from bench import report as report_module
from bench.bounds import at_most_95, mean_at_most_95
from bench.patterns import Condition, pattern, reflections
from bench.report import Report, repetitions_s
from offline_training.laue.scoring import score
from pipelines.laue.crystal import load_material

ROOT = Path(__file__).resolve().parents[2]


def quiet() -> Report:
    return Report(seed=7, bench="self", command="python -m bench self", show=lambda line: None)


@pytest.mark.parametrize(
    ("measured", "limits", "met"),
    [
        (24.9, {"at_most": 25.0}, True),
        (25.0, {"at_most": 25.0}, True),
        (25.1, {"at_most": 25.0}, False),
        (97.0, {"at_least": 98.0}, False),
        (1.0, {"at_least": 0.9, "at_most": 1.1}, True),
        (1.2, {"at_least": 0.9, "at_most": 1.1}, False),
        (math.nan, {"at_most": 25.0}, False),
        (math.nan, {"at_least": 0.0}, False),
        (3.0, {}, None),
    ],
)
def test_a_row_is_met_only_within_its_limits(
    measured: float, limits: dict[str, float], met: bool | None
) -> None:
    assert quiet().add("figure", measured, "ms", **limits).met is met


def test_a_limit_for_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a number"):
        quiet().add("figure", "fast", at_most=3)


def test_rows_are_written_with_what_repeats_them(tmp_path: Path) -> None:
    report = quiet()
    report.add("a|b", 12.345, "ms", at_most=25, conditions="seed 7", data={"times_s": np.array([0.1, 0.2])})
    report.errors["other"] = "ValueError: broken"
    table, values = report.write(tmp_path, {"date": "today"})
    text = table.read_text(encoding="utf-8")
    assert r"| self | a\|b | <= 25 ms | 12.3 ms | yes |" in text
    assert "`python -m bench self --seed 7`" in text
    assert "other failed: ValueError: broken" in text
    document = json.loads(values.read_text(encoding="utf-8"))
    assert document["rows"][0]["data"]["times_s"] == [0.1, 0.2]


def test_the_peers_figure_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "PEERS", tmp_path / "results.json")
    assert "published" in quiet().peer("lauetools.peaks.time", published="550-1040 ms")
    figures = {"lauetools.peaks.time": {"text": "LaueTools 420 ms", "date": "2026-11-20"}}
    (tmp_path / "results.json").write_text(json.dumps({"figures": figures}), encoding="utf-8")
    assert (
        quiet().peer("lauetools.peaks.time", published="550-1040 ms").startswith("LaueTools 420 ms (run here")
    )


def test_random_numbers_depend_on_seed_and_words_alone() -> None:
    first = quiet().rng("peaks", 3).random(4)
    report = quiet()
    report.rng("something else").random(100)
    assert np.array_equal(report.rng("peaks", 3).random(4), first)
    assert not np.array_equal(report.rng("peaks", 4).random(4), first)
    assert not np.array_equal(Report(seed=8).rng("peaks", 3).random(4), first)


def test_warm_up_is_not_timed() -> None:
    calls: list[int] = []
    times = repetitions_s(lambda: calls.append(1), repeats=3, warm_up=2)
    assert (len(calls), len(times)) == (5, 3)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_bound_of_a_probability_is_the_one_that_95_percent_of_samples_exceed(count: tuple[int, int]) -> None:
    events, trials = count
    bound = at_most_95(events, trials)
    if events == trials:
        assert bound == 1.0
    else:
        assert binom.cdf(events, trials, bound) == pytest.approx(0.05, rel=1e-6)


@given(st.integers(0, 500), st.integers(1, 2000))
def test_bound_of_a_mean_likewise(events: int, trials: int) -> None:
    assert poisson.cdf(events, mean_at_most_95(events, trials) * trials) == pytest.approx(0.05, rel=1e-6)


def test_pattern_number_i_is_the_same_however_many_are_made() -> None:
    condition = Condition("Cu", 2)
    alone = pattern(quiet(), condition, 3)
    report = quiet()
    for number in range(4):
        last = pattern(report, condition, number)
    assert np.array_equal(last.xy_px, alone.xy_px)
    assert not np.array_equal(pattern(report, condition, 2).ubs, alone.ubs)


def test_score_counts_each_truth_once() -> None:
    material = load_material("Cu")
    truth = pattern(quiet(), Condition("Cu", 3), 0).ubs
    equivalent = truth[1] @ np.linalg.inv(material.B0) @ material.lattice_rotations[5] @ material.B0
    turned = np.array([[np.cos(0.01), -np.sin(0.01), 0], [np.sin(0.01), np.cos(0.01), 0], [0, 0, 1.0]])
    result = score([truth[0], equivalent, truth[1], turned @ truth[2]], truth, material)
    assert (result.found, result.truths, result.returned, result.false) == (2, 3, 4, 2)
    assert max(result.misorientation_deg) < 1e-6
    assert score([], truth, material).found == 0
    assert score(truth, np.empty((0, 3, 3)), material).false == 3


def test_reflections_are_those_of_the_band() -> None:
    assert reflections("Cu").energy_keV == (5.0, 22.0)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_list_names_every_benchmark() -> None:
    answer = run("--list")
    assert answer.returncode == 0
    assert [line.split()[0] for line in answer.stdout.splitlines()] == [bench.name for bench in BENCHES]


def test_an_unknown_name_is_refused_by_name() -> None:
    answer = run("speed")
    assert answer.returncode == 2
    assert "no benchmark is called speed" in answer.stderr
