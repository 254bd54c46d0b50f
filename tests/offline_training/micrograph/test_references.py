"""What a bundle keeps of held-out images: who is held out, which conditions are weighed, what is judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offline_training.micrograph.data import Data, DataRequest, load_data
from offline_training.micrograph.images import Parts, part_images, synthetic_images
from offline_training.micrograph.labels import Conditions
from offline_training.micrograph.references import Candidates, fit_parts, image_features, in_parts
from pipelines.engines.bundle import SCHEMA, Bundle, Description
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.matching import ReferenceHistogram
from pipelines.micrograph.model_bundle import (
    ALARM_COMPONENTS,
    BundleParts,
    BundlePreparation,
    describe,
    pack,
)
from pipelines.micrograph.morphology import morphology
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


def test_patches_whose_likelihood_is_taken_are_spread_over_the_image() -> None:
    # Each patch of this image of 3 x 8 is as bright as its number.
    preparation = BundlePreparation(parameters=PreparationParameters(patch_px=PATCH))
    images = synthetic_images(MicrographSimulator(shape=(64, 96)), 20, preparation.parameters)
    wide = np.repeat(np.repeat(np.arange(24, dtype=np.uint8).reshape(3, 8) * 10, PATCH, 0), PATCH, 1)
    request = DataRequest("synthetic", patch_px=PATCH)
    data = Data(images, part_images(images), preparation, (wide,), request)
    asked: list[int] = []

    def likelihood(codes: np.ndarray, conditions: np.ndarray | None) -> np.ndarray:
        asked.extend((codes.mean((1, 2)) / 10).round().astype(int).tolist())
        return np.zeros((len(codes), 1))

    def read(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return patches.mean((1, 2))[:, None], patches.astype(np.int64)

    image_features(data, np.array([0]), read, likelihood, weighed=8)
    rows, columns = np.divmod(asked, 8)
    assert np.bincount(columns).tolist() == [1] * 8
    assert np.bincount(rows).tolist() == [3, 2, 3]


def test_candidates_are_what_occurs_or_places_of_the_range() -> None:
    continuous = Conditions(("rate",), np.linspace(0, 3, 50, dtype=np.float32)[:, None])
    some = np.arange(10, 40)
    seven = Candidates.of(continuous, some)
    assert len(seven.names) == 7
    assert seven.values[0] == pytest.approx(float(continuous.values[10, 0]))
    assert seven.values[-1] == pytest.approx(float(continuous.values[39, 0]))
    assert seven.standing_for(np.array([1.5], np.float32)) == 3
    few = Candidates.of(Conditions(("rate",), np.array([[1], [5], [1]], np.float32)), np.arange(3))
    assert few.values == (1.0, 5.0)
    classes = Candidates.of(Conditions(("class",), np.array([0, 1, 1]), ("a", "b")), np.arange(3))
    assert (classes.names, classes.values, classes.standing_for(np.int64(1))) == (("a", "b"), (), 1)
    two = Conditions(("rate", "carbon"), np.array([[1, 0.1], [1, 0.2], [2, 0.1]], np.float32))
    several = Candidates.of(two, np.arange(3))
    assert several.values == ()
    # In units of their spread: 0.05 of carbon counts for more than 0.2 of the rate.
    assert several.standing_for(np.array([1.2, 0.2], np.float32)) == 1
    # A pair that never occurred is neither of its neighbours.
    assert several.standing_for(np.array([2.0, 0.2], np.float32)) == -1
    with pytest.raises(ValueError, match="1 conditions"):
        Candidates.of(few_of_one(), np.arange(2))


def test_a_candidate_stands_for_what_is_nearer_than_half_way_to_the_next() -> None:
    even = Candidates.of(
        Conditions(("rate",), np.linspace(0, 3, 50, dtype=np.float32)[:, None]), np.arange(50)
    )
    asked = np.array([-0.3, -0.2, 0.0, 0.24, 0.26, 0.75, 3.2, 3.3], np.float32)
    assert [even.standing_for(value[None]) for value in asked[:5]] == [-1, 0, 0, 0, 1]
    assert even.standing_for(asked[5:6]) in (1, 2)  # midway
    assert [even.standing_for(value[None]) for value in asked[6:]] == [6, -1]
    levels = Candidates.of(Conditions(("rate",), np.array([[1], [2], [10]], np.float32)), np.arange(3))
    told = [
        levels.standing_for(np.array([value], np.float32)) for value in (1.4, 1.6, 2.4, 4.0, 7.0, 13.0, 15.0)
    ]
    assert told == [0, 1, 1, -1, 2, 2, -1]


def test_a_number_of_each_specimen_is_weighed_over_the_range_and_levels_at_their_values() -> None:
    # Eight specimens of one rate each, four images of each; two specimens are held out.
    rates = np.repeat([1.1, 2.3, 0.4, 3.1, 1.9, 2.7, 0.9, 1.5], 4).astype(np.float32)[:, None]
    groups = [f"specimen {n // 4}" for n in range(32)]
    trained_on, held_out = np.arange(24), np.arange(24, 32)
    each = Candidates.of(Conditions(("rate",), rates), trained_on, held_out=held_out, groups=groups)
    np.testing.assert_allclose(each.values, np.linspace(0.4, 3.1, 7), rtol=1e-6)
    assert [each.standing_for(rates[n]) for n in (24, 28)] == [1, 2]
    # Where what is held out was trained on, too, or nobody says what is, the values are asked for.
    same = Candidates.of(Conditions(("rate",), rates), trained_on, held_out=np.arange(4), groups=groups)
    alone = Candidates.of(Conditions(("rate",), rates), trained_on)
    assert same.values == alone.values == pytest.approx((0.4, 1.1, 1.9, 2.3, 2.7, 3.1))
    # Three treatments of several specimens each, and one specimen of another: it is none of the three.
    treated = np.repeat([1.0, 10.0, 100.0, 1.0, 10.0, 100.0, 1.0, 30.0], 4).astype(np.float32)[:, None]
    three = Candidates.of(Conditions(("s",), treated), trained_on, held_out=held_out, groups=groups)
    assert three.values == (1.0, 10.0, 100.0)
    assert [three.standing_for(treated[n]) for n in (24, 28)] == [0, -1]


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


def _specimens(rates: list[float], images_each: int, held_out: tuple[int, ...]) -> Data:
    """Images of specimens, each made at one rate; of those held out, every second one calibrates."""
    preparation = BundlePreparation(parameters=PreparationParameters(patch_px=PATCH))
    simulators = [MicrographSimulator(shape=(64, 96), ln_cooling_rates=(r, r), seed=7) for r in rates]
    sets = [
        synthetic_images(simulator, images_each, preparation.parameters, first=1000 * number)
        for number, simulator in enumerate(simulators)
    ]
    first = sets[0]
    numbers = np.repeat(np.arange(len(rates)), images_each)
    images = replace(
        first,
        names=tuple(name for each in sets for name in each.names),
        images=tuple(image for each in sets for image in each.images),
        groups=tuple(f"specimen {n}" for n in numbers),
        acquisitions=first.acquisitions * len(rates),
        statistics=np.concatenate([each.statistics for each in sets]),
        conditions=Conditions(("rate",), np.array(rates, np.float32)[numbers][:, None]),
    )
    places = {n: place for place, n in enumerate(held_out)}
    part = np.array([places.get(int(n), -1) for n in numbers])
    parts = Parts(
        np.flatnonzero(part < 0),
        np.flatnonzero((part >= 0) & (part % 2 == 0)),
        np.flatnonzero((part >= 0) & (part % 2 == 1)),
        tuple(f"specimen {n}" for n in held_out),
    )
    return Data(images, parts, preparation, images.images, DataRequest("synthetic", patch_px=PATCH))


def _weighed(data: Data, count: int = 7) -> Candidates:
    assert data.images.conditions is not None
    outside = np.concatenate([data.parts.calibration, data.parts.judged])
    return Candidates.of(
        data.images.conditions, data.parts.trained_on, count, held_out=outside, groups=data.images.groups
    )


def test_held_out_rates_that_were_not_trained_on_have_a_true_candidate_in_the_range_only() -> None:
    # 0.9 and 2.1 lie within what was trained on; 3.4 does not, by more than half of the 0.5 between places.
    data = _specimens([0.0, 0.6, 1.3, 1.8, 2.4, 3.0, 0.9, 2.1, 3.4, 3.4], 12, (6, 7, 8, 9))
    candidates = _weighed(data)
    np.testing.assert_allclose(candidates.values, np.arange(7) / 2.0, atol=1e-6)
    parts, metrics, remarks = fit_parts(data, _read, 16, _likelihood, candidates)
    assert parts.posterior is not None
    assert parts.novelty is not None
    assert parts.posterior.sources == 1
    said = metrics["posterior"]
    assert (said["images"], said["without_candidate"]["images"]) == (12, 12)
    left_out, few, calibrated = remarks
    assert left_out.startswith("24 of 48 held-out images are of a condition that no candidate stands for")
    assert "(rate: 0 to 3)" in left_out
    assert "hold out groups whose condition is trained on, or lies between two that are" in left_out
    assert "--candidates" in left_out
    assert few.startswith("images of 1 group calibrate the posterior, fewer than 10")
    assert calibrated.startswith("12 images to calibrate with are few: each counts as 2")
    # "None of these" is ranked among those that have one, novelty among all.
    assert parts.novelty.held_out.has_candidate is not None
    assert parts.novelty.held_out.has_candidate.tolist() == [True] * 24 + [False] * 24
    # With fewer places each stands for more.
    wider = _weighed(data, 3)
    assert [wider.standing_for(np.array([v], np.float32)) for v in (0.9, 2.1, 3.4)] == [1, 1, 2]
    assert not any("no candidate" in line for line in fit_parts(data, _read, 16, _likelihood, wider)[2])


def test_a_posterior_that_no_image_can_calibrate_or_judge_is_not_made_up() -> None:
    outside = _specimens([0.0, 0.6, 1.3, 1.8, 2.4, 2.0, 3.4], 12, (6, 5))
    parts, metrics, remarks = fit_parts(outside, _read, 16, _likelihood, _weighed(outside))
    assert parts.posterior is None
    assert "posterior" not in metrics
    assert "12 of 24 held-out images are of a condition that no candidate stands for" in remarks[0]
    assert remarks[1] == (
        "no posterior: held-out images: the condition of 0 is among the candidates, calibration needs 10"
    )
    # The bundle does not weigh codes then, and is judged as it will judge.
    assert parts.novelty is not None
    assert not parts.novelty.weighs_codes
    assert metrics["novelty"]["images"] == 12
    turned = _specimens([0.0, 0.6, 1.3, 1.8, 2.4, 2.0, 3.4], 12, (5, 6))
    parts, metrics, remarks = fit_parts(turned, _read, 16, _likelihood, _weighed(turned))
    assert parts.posterior is not None
    assert "posterior" not in metrics
    assert remarks[-1] == "the posterior is not judged: no image to judge by is of a candidate's condition"


def test_parts_of_images_do_not_calibrate_a_posterior() -> None:
    data = _data(60)
    candidates = Candidates.of(data.images.conditions, data.parts.trained_on, 4)  # type: ignore[arg-type]
    parts, metrics, remarks = fit_parts(data, _read, 16, _likelihood, candidates)
    assert metrics["novelty"]["parts_of_an_image"] == 4
    assert parts.posterior is None
    assert remarks[0].startswith("no posterior: held-out images: the condition of 6 is among the candidates")


def test_no_patch_is_in_two_parts() -> None:
    rng = np.random.default_rng(0)
    one = ImageFeatures(rng.normal(size=(40, 3)), None, rng.normal(size=(16, 2)))
    cut, pieces = in_parts([one])
    assert pieces == 16
    rows = np.concatenate([each.log_likelihood for each in cut if each.log_likelihood is not None])
    assert len(np.unique(rows, axis=0)) == len(rows) == 16
    # One image to calibrate with has enough of them computed.
    simulator = MicrographSimulator(shape=(256, 256))
    preparation = BundlePreparation(parameters=PreparationParameters(patch_px=PATCH))
    images = synthetic_images(simulator, 8, preparation.parameters)
    parts = Parts(np.arange(6), np.array([6]), np.array([7]), images.groups[6:])
    data = Data(images, parts, preparation, images.images, DataRequest("synthetic", patch_px=PATCH))
    made, metrics, _ = fit_parts(data, _read, 16, lambda codes, _: rng.normal(size=(len(codes), 1)))
    assert metrics["novelty"]["parts_of_an_image"] == 20
    assert made.novelty is not None
    assert made.novelty.held_out.log_likelihood is not None
    held = np.concatenate(made.novelty.held_out.log_likelihood)
    assert len(np.unique(held)) == len(held) == 20


def test_what_the_alarm_begins_with_is_kept_in_no_order() -> None:
    data = _specimens([0.2, 0.6, 1.3, 1.8, 2.4, 3.0, 0.9, 2.1, 2.8, 1.5], 12, (6, 7, 8, 9))
    found = fit_parts(data, _read, 16)[0].alarm_values
    assert found is not None
    fraction = list(ALARM_COMPONENTS).index("fraction")
    files = [morphology(data.images.images[n], patch_px=PATCH).fraction for n in data.parts.calibration]
    assert sorted(found[:, fraction]) == pytest.approx(sorted(files))
    # The first half of the files is one specimen; of what is kept, both.
    assert abs(np.mean(files[:12]) - np.mean(files[12:])) > 0.03
    assert abs(found[:12, fraction].mean() - found[12:, fraction].mean()) < 0.02


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
