"""The command against the simulator, each in a process of its own."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from testkit.ports import free_address
from testkit.process import LONG_S

from daemon.sinks.simulator import Running, running, synthetic_result
from grainwatch.commands.subscribe import row
from grainwatch.messages import DriftReport

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def simulator() -> Iterator[Running]:
    with running("--count", "30", "--rate", "1000") as started:
        yield started


def command(simulator: Running, *arguments: str) -> list[str]:
    grainwatch = [str(Path(sys.executable).with_name("grainwatch")), "subscribe", simulator.results]
    return [*grainwatch, "--catch-up", simulator.catch_up, *arguments]


def test_json_lines(simulator: Running) -> None:
    done = subprocess.run(
        command(simulator, "--json", "--since", "start", "--count", "5"),
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["key"]["frame"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0]["schema"] == "grainwatch.laue/1"
    assert len(lines[0]["crystals"][0]["UB"]) == 3
    assert lines[0]["crystals"][0]["strain_sigma"][0][0] is None  # NaN, which JSON has not
    assert done.stderr == ""


def test_lines_when_it_is_not_a_terminal_and_a_since_in_the_middle(simulator: Running) -> None:
    done = subprocess.run(
        command(simulator, "--since", "20", "--count", "2", "--stream", "laue"),
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert "Cu" in first
    assert " px" in second
    assert done.stderr == ""


def test_table_on_a_terminal(simulator: Running) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(simulator, "--since", "start", "--count", "10"),
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "140", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(LONG_S) == 0
    text = shown.decode()
    assert "10 messages" in text
    assert "0 lost" in text
    assert "Cu" in text


def test_ctrl_c_ends_it_without_a_traceback(simulator: Running) -> None:
    with subprocess.Popen(
        command(simulator, "--json", "--since", "start"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 0
    assert errors == b""


def test_a_closed_pipe_ends_it_without_a_traceback(simulator: Running) -> None:
    with subprocess.Popen(
        command(simulator, "--json", "--all", "--since", "start"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        begun = time.monotonic()
        # Health comes once a second and finds nobody reading.
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait(LONG_S) == 0
    assert errors == b""
    assert time.monotonic() - begun < 30


def test_what_cannot_be_is_one_line(simulator: Running) -> None:
    for arguments, status, message in (
        (["--since", "f" * 32], 1, "grainwatch: no results of series ffff"),
        (["--catch-up", "nowhere"], 2, "grainwatch: catch_up: 'nowhere': expected an address"),
    ):
        done = subprocess.run(command(simulator, *arguments), capture_output=True, text=True, timeout=LONG_S)
        assert done.returncode == status
        assert done.stderr.startswith(message)
        assert len(done.stderr.splitlines()) == 1


def test_nobody_there_is_said_once_and_waited_for() -> None:
    address = free_address()
    command = [str(Path(sys.executable).with_name("grainwatch")), "subscribe", address, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"grainwatch: nothing answers at {address} yet, waiting\n"
        assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=LONG_S)
    assert (process.returncode, output, errors) == (0, "", "")


def test_a_report_of_the_drift_watch_is_its_words() -> None:
    report = DriftReport(
        source="laue",
        series_uid="a" * 32,
        frame=40,
        material="Ge",
        calibration_hash="c",
        state="still",
        frames=41,
        unseen=0,
        change=(0.0, 0.0, 0.0),
        sigma=(0.01, 0.1, 0.1),
        offset=(0.0, 0.0, 0.0),
        offset_sigma=(0.01, 0.1, 0.1),
        statistic=0.5,
        limit=1.2,
        text="detector still over 41 frames of Ge",
    )
    assert row(report)[1:] == ("laue", "40", "", "", "detector still over 41 frames of Ge", "")


def test_flags_of_crystals_stand_in_the_row() -> None:
    result = synthetic_result(3, np.random.default_rng(1), seq=7, series_uid="a" * 32, crystals=1)
    (crystal,) = result.crystals
    flagged = msgspec.structs.replace(crystal, flags=("low_match_rate",))
    assert row(msgspec.structs.replace(result, crystals=(flagged,)))[5].endswith(" px [low_match_rate]")
    plain = msgspec.structs.replace(crystal, flags=())
    assert row(msgspec.structs.replace(result, crystals=(plain,)))[5].endswith(" px")
