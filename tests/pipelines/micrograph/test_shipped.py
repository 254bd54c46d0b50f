"""The models of micrographs that come along: small, honest, and worth something on images they never saw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.engines.bundle import load_bundle
from pipelines.engines.shipped import shipped_bundles
from pipelines.files import open_images
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.analysis import MicrographAnalysis
from pipelines.micrograph.model_bundle import VQVAE
from pipelines.micrograph.networks import MicrographModel
from pipelines.micrograph.synthetic import MicrographSimulator

SHIPPED = shipped_bundles(VQVAE)
LARGEST_BYTES = 10e6
TAKEN = Acquisition(pixel_size_um=0.25, data_bar_px=0)


@pytest.fixture(scope="module")
def analyses() -> dict[str, MicrographAnalysis]:
    return {name: MicrographAnalysis([MicrographModel(path)]) for name, path in SHIPPED.items()}


def test_both_come_along() -> None:
    assert sorted(SHIPPED) == ["ni-superalloy", "two-phase-synthetic"]


def test_both_say_what_they_were_calibrated_on(analyses: dict[str, MicrographAnalysis]) -> None:
    nickel, synthetic = (analyses[name].models[0].parts for name in ("ni-superalloy", "two-phase-synthetic"))
    assert nickel.posterior is None
    assert nickel.novelty is not None
    assert synthetic.novelty is not None
    assert (nickel.novelty.held_out.by_source, synthetic.novelty.held_out.by_source) == (False, True)
    # All candidates stand for all of its 200 images, each of a place of its own.
    assert synthetic.novelty.held_out.has_candidate is None
    assert len(set(synthetic.novelty.held_out.sources.tolist())) == 200


@pytest.mark.parametrize("name", SHIPPED)
def test_what_comes_along_is_small_and_says_how_it_was_made_and_judged(name: str) -> None:
    folder = SHIPPED[name]
    told = load_bundle(folder).description
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST_BYTES
    assert told.name == name
    assert told.command.startswith("grainwatch train ")
    assert not [word for word in told.command.split() if word.startswith(("/", "~", ".."))]
    data = told.training["data"]
    assert not set(data["trained_on"]) & set(data["held_out"])
    assert set(data["judged_on"]) <= set(data["held_out"])
    held_out: dict[str, Any] = told.metrics["held_out"]
    assert held_out["psnr_dB"] > held_out["pooling_psnr_dB"]
    assert held_out["codes_alive"] > 64
    prior: dict[str, Any] = told.metrics["prior"]["held_out"]
    assert prior["bits"] < min(prior["order_0_bits"], prior["context_bits"])


def test_the_cooling_rate_of_fresh_images_is_read(analyses: dict[str, MicrographAnalysis]) -> None:
    simulator = MicrographSimulator(seed=4711)
    off, guess, scores = [], [], []
    for sample in simulator.samples(0, 16):
        found = analyses["two-phase-synthetic"].analyse(sample.image, TAKEN)
        assert found.posterior is not None
        assert found.posterior.mean is not None
        rate = sample.condition.ln_cooling_rate
        off.append(found.posterior.mean - rate)
        guess.append(1.7 - rate)
        nearest = int(np.argmin(np.abs(np.array(found.posterior.values) - rate)))
        scores.append(math.log(found.posterior.probability[nearest]))
    assert np.square(off).mean() < 0.25 * np.square(guess).mean()
    assert np.mean(scores) > -math.log(7)


@pytest.mark.parametrize("structure", ["labyrinth", "particles"])
def test_other_structures_fit_no_cooling_rate(
    structure: Any, analyses: dict[str, MicrographAnalysis]
) -> None:
    simulator = MicrographSimulator(seed=4711, structure=structure)
    found = [analyses["two-phase-synthetic"].analyse(s.image, TAKEN) for s in simulator.samples(0, 6)]
    assert sum("none_of_these" in one.flags for one in found) >= 4


def test_each_finds_the_images_of_the_other_novel(
    analyses: dict[str, MicrographAnalysis], truth_dir: Path
) -> None:
    folder = truth_dir.parent / "micrographs" / "ni_superalloy" / "images"
    if not folder.is_dir():
        pytest.skip("third-party micrographs are absent: set GRAINWATCH_DATA")
    real = [next(iter(open_images(path))).pixels for path in sorted(folder.glob("test__*.png"))]
    synthetic = [sample.image for sample in MicrographSimulator(seed=4711).samples(0, 3)]
    for name, own, others in (
        ("ni-superalloy", real, synthetic),
        ("two-phase-synthetic", synthetic, real),
    ):
        novel = [
            [analyses[name].analyse(image, TAKEN).novelty for image in images] for images in (own, others)
        ]
        strange = [[one is not None and one.novel for one in some] for some in novel]
        assert sum(strange[0]) <= 1
        assert all(strange[1])
