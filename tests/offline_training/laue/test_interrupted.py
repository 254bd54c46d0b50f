"""Training that is killed or interrupted: it goes on, and nothing half-written is taken for whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from textwrap import dedent

import msgspec
import numpy as np
import pytest
from testkit.laue import CALIBRATION
from testkit.process import eventually

from offline_training.errors import StudyError
from offline_training.laue.study import Study
from pipelines.engines.bundle import BundleError, load_bundle
from pipelines.laue.lauetools_files import write_det

ROOT = Path(__file__).resolve().parents[3]
NO_TORCH = "torch is absent: see docs/how-to/train-a-network.md"

WRITE_BUNDLES = """
    import hashlib, sys
    from pathlib import Path
    from pipelines.engines.bundle import SCHEMA, Description, write_bundle

    for number in range(10**9):
        description = Description(
            schema=SCHEMA, kind="laue-classes", name="n", version="1", about=str(number), inputs={},
            outputs={}, preparation={}, domain={}, decision={}, training={}, metrics={}, tolerances={},
            git_revision="", command="",
        )
        model = hashlib.sha256(str(number).encode()).digest() * 50_000
        write_bundle(Path(sys.argv[1]), description, {"model.onnx": model, "other.npz": b"0" * 100})
"""

WRITE_STUDY = """
    import sys
    from pathlib import Path
    from offline_training.laue.study import Study

    study = Study(Path(sys.argv[1]), "test", {"seed": 1}, lambda parts: {"parts_done": len(parts)})
    for number in range(len(study.parts), 10**9):
        study.add(str(number), {"number": number, "text": "x" * 2000})
"""

# The command itself, with a checkpoint after every batch.
TRAIN = """
    import sys
    from offline_training import loop
    from grainwatch.cli import main

    loop._CHECKPOINT_EVERY_S, loop._CHECKPOINT_SHARE = 0.0, 1e9
    main()
"""


def _start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", dedent(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.system
def test_a_bundle_killed_while_it_is_written_is_whole_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    folder = tmp_path / "bundle"
    for _ in range(5):
        process = _start(WRITE_BUNDLES, str(folder))
        eventually((folder / "bundle.json").exists, 60.0)
        time.sleep(float(rng.uniform(0.3, 0.6)))
        _kill(process)
        with suppress(BundleError):
            bundle = load_bundle(folder, "laue-classes")
            number = bundle.description.about
            assert bundle.file("model.onnx") == hashlib.sha256(number.encode()).digest() * 50_000


@pytest.mark.system
def test_a_study_killed_while_it_is_written_keeps_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "study.json"
    rng = np.random.default_rng(6)
    done = 0
    for _ in range(4):
        process = _start(WRITE_STUDY, str(path))
        eventually(lambda before=done: path.exists() and _parts(path) > before, 60.0)
        time.sleep(float(rng.uniform(0.0, 0.2)))
        _kill(process)
        now = _parts(path)
        assert now > done
        done = now
    study = Study(path, "test", {"seed": 1}, lambda parts: {})
    assert [part["number"] for part in study.parts.values()] == list(range(done))


def _parts(path: Path) -> int:
    stored = json.loads(path.read_text())
    assert stored["parts_done"] == len(stored["parts"])
    return len(stored["parts"])


def test_a_file_that_is_no_study_of_this_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    settings = {"seed": 1, "steps": 5, "range": (0.1, 0.5)}
    Study(path, "laue-curve", settings, lambda parts: {}).add("a", {"values": (1, 2)})
    assert Study(path, "laue-curve", settings, lambda parts: {}).parts == {"a": {"values": [1, 2]}}
    with pytest.raises(StudyError, match=r"of another run \(steps differ\): choose another --out, or remove"):
        Study(path, "laue-curve", settings | {"steps": 6}, lambda parts: {})
    with pytest.raises(StudyError, match="is of a laue-curve"):
        Study(path, "laue-search", settings, lambda parts: {})
    path.write_bytes(msgspec.json.encode({"something": "else"}))
    with pytest.raises(StudyError, match="is no file of this command"):
        Study(path, "laue-curve", {}, lambda parts: {})


@pytest.mark.system
@pytest.mark.timeout(400)
def test_a_training_killed_and_interrupted_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason=NO_TORCH)
    pytest.importorskip("onnxscript", reason=NO_TORCH)
    from offline_training.laue.bundles import BundleRequest, make_bundle
    from offline_training.laue.networks import Tuning

    det, out = tmp_path / "cal.det", tmp_path / "bundle"
    write_det(det, CALIBRATION)
    command = [
        "train",
        "laue",
        "--material",
        "Cu",
        "--geometry",
        str(det),
        "--out",
        str(out),
        "--steps",
        "60",
    ]
    command += ["--coverage", "0.5", "--set", "batch=128", "--cores", "1"]

    killed = _start(TRAIN, *command)
    eventually((out / "checkpoint.pt").exists, 120.0)
    time.sleep(0.1)
    _kill(killed)
    with pytest.raises(BundleError, match=r"manifest\.sha256"):
        load_bundle(out, "laue-classes")

    interrupted = _start(TRAIN, *command)
    assert interrupted.stderr is not None
    shown = interrupted.stderr.readline()
    assert re.match(r"step \d+/60  loss", shown)
    interrupted.send_signal(signal.SIGINT)
    _, said = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130
    assert re.search(
        r"^grainwatch: train: interrupted after step \d+ of 60, .*the same command goes on", said, re.M
    )
    assert "Traceback" not in said

    last = _start(TRAIN, *command)
    printed, said = last.communicate(timeout=240)
    assert last.returncode == 0, said
    assert "written" in printed
    assert "time to this accuracy" in printed
    resumed = load_bundle(out, "laue-classes").description

    request = BundleRequest("Cu", str(det), steps=60, coverage=0.5, tuning=Tuning(batch=128))
    whole = make_bundle(request, tmp_path / "whole", "", cores=1)
    assert resumed.metrics["held_out"] == pytest.approx(whole["held_out"], abs=1e-6)
    assert resumed.metrics["time"]["total_s"] > resumed.metrics["time"]["training_s"] > 0
    assert resumed.training["tuning"] == {"batch": 128}
