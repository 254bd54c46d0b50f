"""The import contracts hold, and a breach is seen."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("grainwatch", "pipelines", "daemon", "offline_training")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the packages that may be spoiled."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_hold() -> None:
    answer = lint_imports(ROOT)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("grainwatch/breach.py", "import pipelines.frame"),
        ("grainwatch/breach.py", "import h5py"),
        ("pipelines/breach.py", "import threading"),
        ("pipelines/breach.py", "from daemon.flow import executor"),
        ("daemon/breach.py", "import torch"),
        ("daemon/breach.py", "import offline_training"),
        ("daemon/sources/breach.py", "import daemon.sinks.base"),
    ],
)
def test_a_breach_is_seen(copy: Path, module: str, statement: str) -> None:
    (copy / module).write_text(f"{statement}\n", encoding="utf-8")
    answer = lint_imports(copy)
    assert answer.returncode == 1, answer.stdout
    assert module.removesuffix(".py").replace("/", ".") in answer.stdout
