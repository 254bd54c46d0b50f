"""What is said about compiling: beforehand, and only when something is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from daemon.commands.warm import announced
from pipelines.kernels import kernel
with announced() as announcement:
    @kernel("int64(int64)")
    def one(x):
        return x + 1
    @kernel("int64(int64)")
    def two(x):
        return x + 2
print(announcement.made)
"""


def run(script: Path, cache: Path) -> tuple[str, str]:
    answer = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "GRAINWATCH_CACHE_DIR": str(cache), "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return answer.stdout.strip(), answer.stderr


def test_compiling_is_announced_once_and_only_when_it_happens(tmp_path: Path) -> None:
    script = tmp_path / "kernels_of_a_test.py"
    script.write_text(SCRIPT, encoding="utf-8")
    made, said = run(script, tmp_path / "cache")
    assert made == "True"
    assert said.splitlines() == ["compiling kernels (about a minute the first time) ..."]
    assert run(script, tmp_path / "cache") == ("False", "")
