"""A skip is counted and printed as the last thing; a wrong folder of truth is an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
SOME_TESTS = """
import pytest

def test_truth(truth_dir):
    assert (truth_dir / "frame").is_file()

def test_truth_again(truth_dir):
    assert truth_dir.name == "laue"

@pytest.mark.skip(reason="no such detector here")
def test_detector():
    raise AssertionError
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project with this conftest, three tests and no truth."""
    root = tmp_path / "house" / "main"
    (root / "tests").mkdir(parents=True)
    shutil.copy(CONFTEST, root / "tests")
    (root / "tests" / "test_some.py").write_text(SOME_TESTS, encoding="utf-8")
    return root


def run_pytest(root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "GRAINWATCH_DATA"} | variables
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "tests"]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_without_truth_the_tests_are_skipped_and_counted_at_the_end(checkout: Path) -> None:
    answer = run_pytest(checkout)
    assert answer.returncode == 0, answer.stdout
    end = answer.stdout[answer.stdout.rindex("what was skipped") :].splitlines()[1:]
    assert end[0] == "third-party truth: absent"
    assert end[1] == "tests skipped: 3"
    assert end[2].split(maxsplit=1)[0] == "2"
    assert "make data" in end[2]
    assert end[3].split(maxsplit=1) == ["1", "no such detector here"]
    assert "3 skipped" in end[4]


def test_fetched_truth_is_used(checkout: Path) -> None:
    laue = checkout / ".data" / "laue"
    laue.mkdir(parents=True)
    (laue / "frame").touch()
    answer = run_pytest(checkout)
    assert "2 passed, 1 skipped" in answer.stdout
    assert f"third-party truth: {laue}" in answer.stdout


def test_a_named_folder_without_truth_is_an_error(checkout: Path) -> None:
    (checkout / ".data" / "laue").mkdir(parents=True)
    answer = run_pytest(checkout, GRAINWATCH_DATA=str(checkout / "nowhere"))
    assert answer.returncode == 4
    assert "nowhere has no folder laue" in answer.stdout + answer.stderr
