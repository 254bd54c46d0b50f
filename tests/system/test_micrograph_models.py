"""Micrographs through a daemon with a model: every network, the watch, the shadow and the exchange."""

from __future__ import annotations

import io
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from testkit.bundles import redescribe
from testkit.process import LONG_S, DaemonProcess, eventually

from daemon.models.registry import Registry
from grainwatch.commands.status import ask
from grainwatch.messages import ChangeReport, MicrographResult
from pipelines.engines.bundle import load_bundle
from pipelines.engines.shipped import shipped_bundles
from pipelines.micrograph.model_bundle import VQVAE
from pipelines.results_files import ResultsFile, results_files

pytest.importorskip("onnx", reason="onnx writes the networks")
from testkit.micrograph_bundle import SIMULATOR, make_bundle

pytestmark = pytest.mark.system

NAME = "two-phase-trial"
GOOD, BRIGHT = 40, 15

CONFIG = """
[daemon]
name = "sem"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = 1
[models]
probation_frames = 2
[streams.sem.source]
type = "folder"
path = "{folder}/share"
series = "folder"
poll_s = 0.1
settle_s = 0.1
patience_s = 2.0
[streams.sem.pipeline]
type = "micrograph"
bundle = ["{folder}/bundle"]
neighbours = 2
acquisition = {{pixel_size_um = 0.25, detector = "SE", data_bar_px = 0}}
[sinks.hdf5]
folder = "{folder}/results"
flush_s = 0.1
"""


def put(share: Path, number: int, image: np.ndarray) -> None:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    put_bytes(share, number, content.getvalue())


def put_bytes(share: Path, number: int, content: bytes) -> None:
    hidden = share / f".{number}"
    hidden.write_bytes(content)
    hidden.rename(share / f"sem_{number:03d}.png")


def models(folder: Path, do: str, name: str = NAME, **more: Any) -> str:
    request = {"command": "models", "do": do, "name": name, "version": "2", "by": "the test", **more}
    return str(ask(folder / "run" / "control.sock", request, LONG_S)["models"]["did"])


def test_micrographs_with_a_model(tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    sha256 = make_bundle(tmp_path / "bundle")
    with DaemonProcess(tmp_path, config=CONFIG.format(folder=tmp_path)) as daemon:
        daemon.start()
        log = daemon.log_path.read_text()
        assert f"bundle {NAME} 1 prior ({sha256[:8]}): onnxruntime on the CPU" in log
        for number in range(GOOD):
            put(share, number, SIMULATOR.sample(800 + number).image)
        put_bytes(share, GOOD, b"\x89PNG\r\n\x1a\n but nothing more")
        eventually(lambda: daemon.counts()["done"] == GOOD)
        # Somebody turns up the brightness: the phases are where they were.
        for number in range(GOOD + 1, GOOD + 1 + BRIGHT):
            image = SIMULATOR.sample(800 + number).image.astype(np.int64)
            put(share, number, np.clip(image + 60, 0, 255).astype(np.uint8))
        n = GOOD + BRIGHT
        eventually(lambda: daemon.counts()["done"] == n)
        eventually(lambda: daemon.counts()["failed"] == 1)
        eventually(lambda: "images changed, seen at image" in daemon.counts()["watch"])
        eventually(lambda: "sem: images changed, seen at image" in daemon.log_path.read_text())
        assert daemon.stop() == 0
        assert daemon.audit() == []
    results, reports = stored(tmp_path)
    assert sorted(results) == [*range(GOOD), *range(GOOD + 1, GOOD + 1 + BRIGHT)]
    for result in results.values():
        assert result.provenance.model.sha256 == sha256
        assert [f.kind for f in result.fingerprints] == ["vqvae", "vae"]
        assert result.posterior is not None
        assert result.novelty is not None
    in_order = sorted(results.values(), key=lambda r: r.seq)
    assert [len(r.neighbours) for r in in_order[:4]] == [0, 1, 2, 2]
    alarm = next(n for n, r in enumerate(in_order) if "stream_changed" in r.flags)
    assert alarm >= GOOD
    assert all("stream_changed" in r.flags for r in in_order[alarm:])
    assert [r.state for r in reports][:1] == ["learning"]
    assert reports[-1].state == "changed"
    ((state, frame, why),) = [e for e in daemon.exceptions() if e[0] == "failed"]
    assert (state, frame) == ("failed", GOOD)
    assert f"sem_{GOOD:03d}.png" in why


def test_a_micrograph_model_is_tried_in_the_shadow_and_exchanged(tmp_path: Path) -> None:
    make_bundle(tmp_path / NAME)  # what the name means as long as no version is active
    make_bundle(tmp_path / "second", version=2)
    exchange(tmp_path, NAME, "1")


@pytest.mark.parametrize("name", sorted(shipped_bundles(VQVAE)))
def test_what_comes_along_is_shadowed_and_exchanged_under_its_own_stream(name: str, tmp_path: Path) -> None:
    folder = shipped_bundles()[name]
    shutil.copytree(folder, tmp_path / "second")
    redescribe(tmp_path / "second", lambda description: description.update(version="2"))
    exchange(tmp_path, name, load_bundle(folder).description.version)


def exchange(tmp_path: Path, name: str, before: str) -> None:
    """Try version 2 beside a model, exchange them, and see who answered."""
    share = tmp_path / "share"
    share.mkdir()
    config = CONFIG.format(folder=tmp_path).replace(f"{tmp_path}/bundle", name)
    with DaemonProcess(tmp_path, config=config) as daemon, closing(Registry(tmp_path / "state")) as registry:
        registry.add(tmp_path / "second", "the test")
        model = registry.find(name, "2")
        daemon.start()
        assert "computes 100 % of the frames in the shadow" in models(tmp_path, "shadow", name, share=1.0)
        put(share, 0, SIMULATOR.sample(900).image)
        eventually(lambda: registry.comparison_summary(model)["n"] == 1)
        (row,) = registry.comparisons(model)
        assert row.agree
        assert not row.error
        models(tmp_path, "activate", name)
        put(share, 1, SIMULATOR.sample(901).image)
        eventually(lambda: daemon.counts()["done"] == 2)
        assert daemon.stop() == 0
        assert daemon.audit() == []
    results, _ = stored(tmp_path)
    assert {n: r.provenance.model.version for n, r in results.items()} == {0: before, 1: "2"}
    # Fingerprints of another model are no neighbours.
    assert results[1].neighbours == ()


def stored(folder: Path) -> tuple[dict[int, MicrographResult], list[ChangeReport]]:
    """Results by frame and reports of the alarm, of the one series that there is."""
    (path,) = results_files(folder / "results")
    with ResultsFile(path) as file:
        found = list(file.messages())
    results = {m.key.frame: m for m in found if isinstance(m, MicrographResult)}
    return results, [m for m in found if isinstance(m, ChangeReport)]
