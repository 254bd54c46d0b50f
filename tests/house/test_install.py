"""``deploy/install.sh``, run for real below a folder: twice, dry, and backwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from grainwatch import __version__

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "install.sh"
# Nothing is fetched: the packages that it needs are those of this environment.
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_COMPILE": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


def install(root: Path, *options: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), "--root", str(root), *map(str, options)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | OFFLINE
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=check, timeout=150)


def content(root: Path) -> dict[str, bytes | str]:
    """Return what lies below a folder, apart from the environment's own files."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in root.rglob("*")
        if (path.is_symlink() or path.is_file()) and "opt" not in path.relative_to(root).parts[:1]
    }


def test_installed_twice_and_removed(tmp_path: Path, wheel: Path) -> None:
    options = ("--wheel", wheel, "--python", sys.executable, "--name", "lab", "--no-warm")
    dry = install(tmp_path, *options, "--dry-run").stdout
    assert content(tmp_path) == {}
    assert not any(tmp_path.iterdir())
    install(tmp_path, *options)

    # What is installed is complete and runs.
    program = tmp_path / "opt" / "grainwatch" / "venv" / "bin" / "grainwatch"
    others = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    where = "import daemon.daemon; print(daemon.daemon.__file__)"
    for command, said in (
        ([program, "--version"], f"grainwatch {__version__}"),
        ([program.with_name("python"), "-c", where], str(tmp_path)),
        ([program, "run", "--help"], "SIGHUP"),
    ):
        done = subprocess.run(
            list(map(str, command)), env=others, cwd="/", capture_output=True, text=True, check=True
        )
        assert said in done.stdout
    files = content(tmp_path)
    units = "usr/local/lib/systemd/system/grainwatch@.service"
    sysusers, tmpfiles = (f"usr/local/lib/{kind}.d/grainwatch.conf" for kind in ("sysusers", "tmpfiles"))
    assert set(files) == {units, sysusers, tmpfiles, "etc/grainwatch/lab.toml", "usr/local/bin/grainwatch"}
    assert files[units] == (ROOT / "deploy" / "systemd" / "grainwatch@.service").read_bytes()
    assert files["usr/local/bin/grainwatch"] == "/opt/grainwatch/venv/bin/grainwatch"
    config = tomllib.loads((tmp_path / "etc/grainwatch/lab.toml").read_text())
    assert config["daemon"]["state_dir"] == "/var/lib/grainwatch/lab"
    assert config["daemon"]["runtime_dir"] == "/run/grainwatch/lab"
    assert config["sinks"]["hdf5"]["folder"] == config["sinks"]["zmq"]["results_dir"]
    assert config["sinks"]["hdf5"]["folder"].startswith("/var/lib/grainwatch/lab/")
    for path in files:
        assert path in dry or path.startswith("etc"), f"the dry run does not say {path}"

    # Again: what somebody wrote stays, all else is as before.
    edited = tmp_path / "etc/grainwatch/lab.toml"
    edited.write_text("# mine\n")
    before = content(tmp_path)
    again = install(tmp_path, *options).stdout
    assert content(tmp_path) == before
    assert "lab.toml stays as it is" in again
    assert again.count("is as it should be") == 3

    # Backwards.
    everything = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    install(tmp_path, "--uninstall", "--dry-run")
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == everything
    (tmp_path / "var/lib/grainwatch/lab").mkdir()
    (tmp_path / "var/lib/grainwatch/lab/ledger.sqlite").write_text("accounts")
    install(tmp_path, "--uninstall")
    assert set(content(tmp_path)) == {"etc/grainwatch/lab.toml", "var/lib/grainwatch/lab/ledger.sqlite"}
    assert not (tmp_path / "opt/grainwatch").exists()
    install(tmp_path, "--uninstall", "--purge")
    assert content(tmp_path) == {}
    assert install(tmp_path, "--uninstall").returncode == 0


def test_another_prefix_stands_in_the_unit(tmp_path: Path) -> None:
    said = install(tmp_path, "--prefix", "/srv/gw", "--python", sys.executable, "--dry-run").stdout
    assert f"{tmp_path}/srv/gw/venv" in said
    assert "ln -sfn /srv/gw/venv/bin/grainwatch" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fly"], "--fly: unknown option"),
        (["--name"], "--name: a value is missing"),
        (["--name", "../x"], "--name: expected letters"),
        (["--prefix", "opt"], "--prefix: expected a plain absolute path, got 'opt'"),
        (["--prefix", "/opt/../etc"], "--prefix: expected"),
        (["--purge"], "--purge: only together with --uninstall"),
        (["--wheel", "none.whl"], "--wheel: none.whl is not a file"),
        (["--python", "/bin/true"], "expected Python 3.11 or newer"),
    ],
)
def test_errors_are_one_line_and_change_nothing(tmp_path: Path, options: list[str], words: str) -> None:
    done = install(tmp_path, *options, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("install.sh: ")
    assert words in line
    assert not any(tmp_path.iterdir())


def test_what_is_not_ours_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "opt/grainwatch/venv").mkdir(parents=True)
    (tmp_path / "opt/grainwatch/venv/thesis.tex").write_text("years of work")
    done = install(tmp_path, "--uninstall", check=False)
    assert done.returncode == 2
    assert "is no Python environment: not removed" in done.stderr
    assert (tmp_path / "opt/grainwatch/venv/thesis.tex").exists()


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
