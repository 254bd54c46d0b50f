"""One detector from many frames: sigmas that mean what they say, whatever the frames have in common."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from testkit.laue import AREA, CALIBRATION, material, phase, random_turns, turn_about

from pipelines.laue.calibration import CalibrationError, CalibrationSettings, Calibrator
from pipelines.laue.calibration_fit import vector_of, with_vector
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import Calibration
from pipelines.laue.indexing.refine import depth_shift
from pipelines.laue.joint_calibration import JointCalibrator, JointFit, ReferenceFrame

NOISE_PX = 0.2


def moved(move: list[float]) -> Calibration:
    return with_vector(CALIBRATION, vector_of(CALIBRATION) + np.array(move))


def frames(
    count: int,
    seed: int,
    truth: Calibration = CALIBRATION,
    *,
    orientations: int = 1,
    shared: float = 0.0,
    name: str = "Ge",
    depth_mm: float = 0.0,
) -> list[ReferenceFrame]:
    """Frames of a crystal, 15 % of its spots missing, wrong ones among them, the orientation 0.05 deg off.

    `shared` is the part of the variance that every frame of an orientation repeats.
    """
    rng = np.random.default_rng(seed)
    of = phase(name)
    turns = random_turns(orientations, seed)
    repeated: dict[int, np.ndarray] = {}
    made = []
    for number in range(count):
        turn = turns[number % orientations]
        spots = simulate_spots(turn @ of.material.B0, of.scene.reflections, truth, AREA)
        own = rng.normal(0.0, NOISE_PX * np.sqrt(1 - shared), spots.xy_px.shape)
        again = rng.normal(0.0, NOISE_PX * np.sqrt(shared), spots.xy_px.shape)
        xy = spots.xy_px + own + repeated.setdefault(number % orientations, again)
        if depth_mm:
            xy = xy + depth_mm * depth_shift(spots.xy_px, spots.energy_keV, truth.projection, truth.dd_mm)
        seen = rng.random(len(xy)) < 0.85
        wrong = rng.uniform(0, 2016, (12, 2))
        made.append(
            ReferenceFrame(
                number,
                np.concatenate([xy[seen], wrong]),
                turn_about([1.0, 2.0, -1.0], 0.05) @ turn,
                spots.hkl[seen] @ of.material.B0.T,
                np.arange(np.count_nonzero(seen)),
            )
        )
    return made


def joint(given: list[ReferenceFrame], name: str = "Ge", **changes: object) -> JointFit:
    settings = CalibrationSettings(**changes)  # type: ignore[arg-type]
    return JointCalibrator(material(name), CALIBRATION, AREA, settings).calibrate(given)


@pytest.mark.parametrize(
    ("count", "orientations", "shared"),
    [(3, 3, 0.0), (5, 1, 0.0), (5, 1, 0.8)],
    ids=["many orientations", "one crystal at rest", "residuals that come again"],
)
def test_sigmas_are_those_of_many_recordings(count: int, orientations: int, shared: float) -> None:
    rng = np.random.default_rng(17)
    z, found = [], []
    for seed in range(16):
        truth = moved((rng.normal(0.0, 1.0, 5) * [0.1, 1.0, 1.0, 0.05, 0.05]).tolist())
        fit = joint(frames(count, seed, truth, orientations=orientations, shared=shared), depth=False)
        z.append((fit.values - vector_of(truth)) / fit.sigma)
        found.append(fit.shared)
    # 80 values: one standard deviation of the spread is 8 %; the benchmark has 500.
    assert 0.76 < np.std(z) < 1.28
    assert np.all(np.abs(np.mean(z, axis=0)) < 4 / np.sqrt(16))
    assert np.mean(found) == pytest.approx(shared, abs=0.05)


def test_frames_that_differ_make_it_better_and_copies_do_not() -> None:
    one = frames(1, 3)
    alone = Calibrator(material("Ge"), CALIBRATION, AREA).calibrate(one[0].xy_px)
    single = joint(one)
    np.testing.assert_allclose(single.values, alone.values, atol=0.3 * alone.sigma.min())
    np.testing.assert_allclose(single.sigma, alone.sigma, rtol=0.1)
    copies = joint([replace(one[0], number=n) for n in range(6)])
    np.testing.assert_allclose(copies.values, single.values, atol=0.02 * single.sigma.min())
    np.testing.assert_allclose(copies.sigma, single.sigma, rtol=0.08)
    assert copies.shared == pytest.approx(1.0, abs=0.05)
    many = joint(frames(9, 3))
    np.testing.assert_allclose(many.sigma, single.sigma / 3, rtol=0.3)


def test_a_move_is_significant_and_a_detector_at_rest_is_not() -> None:
    assert joint(frames(4, 5)).unchanged > 1e-3
    far = moved([1.0, 6.0, -5.0, 0.3, -0.2])
    fit = joint(frames(4, 5, far))
    assert fit.unchanged < 1e-12
    assert np.all(np.abs(fit.values - vector_of(far)) < 3.5 * fit.sigma)
    assert fit.agreement > 1e-4
    assert fit.frames == (0, 1, 2, 3)
    assert len(fit.spots) == len(fit.xy_px) == len(fit.residual_px)
    np.testing.assert_array_equal(fit.peaks_px[fit.spots], fit.xy_px)


def test_a_depth_all_frames_share_is_found_where_there_is_one() -> None:
    fit = joint(frames(3, 6, name="Si", depth_mm=0.03), name="Si")
    assert fit.depth_mm == pytest.approx(0.03, abs=4 * np.sqrt(fit.covariance[5, 5]))
    assert np.all(np.abs(fit.values - vector_of(CALIBRATION)) < 3.5 * fit.sigma)
    assert joint(frames(3, 6)).depth_mm == 0.0


def test_a_depth_is_no_disagreement_of_frames_that_show_other_spots() -> None:
    (one, other) = frames(2, 6, name="Si", depth_mm=0.2)
    halves = []
    for frame, lower in ((one, True), (other, False)):
        # Half of the spots: those of soft photons in the one, of hard photons in the other.
        energy = np.sum(np.square(frame.g), axis=1) / -(frame.g @ frame.rotation[0])
        half = (energy < np.median(energy)) == lower
        halves.append(
            replace(
                frame,
                xy_px=frame.xy_px[frame.spots[half]],
                g=frame.g[half],
                spots=np.arange(np.count_nonzero(half)),
            )
        )
    fit = joint(halves, name="Si")
    assert fit.depth_mm == pytest.approx(0.2, abs=4 * np.sqrt(fit.covariance[5, 5]))
    assert fit.agreement > 1e-3


def refusal(given: list[ReferenceFrame], **changes: object) -> str:
    with pytest.raises(CalibrationError) as caught:
        joint(given, **changes)
    return str(caught.value)


def test_what_does_not_yield_a_calibration_is_refused() -> None:
    assert "no frame that shows a crystal of Ge" in refusal([])
    before, after = frames(8, 7), frames(8, 7, moved([0.0, 0.6, 0.0, 0.0, 0.0]))
    both = [*before[:5], *(replace(f, number=f.number + 100) for f in after[:4])]
    message = refusal(both)
    assert "the frames do not agree" in message
    assert "between frame 4 and frame 100" in message
    (far,) = frames(1, 7, moved([2.0, 25.0, -20.0, 0.6, 0.3]))
    message = refusal([*before[:5], replace(far, number=100)])
    assert "frame 100 shows too few spots where those up to 4 put the detector" in message
    few = frames(2, 8)
    five = [replace(f, xy_px=f.xy_px[:5], g=f.g[:5], spots=f.spots[:5]) for f in few]
    assert "frame 0: 5 spots are too few" in refusal([*five[:1], *before[2:5]], min_spots=5)
    cut = [replace(f, xy_px=f.xy_px[:12], g=f.g[:12], spots=f.spots[:12]) for f in few]
    assert "match in frame 1, at least 15 are needed" in refusal(cut)
    assert joint([*cut, *before]).left_out == (0, 1)
    assert "is above 0.1 px" in refusal(few, max_residual_px=0.1)
    assert "xcen_px came out as" in refusal(frames(2, 8, moved([0.0, 8.0, 0.0, 0.0, 0.0])), max_centre_px=5.0)
    inner = []
    for frame in frames(1, 9, name="ZrO2"):
        corner = np.all(frame.xy_px[frame.spots] > 1500, axis=1)
        xy = frame.xy_px[frame.spots][corner]
        inner.append(replace(frame, xy_px=xy, g=frame.g[corner], spots=np.arange(len(xy))))
    with pytest.raises(CalibrationError, match="do not determine dd_mm"):
        joint(inner, name="ZrO2", min_spots=6)
