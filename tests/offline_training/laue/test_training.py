"""Training: learns, goes on after an interruption as if there had been none, stops at nonsense."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from testkit.laue import BAND_KEV, CALIBRATION, material

torch = pytest.importorskip("torch", reason="torch is absent: see docs/how-to/train-a-network.md")
pytest.importorskip("onnxscript", reason="onnxscript is absent: see docs/how-to/train-a-network.md")

from offline_training.errors import DivergedError, TrainingError  # noqa: E402
from offline_training.laue import networks  # noqa: E402
from offline_training.laue.bundles import BundleRequest, make_bundle  # noqa: E402
from offline_training.laue.evaluation import fit_calibration, probabilities_of  # noqa: E402
from offline_training.laue.figures import choose_threshold, measure  # noqa: E402
from offline_training.laue.networks import Tuning  # noqa: E402
from offline_training.laue.simulator import PatternSimulator  # noqa: E402
from offline_training.laue.training import TrainingSettings, train  # noqa: E402
from pipelines.laue.classes import ClassList, choose_classes  # noqa: E402
from pipelines.laue.lauetools_files import write_det  # noqa: E402
from pipelines.laue.proposals import SpotClassifier  # noqa: E402
from pipelines.laue.reflections import build_reflections  # noqa: E402


@cache
def _made() -> tuple[PatternSimulator, ClassList]:
    listed = build_reflections(material("Cu"), BAND_KEV)
    classes = choose_classes(listed, [CALIBRATION] * 50, np.random.default_rng(0), 0.6)
    return PatternSimulator(listed, classes, CALIBRATION), classes


def _settings(steps: int, recipe: str = "residual") -> TrainingSettings:
    return TrainingSettings(recipe, steps, spots_each=32, tuning=Tuning(batch=128))


@pytest.mark.parametrize("recipe", ["residual", "lauenn-2022", "lauenn-2022-cnn"])
def test_every_recipe_learns(tmp_path: Path, recipe: str) -> None:
    simulator, classes = _made()
    losses: list[float] = []
    train(
        simulator,
        len(classes),
        _settings(12, recipe),
        tmp_path / "c.pt",
        report=lambda p: losses.append(p.loss),
    )
    assert len(losses) == 12
    assert losses[-1] < 0.98 * math.log(len(classes))


def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    simulator, classes = _made()
    whole, _, _ = train(simulator, len(classes), _settings(6), tmp_path / "whole.pt")
    broken = tmp_path / "broken.pt"
    _, done, _ = train(simulator, len(classes), _settings(6), broken, budget_s=1e-9)
    assert done == 1
    resumed, done, _ = train(simulator, len(classes), _settings(6), broken)
    assert done == 6
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    simulator, classes = _made()
    path = tmp_path / "c.pt"
    train(simulator, len(classes), _settings(2), path)
    with pytest.raises(TrainingError, match=r"of another training .*steps.* differ"):
        train(simulator, len(classes), _settings(3), path)
    path.write_bytes(b"rubbish")
    with pytest.raises(TrainingError, match="is no checkpoint of this program"):
        train(simulator, len(classes), _settings(2), path)


def test_a_loss_that_is_no_number_stops_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator, classes = _made()
    recipe = networks.RECIPES["residual"]
    monkeypatch.setitem(networks.RECIPES, "residual", replace(recipe, learning_rate=1e30))
    with pytest.raises(DivergedError, match=r"the loss is nan at step .* nothing was exported"):
        train(simulator, len(classes), _settings(20), tmp_path / "c.pt")


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    simulator, classes = _made()
    (tmp_path / "c.part").mkdir()  # as a full disk: there is no way to write the file
    with pytest.raises(TrainingError, match=r"c\.pt: the checkpoint cannot be written .*make room"):
        train(simulator, len(classes), _settings(1), tmp_path / "c.pt")


def test_calibration_undoes_a_wrong_temperature_and_shift() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, (20_000, 5))
    p = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
    labels = (p.cumsum(axis=1) > rng.random((len(p), 1))).argmax(axis=1).astype(np.int32)
    said = 2.5 * true
    said[:, 0] += 1.5
    logits = torch.from_numpy(said.astype(np.float32))
    temperature, shift = fit_calibration(logits, labels)
    assert temperature == pytest.approx(2.5, rel=0.05)
    assert shift == pytest.approx(-0.6, abs=0.08)
    assert measure(probabilities_of(logits, 1.0, 0.0), labels, 0.5).ece > 0.05
    assert measure(probabilities_of(logits, temperature, shift), labels, 0.5).ece < 0.015


def test_figures_of_a_known_table() -> None:
    p = np.array([[0.1, 0.9, 0.0], [0.2, 0.0, 0.8], [0.9, 0.1, 0.0], [0.3, 0.7, 0.0]])
    m = measure(p, np.array([1, 1, 0, 0], dtype=np.int32), 0.75)
    assert (m.accuracy, m.accuracy_listed, m.confident_right) == (0.5, 0.5, 0.5)
    assert (m.confident_share, m.rejects_confident, m.majority_accuracy) == (0.5, 0.0, 0.5)
    assert m.ece == pytest.approx((0.1 + 0.8 - 0.1 + 0.0 + 0.7 + 0.1) / 4, abs=0.2)
    assert choose_threshold(p, np.array([1, 1, 0, 0], dtype=np.int32), 1.0, 0.0) == pytest.approx(
        0.8, abs=0.02
    )


def test_a_material_becomes_a_bundle_that_loads(tmp_path: Path) -> None:
    write_det(tmp_path / "cal.det", CALIBRATION)
    request = BundleRequest("Cu", str(tmp_path / "cal.det"), steps=4, coverage=0.5)
    metrics = make_bundle(request, tmp_path / "bundle", "grainwatch train laue ...", cores=1)
    classifier = SpotClassifier(tmp_path / "bundle")
    assert classifier.metrics == json.loads(json.dumps(metrics))
    assert classifier.domain.dd_mm.holds(CALIBRATION.dd_mm)
    assert classifier.domain.mismatch(material("Cu"), CALIBRATION, BAND_KEV) is None


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe 'magic' is not known; known: residual"):
        TrainingSettings("magic")
    write_det(tmp_path / "cal.det", CALIBRATION)
    with pytest.raises(ValueError, match="spots_each 5000: expected 1 to 1024, the spots of a batch"):
        make_bundle(BundleRequest("Cu", str(tmp_path / "cal.det"), spots_each=5000), tmp_path / "b", "")
