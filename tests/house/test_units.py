"""The systemd units: good by systemd's own tools, tight, and not too tight for the daemon."""

from __future__ import annotations

import ctypes.util
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from testkit.process import DaemonProcess, eventually

from daemon.commands.run import STARTS
from daemon.service import EXTENSION_S
from grainwatch.config import DaemonTable

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "grainwatch@.service"
THRESHOLD = "20"  # 2.0 on systemd's scale from 0 (tight) to 10


def settings(unit: Path) -> dict[str, list[str]]:
    """Return what a unit sets, each key with all its values."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def analyze(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture
def instance(tmp_path: Path) -> Path:
    """The unit of a daemon, with programs that exist here."""
    text = UNIT.read_text(encoding="utf-8")
    assert text.count("/opt/grainwatch/venv/bin/grainwatch") == 2
    unit = tmp_path / "grainwatch@lab.service"
    unit.write_text(text.replace("/opt/grainwatch/venv/bin/grainwatch", sys.executable))
    return unit


def test_systemd_verifies_the_unit(instance: Path) -> None:
    done = analyze("verify", str(instance))
    assert (done.returncode, done.stderr) == (0, "")
    instance.write_text(instance.read_text().replace("WatchdogSec=", "WatchdogSecs="))
    assert "WatchdogSecs" in analyze("verify", str(instance)).stderr


@pytest.mark.parametrize("gpu", [False, True])
def test_the_exposure_is_small(instance: Path, gpu: bool) -> None:
    if gpu:
        drop_in = instance.with_name(f"{instance.name}.d") / "gpu.conf"
        drop_in.parent.mkdir()
        shutil.copy(DEPLOY / "systemd" / "gpu.conf", drop_in)
        assert analyze("verify", str(instance)).stderr == ""
    options = ("--offline=true", f"--threshold={THRESHOLD}", "--no-pager")
    done = analyze("security", *options, str(instance))
    assert done.returncode == 0, done.stdout
    assert "Overall exposure level for grainwatch@lab.service" in done.stdout
    instance.write_text(instance.read_text().replace("CapabilityBoundingSet=\n", ""))
    assert analyze("security", *options, str(instance)).returncode != 0


def test_the_files_beside_it_are_good(tmp_path: Path) -> None:
    for kind in ("sysusers", "tmpfiles"):
        program = shutil.which(f"systemd-{kind}")
        if program is None:
            pytest.skip(f"systemd-{kind} is not installed")
        (tmp_path / "etc").mkdir(exist_ok=True)
        file = DEPLOY / f"{kind}.d" / "grainwatch.conf"
        options = ["--create"] if kind == "tmpfiles" else []
        command = [program, f"--root={tmp_path}", *options, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert re.search(r"^grainwatch:", (tmp_path / "etc/passwd").read_text(), re.MULTILINE)
    for folder in ("etc/grainwatch", "var/lib/grainwatch", "var/cache/grainwatch", "run/grainwatch"):
        assert (tmp_path / folder).is_dir()


def test_times_of_the_unit_fit_the_daemon() -> None:
    unit, defaults = settings(UNIT), DaemonTable()
    assert unit["Type"] == ["notify"]
    # A start is told to last longer before this is over, and may take as long as all of these.
    assert float(unit["TimeoutStartSec"][0]) > 2 * EXTENSION_S
    assert STARTS * defaults.start_timeout_s > float(unit["TimeoutStartSec"][0])
    assert float(unit["TimeoutStopSec"][0]) > defaults.stop_timeout_s + 4 * 5.0
    # Compiled kernels and networks write memory that they run.
    assert "MemoryDenyWriteExecute" not in unit
    # A worker that is killed for its memory is the front's business.
    assert unit["OOMPolicy"] == ["continue"]


# The filter of system calls, around a daemon that computes. Each worker, socket, anonymous memory
# and thread goes through it.

LAUNCHER = """
import ctypes, os, sys
library, names, program = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
seccomp = ctypes.CDLL(library, use_errno=True)
seccomp.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(0x00050000 | 1)))  # ERRNO(EPERM)
for name in names:
    number = seccomp.seccomp_syscall_resolve_name(name.encode())
    if number >= 0:
        seccomp.seccomp_rule_add(context, ctypes.c_uint32(0x7FFF0000), number, 0)
if seccomp.seccomp_load(context):
    sys.exit("the filter cannot be loaded")
os.execv(program[0], program)
"""


@cache
def calls_of(group: str) -> frozenset[str]:
    """Return the system calls of a set ("@system-service"), those of the sets in it included."""
    found: set[str] = set()
    for line in analyze("syscall-filter", group).stdout.splitlines()[1:]:
        name = line.strip().partition(" ")[0]
        if name.startswith("@"):
            found |= calls_of(name)
        elif name and not name.startswith("#"):
            found.add(name)
    return frozenset(found)


@pytest.mark.system
def test_the_daemon_works_behind_its_filter_of_system_calls(tmp_path: Path) -> None:
    library = ctypes.util.find_library("seccomp")
    if library is None:
        pytest.skip("libseccomp is not installed")
    allowed: set[str] = set()
    for value in settings(UNIT)["SystemCallFilter"]:
        for group in value.removeprefix("~").split():
            names = calls_of(group)
            allowed = allowed - names if value.startswith("~") else allowed | names
    # The launcher itself, after the filter is in place.
    allowed |= calls_of("@default") | {"execve"}
    assert {"memfd_create", "futex", "socket"} <= allowed
    assert {"mount", "reboot", "init_module", "ptrace", "bpf"} & allowed == set()
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)
    shell = tmp_path / "python"
    shell.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "{launcher}" {library} {",".join(sorted(allowed))}'
        f' "{sys.executable}" "$@"\n'
    )
    shell.chmod(0o755)
    with DaemonProcess(tmp_path) as daemon:
        text = daemon.config_path.read_text()
        daemon.config_path.write_text(f'{text}[sinks.hdf5]\nfolder = "{tmp_path}/results"\n')
        daemon.python = str(shell)
        daemon.start()
        assert daemon.process is not None
        for pid in (daemon.process.pid, *daemon.workers()):
            assert re.search(r"^Seccomp:\s+2$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        daemon.feed(["start", "1/a", 20])
        daemon.images("1/a", range(20))
        daemon.feed(["end", "1/a"])
        eventually(lambda: daemon.events("closed"), 60.0, daemon.log_path.read_text())
        assert daemon.counts()["done"] == 20
        assert daemon.status()["errors"] == {}
        assert daemon.stop() == 0
        # Sinks write side by side: the file is certain to be there once all are closed.
        assert list((tmp_path / "results").glob("s-*.h5"))
