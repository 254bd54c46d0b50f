"""Every benchmark runs in its short form: figures are judged by `make bench`, not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import BENCHES

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.system


@pytest.mark.parametrize("name", [bench.name for bench in BENCHES])
def test_short_form(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", name, "--quick", "--out", str(tmp_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    document = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert document["errors"] == {}
    assert document["rows"], "a benchmark without a row measures nothing"
    assert {row["bench"] for row in document["rows"]} == {name}
    assert document["header"]["form"] == "quick"


def test_lauetools_short_form(tmp_path: Path) -> None:
    """The peer itself, on one pattern of each kind, in the environment that `make bench-peers` left."""
    if not (ROOT / ".peers" / "venv" / "installed").is_file():
        pytest.skip("LaueTools is not installed: `make bench-peers` does it")
    (tmp_path / "venv").symlink_to(ROOT / ".peers" / "venv", target_is_directory=True)
    command = [sys.executable, "-m", "bench.peers", "--quick", "--patterns", "1", "--folder", str(tmp_path)]
    command += ["--out", str(tmp_path / "table")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    figures = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["figures"]
    assert figures["lauetools.index.Cu.1.found"]["text"] == "LaueTools 1 of 1, told the number"
    assert figures["lauetools.index.Cu.5.time"]["value"] > 0
