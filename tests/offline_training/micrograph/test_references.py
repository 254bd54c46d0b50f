"""What a bundle keeps of held-out images: who is held out, which conditions are weighed, what is judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offline_training.micrograph.data import Data, DataRequest, load_data
from offline_training.micrograph.images import part_images, synthetic_images
from offline_training.micrograph.labels import Conditions
from offline_training.micrograph.references import Candidates, fit_parts, image_features, in_parts
from pipelines.engines.bundle import SCHEMA, Bundle, Description
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.matching import ReferenceHistogram
from pipelines.micrograph.model_bundle import BundleParts, BundlePreparation, describe, pack
from pipelines.micrograph.novelty import ImageFeatures
from pipelines.micrograph.posterior import fit_posterior
from pipelines.micrograph.preparation import PreparationParameters
from pipelines.micrograph.synthetic import MicrographSimulator

PATCH = 32


def _data(count: int = 200) -> Data:
    preparation = BundlePreparation(parameters=PreparationParameters(patch_px=PATCH))
    images = synthetic_images(MicrographSimulator(shape=(64, 96)), count, preparation.parameters)
    parts = part_images(images)
    return Data(images, parts, preparation, images.images, DataRequest("synthetic", patch_px=PATCH))


def _read(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stand in for networks: means of quarters as latents, coarse greys as codes."""
    quarters = patches.reshape(len(patches), 2, PATCH // 2, 2, PATCH // 2).mean((2, 4)).reshape(-1, 4)
    codes = patches.reshape(len(patches), 4, 8, 4, 8).mean((2, 4)).astype(np.int64) // 16
    return quarters.astype(np.float32), codes


def _likelihood(codes: np.ndarray, conditions: np.ndarray | None) -> np.ndarray:
    """Nats that know the law, brighter under slow cooling; without conditions, the middle of it."""
    seen = codes.mean((1, 2))[:, None]
    if conditions is None:
        return -((seen - 9.0) ** 2)
    return -((seen - (9.5 - 0.3 * conditions[:, 0])) ** 2)


def test_candidates_are_what_occurs_or_places_of_the_range() -> None:
    continuous = Conditions(("rate",), np.linspace(0, 3, 50, dtype=np.float32)[:, None])
    some = np.arange(10, 40)
    seven = Candidates.of(continuous, some)
    assert len(seven.names) == 7
    assert seven.values[0] == pytest.approx(float(continuous.values[10, 0]))
    assert seven.values[-1] == pytest.approx(float(continuous.values[39, 0]))
    assert seven.nearest(np.array([1.5], np.float32)) == 3
    few = Candidates.of(Conditions(("rate",), np.array([[1], [5], [1]], np.float32)), np.arange(3))
    assert few.values == (1.0, 5.0)
    classes = Candidates.of(Conditions(("class",), np.array([0, 1, 1]), ("a", "b")), np.arange(3))
    assert (classes.names, classes.values, classes.nearest(np.int64(1))) == (("a", "b"), (), 1)
    two = Conditions(("rate", "carbon"), np.array([[1, 0.1], [1, 0.2], [2, 0.1]], np.float32))
    several = Candidates.of(two, np.arange(3))
    assert several.values == ()
    # In units of their spread: 0.05 of carbon counts for more than 0.2 of the rate.
    assert several.nearest(np.array([1.2, 0.2], np.float32)) == 1
    with pytest.raises(ValueError, match="1 conditions"):
        Candidates.of(few_of_one(), np.arange(2))


def few_of_one() -> Conditions:
    return Conditions(("rate",), np.ones((2, 1), np.float32))


def test_parts_judge_images_of_their_kind_and_come_back_from_a_bundle() -> None:
    data = _data()
    candidates = Candidates.of(data.images.conditions, data.parts.trained_on, 4)  # type: ignore[arg-type]
    parts, metrics, remarks = fit_parts(data, _read, 16, _likelihood, candidates)
    assert remarks == []
    assert parts.novelty is not None
    assert parts.posterior is not None
    assert metrics["novelty"]["images"] == 20
    assert metrics["novelty"]["called_novel"] <= 5
    assert metrics["posterior"]["log_score"] > metrics["posterior"]["prior_log_score"]
    assert parts.alarm_values is not None
    assert parts.alarm_values.shape == (20, len(parts.alarm_names))
    assert parts.domain.pixel_size_um == (0.25, 0.25)
    dark = np.random.default_rng(0).integers(0, 40, (6, PATCH, PATCH)).astype(np.uint8)
    latents, codes = _read(dark)
    assert parts.novelty.judge(ImageFeatures(latents, codes, _likelihood(codes, candidates.inputs))).novel
    described = describe(parts)
    assert described["decision"]["codebook"] == 16
    assert pack(parts)["reference.npz"]


def test_codes_are_weighed_without_conditions_too() -> None:
    parts, _, remarks = fit_parts(_data(), _read, 16, _likelihood)
    assert remarks == []
    assert parts.posterior is None
    assert parts.novelty is not None
    assert parts.novelty.weighs_codes
    latents, codes = _read(np.random.default_rng(0).integers(0, 255, (6, PATCH, PATCH)).astype(np.uint8))
    judged = parts.novelty.judge(ImageFeatures(latents, codes, _likelihood(codes, None)))
    assert judged.bits_per_code == pytest.approx(-_likelihood(codes, None).mean() / 16 / np.log(2))


def test_few_images_count_as_several_and_that_is_said() -> None:
    data = _data(60)
    assert len(data.parts.calibration) == 6
    parts, metrics, remarks = fit_parts(data, _read, 16)
    assert parts.novelty is not None
    assert metrics["novelty"]["parts_of_an_image"] == 4
    assert "6 images to calibrate with are few: each counts as 4" in remarks[0]
    features = image_features(data, data.parts.calibration, _read)
    cut, pieces = in_parts(features)
    assert (len(cut), pieces) == (24, 4)
    whole = np.concatenate([f.latents for f in features])
    np.testing.assert_array_equal(np.concatenate([f.latents for f in cut]), whole)
    # With one patch each there is nothing to cut, and nothing to calibrate by.
    single = [replace(f, latents=f.latents[:1], codes=None) for f in features]
    assert in_parts(single) == (single, 1)


def test_a_posterior_is_calibrated_on_whole_images_where_there_are_enough() -> None:
    data = _data(120)
    assert len(data.parts.calibration) == 12
    assert data.images.conditions is not None
    candidates = Candidates.of(data.images.conditions, data.parts.trained_on, 4)
    parts, metrics, _ = fit_parts(data, _read, 16, _likelihood, candidates)
    assert metrics["novelty"]["parts_of_an_image"] == 2
    whole = image_features(data, data.parts.calibration, _read, _likelihood, candidates)
    expected = fit_posterior("", candidates.names, candidates.inputs, whole)
    assert parts.posterior is not None
    assert parts.posterior.correlation == expected.correlation
    assert parts.posterior.sharpness == expected.sharpness
    # Parts would say something else.
    halves = fit_posterior("", candidates.names, candidates.inputs, in_parts(whole)[0])
    assert halves.sharpness != expected.sharpness


def _base(data: Data) -> Bundle:
    parts = BundleParts(data.preparation, data.domain(), 16)
    description = Description(
        schema=SCHEMA,
        kind="micrograph-vqvae",
        name="m",
        version="1",
        about="",
        inputs={},
        outputs={},
        training={"data": data.record()},
        metrics={},
        tolerances={},
        git_revision="",
        command="",
        **describe(parts),
    )
    return Bundle(Path("base"), description, "", pack(parts))


def test_what_a_bundle_was_trained_on_is_never_held_out_later(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number, sample in enumerate(MicrographSimulator(shape=(48, 48)).samples(0, 12)):
        Image.fromarray(sample.image).save(folder / f"g{number // 2}_{number}.png")
    request = DataRequest(str(folder), group=r"g\d", patch_px=32)
    first = load_data(request)
    base = _base(first)
    again = load_data(DataRequest(str(folder), group=r"g\d"), base)
    for name in ("trained_on", "calibration", "judged"):
        np.testing.assert_array_equal(getattr(again.parts, name), getattr(first.parts, name))
    assert again.patch_px == 32
    inside, outside = first.images.groups[first.parts.trained_on[0]], first.parts.held_out[0]
    with pytest.raises(ValueError, match=f"--held-out {inside}: base was trained on it"):
        load_data(replace(request, held_out=(inside,)), base)
    # Another image more, and the groups that nobody saw stay those that are held out.
    Image.fromarray(MicrographSimulator(shape=(48, 48)).sample(50).image).save(folder / f"{outside}_99.png")
    more = load_data(request, base)
    assert set(more.parts.held_out) == set(first.parts.held_out)
    for number in range(60, 70):
        image = MicrographSimulator(shape=(48, 48)).sample(number).image
        Image.fromarray(image).save(folder / f"g9_{number}.png")
    assert set(load_data(request, base).parts.held_out) == set(first.parts.held_out)
    # Without the groups, an image is known by what it shows.
    alone = load_data(replace(request, group=""), base)
    assert {name[:2] for name in alone.parts.held_out} == set(first.parts.held_out)
    assert "g9_60.png" not in alone.parts.held_out
    for path in folder.iterdir():
        if not path.name.startswith(inside):
            path.unlink()
    with pytest.raises(ValueError, match="trained on all of these images"):
        load_data(request, base)


def test_the_domain_is_what_was_trained_on() -> None:
    data = _data(20)
    sizes = [Acquisition(pixel_size_um=0.1 * (i + 1), detector="ETD" if i else "") for i in range(20)]
    some = replace(data, images=replace(data.images, acquisitions=tuple(sizes)))
    low, high = some.domain().pixel_size_um or (0.0, 0.0)
    trained = data.parts.trained_on
    assert (low, high) == pytest.approx((0.1 * (trained.min() + 1), 0.1 * (trained.max() + 1)))
    assert some.domain().detectors == (() if 0 in trained else ("ETD",))
    with pytest.raises(ValueError, match="--patch-px 100: expected a multiple of 16"):
        load_data(DataRequest("synthetic", patch_px=100))


def test_matched_images_have_the_histogram_of_one_that_is_trained_on() -> None:
    data = load_data(DataRequest("synthetic:10", patch_px=128, match=True))
    reference = data.preparation.parameters.reference
    assert reference is not None
    trained = [data.images.images[i] for i in data.parts.trained_on]
    assert reference in [ReferenceHistogram.of([image]) for image in trained]
    # All have the same greys now, held out or not.
    middles = [np.median(data.seen[i]) for i in range(10)]
    assert np.ptp(middles) <= 2
    assert np.ptp([np.median(image) for image in data.images.images]) > 5
