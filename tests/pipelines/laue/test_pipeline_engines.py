"""A pipeline takes the bundle that was chosen, runs it as it is told, and says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from testkit.bundles import redescribe
from testkit.engines import BreakingEngine
from testkit.laue import CALIBRATION, random_turns, simulated

from grainwatch.config import ConfigError, EnginesTable
from pipelines.engines.bundle import BundleError, load_bundle
from pipelines.engines.choice import Candidate, FallbackEngine
from pipelines.engines.cuda import probe
from pipelines.engines.onnxruntime_engine import OnnxEngine
from pipelines.engines.shipped import shipped_bundles
from pipelines.frame import ModelRef, StreamContext
from pipelines.laue.lauetools_files import write_det
from pipelines.laue.pipeline import Config, LauePipeline
from pipelines.laue.proposals import SpotClassifier

SHIPPED = shipped_bundles()["Cu"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_det(tmp_path / "cal.det", CALIBRATION)
    return Config(materials=("Cu",), geometry=str(tmp_path / "cal.det"), bundle=("Cu",))


@pytest.fixture
def another(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "another"))
    redescribe(folder, lambda description: description.update(version="7"))
    return folder


def test_a_name_means_the_bundle_that_was_chosen(config: Config, another: Path) -> None:
    sha256 = load_bundle(another).sha256
    context = StreamContext("laue", models={"Cu": ModelRef(str(another), sha256)})
    (line,) = LauePipeline(config, context).engines()
    why = f", because {probe().problem}" if probe().problem else ""
    assert line.startswith(f"bundle laue-Cu-residual 7 ({sha256[:8]}): ")
    assert line.endswith(f"fp32{why}")
    # Without a choice it is the one that comes with grainwatch.
    (line,) = LauePipeline(config, StreamContext("laue")).engines()
    assert line.startswith(f"bundle laue-Cu-residual 0.1.0 ({load_bundle(SHIPPED).sha256[:8]}): ")
    assert line in LauePipeline(config, StreamContext("laue")).describe()


def test_a_bundle_that_changed_under_the_daemon_is_refused(config: Config, another: Path) -> None:
    context = StreamContext("laue", models={"Cu": ModelRef(str(another), "0" * 64)})
    with pytest.raises(ConfigError, match=r"streams\.laue\.pipeline\.bundle: .*another: has changed since"):
        LauePipeline(config, context)


def test_the_backend_and_precision_are_those_that_are_asked_for(config: Config) -> None:
    asked = EnginesTable(backend="openvino", precision="fp32")
    (line,) = LauePipeline(config, StreamContext("laue", engines=asked)).engines()
    assert line.endswith("openvino on the CPU, fp32, because it was asked for")
    if probe().problem:
        asked = EnginesTable(backend="tensorrt-rtx")
        with pytest.raises(ConfigError, match=r"engines\.backend 'tensorrt-rtx' cannot be used: .*NVIDIA"):
            LauePipeline(config, StreamContext("laue", engines=asked))


def test_a_network_of_another_shape_is_refused(another: Path) -> None:
    redescribe(
        another,
        lambda d: d.update(inputs={"features": {"type": "float32", "shape": ["batch", 3, 1429]}}),
    )
    with pytest.raises(
        BundleError, match=r"inputs are features float32 \[batch, 3, 1429\]; a bundle of kind"
    ):
        SpotClassifier(another)


def test_a_bundle_of_another_kind_is_refused(another: Path) -> None:
    redescribe(another, lambda description: description.update(kind="stress"))
    with pytest.raises(BundleError, match="kind 'stress', expected 'laue-classes'"):
        SpotClassifier(load_bundle(another))


def test_results_go_on_when_an_engine_breaks_down(config: Config) -> None:
    pipeline = LauePipeline(config, StreamContext("laue"))
    (classifier,) = pipeline._analysis.classifiers
    bundle = load_bundle(SHIPPED)
    classifier._engine = FallbackEngine(
        [
            Candidate(
                "tensorrt", "fp32", lambda: BreakingEngine(OnnxEngine(bundle), 1, "the device is lost")
            ),
            Candidate("onnxruntime", "fp32", lambda: OnnxEngine(bundle)),
        ]
    )
    xy = simulated("Cu", random_turns(2, 5), 5).xy_px
    found = [len(pipeline._analysis.analyse_peaks(xy).crystals) for _ in range(4)]
    assert found == [2, 2, 2, 2]
    (line,) = pipeline.engines()
    assert "onnxruntime on the CPU" in line
    assert "tensorrt broke down while it ran: the device is lost" in line
