"""A bundle is used as it was made, or refused with the file named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.engines.bundle import BundleError, load_bundle
from pipelines.engines.onnxruntime_engine import OnnxEngine

SHIPPED = Path(__file__).resolve().parents[3] / "bundles" / "Cu"
KIND = "laue-classes"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "bundle", ignore=shutil.ignore_patterns("checkpoint*")))


def _sign(folder: Path) -> None:
    # What someone does who alters a bundle and its manifest alike.
    names = sorted(p.name for p in folder.iterdir() if p.name != "manifest.sha256")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "manifest.sha256").write_text("".join(lines))


def test_a_shipped_bundle_passes_its_own_test(copy: Path) -> None:
    bundle = load_bundle(copy, KIND)
    engine = OnnxEngine(bundle)
    width = bundle.description.inputs["features"]["shape"][1]
    for batch in (1, 3, 200):
        p = engine.run(np.zeros((batch, width), np.float32))
        assert p.shape == (batch, bundle.description.outputs["probability"]["shape"][1])
        np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)
    manifest = (copy / "manifest.sha256").read_bytes()
    assert bundle.model.sha256 == hashlib.sha256(manifest).hexdigest()


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json", "classes.npz", "selftest.npz"])
def test_one_altered_byte_is_refused(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}: is not the file"):
        load_bundle(copy, KIND)


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json", "manifest.sha256"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}: cannot be read"):
        load_bundle(copy, KIND)


def test_a_manifest_reaches_no_file_outside(copy: Path) -> None:
    (copy / "manifest.sha256").write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(BundleError, match="line 1 is no sha256 and file name"):
        load_bundle(copy, KIND)


def test_a_foreign_network_is_refused(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"not a network")
    _sign(copy)
    with pytest.raises(BundleError, match="ONNX Runtime refuses it"):
        OnnxEngine(load_bundle(copy, KIND))


def test_a_network_that_answers_otherwise_is_refused(copy: Path) -> None:
    with np.load(copy / "selftest.npz", allow_pickle=False) as stored:
        x, y = stored["input"], stored["output"]
    np.savez(copy / "selftest.npz", input=x, output=np.roll(y, 1, axis=0))
    _sign(copy)
    with pytest.raises(BundleError, match=r"answers are off by .*, allowed 0.001"):
        OnnxEngine(load_bundle(copy, KIND))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "grainwatch.bundle/9"}, "this version reads 'grainwatch.bundle/1'"),
        ({"kind": "stress"}, "kind 'stress', expected 'laue-classes'"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_description_of_something_else_is_refused(
    copy: Path, change: dict[str, object], message: str
) -> None:
    description = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(description | change))
    _sign(copy)
    with pytest.raises(BundleError, match=message):
        load_bundle(copy, KIND)


def test_no_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        load_bundle(tmp_path / "nowhere", KIND)
