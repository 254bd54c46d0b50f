"""The peers' benchmark: what LaueTools is handed, and what its answers count as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.peers import environment, lauetools
from bench.report import Report
from pipelines.laue.crystal import load_material
from pipelines.laue.lauetools_files import read_cor

B0 = load_material("Cu").B0


@pytest.fixture
def report() -> Report:
    return Report(seed=5, quick=True, bench="peers", show=lambda line: None)


@pytest.fixture
def job(report: Report, tmp_path: Path) -> lauetools.Job:
    return lauetools.plan(report, tmp_path, patterns=2, limit_s=60.0)


def answers(job: lauetools.Job) -> list[dict[str, Any]]:
    """What a program that finds every crystal would say."""
    return [
        {
            "name": task.name,
            "file": "",
            "ubs": (peaks.ubs @ np.linalg.inv(B0)).tolist(),
            "spots": [30.0] * task.grains,
            "matching_rate": [90.0] * task.grains,
            "time_s": 0.5,
            "fits": [],
            "error": "",
        }
        for task in job.tasks
        for peaks in task.patterns
    ]


def test_the_peak_lists_handed_over_are_the_patterns(job: lauetools.Job) -> None:
    document = job.document()
    json.dumps(document)  # it is the driver's input file
    for asked, task in zip(document["index"], job.tasks, strict=False):
        for file, peaks in zip(asked["files"], task.patterns, strict=True):
            np.testing.assert_allclose(read_cor(file).xy_px, peaks.xy_px, atol=1e-9)
        assert asked["grains"] == task.condition.grains


def test_right_answers_count_as_found(report: Report, job: lauetools.Job) -> None:
    figures = lauetools.evaluate(report, job, {"index": answers(job), "peaks": []})
    assert figures["lauetools.index.Cu.5.found"]["text"] == "LaueTools 10 of 10, told the number"
    assert figures["lauetools.index.Cu.5.time"]["value"] == 0.5
    assert figures["lauetools.index.Cu.5.misorientation"]["value"] < 1e-6


def test_a_wrong_crystal_counts_as_false_and_a_missing_one_as_not_found(
    report: Report, job: lauetools.Job
) -> None:
    given = answers(job)
    turn = np.array([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    given[0]["ubs"] = (turn @ np.asarray(given[0]["ubs"])).tolist()
    given[-1]["ubs"] = given[-1]["ubs"][:3]
    given[-1]["error"] = "stopped after 60 s"
    lauetools.evaluate(report, job, {"index": given, "peaks": []})
    rows = {row.what: row for row in report.rows}
    assert rows["LaueTools, Cu 1: crystals found"].measured == "1 of 2, 1 false"
    assert rows["LaueTools, Cu 5: crystals found"].measured == "8 of 10, 0 false"
    assert "1 ended early: stopped after 60 s" in rows["LaueTools, Cu 5: time"].conditions


def test_a_failed_peak_search_is_a_row_and_no_figure(report: Report, job: lauetools.Job) -> None:
    failed = {"name": "frame", "settings": "as shipped", "times_s": [], "xy": [], "error": "IndexError: x"}
    figures = lauetools.evaluate(report, job, {"index": answers(job), "peaks": [failed]})
    assert "lauetools.peaks.time" not in figures
    assert report.rows[-1].measured == "failed: IndexError: x"


def test_an_environment_that_cannot_be_made_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"pip install .* failed: ERROR: .*numpy==1\.26\.4"):
        environment.ensure(tmp_path / "venv")
    assert not (tmp_path / "venv" / "installed").exists()
