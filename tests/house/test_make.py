"""The Makefile: what it offers, and what it says on a machine that lacks something."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = re.findall(r"^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # The variables of an outer make would change what this one does.
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    environment |= variables
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_make_alone_lists_every_target() -> None:
    answer = make()
    assert answer.returncode == 0
    assert [line.split()[0:2] for line in answer.stdout.splitlines()] == [["make", name] for name in TARGETS]
    assert {"demo", "test", "data", "bench", "bench-peers", "faults", "soak", "fuzz"} <= set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_can_be_made_from_nothing(target: str, tmp_path: Path) -> None:
    answer = make("--dry-run", target, f"VENV={tmp_path}/venv")
    assert answer.returncode == 0, answer.stderr
    if target not in {"help", "clean"}:
        assert f'-m venv "{tmp_path}/venv"' in answer.stdout
    assert "torch" not in answer.stdout


def test_the_demo_installs_no_tools_of_development(tmp_path: Path) -> None:
    installs = [
        line for line in make("-n", "demo", f"VENV={tmp_path}/v").stdout.splitlines() if "install -c" in line
    ]
    assert len(installs) == 1
    assert "'.[daemon]'" in installs[0]


def test_the_tests_install_once_and_with_everything(tmp_path: Path) -> None:
    installs = [
        line for line in make("-n", "test", f"VENV={tmp_path}/v").stdout.splitlines() if "install -c" in line
    ]
    assert len(installs) == 1
    assert "'.[daemon,dev]'" in installs[0]


def fake_python(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_an_old_python_is_refused_by_name(tmp_path: Path) -> None:
    old = fake_python(tmp_path, "python3.9", '[ "$1" = --version ] && echo "Python 3.9.2" && exit 0; exit 1')
    answer = make("venv", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert answer.returncode != 0
    assert f"{old} is Python 3.9.2; grainwatch needs Python 3.11 or newer" in answer.stderr
    assert not (tmp_path / "venv").exists()


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    answer = make("venv", "PYTHON=/nowhere/python", f"VENV={tmp_path}/venv")
    assert answer.returncode != 0
    assert "/nowhere/python is nothing that runs; grainwatch needs Python 3.11 or newer" in answer.stderr


def test_the_first_python_that_is_new_enough_is_taken(tmp_path: Path) -> None:
    """Old ones and ones that do not start are passed over; one without venv leaves nothing behind."""
    for name in ("python3.11", "python3.12", "python3.13"):
        fake_python(tmp_path / "bin", name, "exit 127")
    fake_python(tmp_path / "bin", "python3", 'case "$1" in -c) exit 0;; esac; mkdir -p "$3"; exit 1')
    answer = make("venv", f"VENV={tmp_path}/venv", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert answer.returncode != 0
    assert f"creating {tmp_path}/venv with python3\n" in answer.stdout
    assert "python3 cannot create an environment" in answer.stderr
    assert not (tmp_path / "venv").exists()


def test_the_build_server_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


def test_what_the_targets_start_exists() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    started = re.findall(r"-m ((?:bench|tests)[\w.]*)", text)
    started += [path.removesuffix(".py").replace("/", ".") for path in re.findall(r"tests/[\w/]+\.py", text)]
    assert len(started) >= 6
    for module in started:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
