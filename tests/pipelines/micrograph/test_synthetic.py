"""The synthetic micrographs keep the law that they state, in all that pixels can say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipelines.micrograph.morphology import morphology
from pipelines.micrograph.synthetic import (
    STRUCTURES,
    Condition,
    Imaging,
    MicrographSimulator,
    ProcessLaw,
    Structure,
    two_phases,
)

SHARP = Imaging(
    blur_px=(0.0, 0.0), electrons=(1e6, 1e6), texture=0.0, shading=0.0, read_noise=0.0, line_noise=0.0
)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("size_px", "fraction"), [(24.0, 0.73), (12.0, 0.63), (9.0, 0.4)])
def test_structures_have_the_size_and_fraction_asked_for(
    structure: Structure, size_px: float, fraction: float
) -> None:
    rng = np.random.default_rng(3)
    covered, crossed = [], []
    for _ in range(24):
        bright = two_phases(structure, (256, 320), size_px, fraction, rng)
        covered.append(bright.mean())
        crossed.append((np.diff(bright, axis=0).mean() + np.diff(bright, axis=1).mean()) / 2)
    # Within four standard errors of the mean, which itself must be small enough to tell.
    for values, expected in ((covered, fraction), (crossed, 2 * fraction / size_px)):
        error = np.std(values, ddof=1) / np.sqrt(len(values))
        assert error < 0.02 * expected
        assert abs(np.mean(values) - expected) < 4 * error


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_follow_the_law_of_the_cooling_rate(structure: Structure) -> None:
    simulator = MicrographSimulator(structure=structure, shape=(256, 256), seed=5)
    law = simulator.law
    for rate in (0.0, 1.7, 3.4):
        made = [simulator.sample(i, Condition(rate, structure)) for i in range(40)]
        fraction = np.array([s.fraction for s in made])
        size = np.array([s.free_path_um for s in made])
        assert abs(fraction.mean() - law.mean_fraction(rate)) < 4 * fraction.std() / np.sqrt(40)
        # A mean of ratios is a little off the ratio of means: 2 % are allowed for that.
        allowed = 4 * size.std() / np.sqrt(40) + 0.02 * law.mean_size_um(rate)
        assert abs(size.mean() - law.mean_size_um(rate)) < allowed
    assert law.mean_size_um(np.log(2.0)) / law.mean_size_um(0.0) == pytest.approx(2**-law.exponent)
    assert law.mean_fraction(1.0) - law.mean_fraction(2.0) == pytest.approx(law.slope)


def test_the_measured_micrograph_says_what_is_true_of_it() -> None:
    simulator = MicrographSimulator(imaging=SHARP, seed=1)
    made = simulator.sample(0)
    seen = morphology(made.image, pixel_size_um=simulator.pixel_size_um)
    assert seen.fraction == pytest.approx(made.fraction, abs=1e-9)
    assert seen.free_path_um == pytest.approx(made.free_path_um, rel=1e-9)
    real = MicrographSimulator(seed=1).sample(0)
    assert (real.fraction, real.condition) == (made.fraction, made.condition)
    assert morphology(real.image).fraction == pytest.approx(made.fraction, abs=0.03)


def test_noise_shading_and_lines_are_as_stated() -> None:
    flat = np.ones((400, 300), dtype=np.bool_)
    base = replace(SHARP, bright=(0.5, 0.5))
    rng = np.random.default_rng(0)
    shot = replace(base, electrons=(400.0, 400.0)).expose(flat, rng) / 255
    assert shot.mean() == pytest.approx(0.5, abs=2e-3)
    assert shot.std() == pytest.approx(np.sqrt(0.5 / 400), rel=0.02)
    read = replace(base, read_noise=0.02).expose(flat, rng) / 255
    assert read.std() == pytest.approx(0.02, rel=0.03)
    lines = replace(base, line_noise=0.02).expose(flat, rng) / 255
    assert lines.mean(axis=1).std() == pytest.approx(0.02, rel=0.15)
    assert lines.std(axis=1).max() < 0.004
    texture = replace(base, texture=0.05).expose(flat, rng) / 255
    assert texture.std() == pytest.approx(0.05, rel=0.05)
    shaded = replace(base, shading=0.3).expose(flat, rng) / 255
    assert 0.02 < np.ptp(shaded) <= 0.5 * 2 * (1.3**2 - 0.7**2)


def test_a_number_of_a_seed_is_always_the_same_image() -> None:
    simulator = MicrographSimulator(shape=(96, 160), seed=7)
    third = simulator.sample(3)
    assert third.image.shape == (96, 160)
    again = list(simulator.samples(2, 2))[1]
    np.testing.assert_array_equal(third.image, again.image)
    assert (third.source, third.condition) == (again.source, again.condition)
    others = [
        simulator.sample(4),
        replace(simulator, seed=8).sample(3),
        simulator.sample(3, Condition(third.condition.ln_cooling_rate + 0.5)),
        replace(simulator, structure="labyrinth").sample(3),
    ]
    for other in others:
        assert other.source != third.source
        assert np.any(other.image != third.image)


def test_conditions_are_drawn_as_asked() -> None:
    rates = (0.0, 1.1, 2.3)
    some = MicrographSimulator(rates, continuous=False, shape=(16, 16))
    drawn = [s.condition.ln_cooling_rate for s in some.samples(0, 60)]
    assert set(drawn) == set(rates)
    spread = [s.condition.ln_cooling_rate for s in replace(some, continuous=True).samples(0, 60)]
    assert len(set(spread)) == 60
    assert 0.0 <= min(spread) < 0.3
    assert 2.0 < max(spread) <= 2.3


def test_everything_that_images_follow_from_is_in_the_fingerprint() -> None:
    simulator = MicrographSimulator()
    assert simulator.as_dict()["synthetic"] is True
    changed = [
        replace(simulator, seed=1),
        replace(simulator, law=ProcessLaw(slope=0.04)),
        replace(simulator, imaging=Imaging(texture=0.0)),
        replace(simulator, continuous=False),
    ]
    assert len({s.fingerprint for s in [simulator, *changed, MicrographSimulator()]}) == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": (0, 10)}, "shape"),
        ({"pixel_size_um": float("nan")}, "pixel_size_um"),
        ({"pixel_size_um": 5.0}, "structures of 1.2 px"),
        ({"ln_cooling_rates": ()}, "ln_cooling_rates"),
        ({"ln_cooling_rates": (0.0, float("inf"))}, "expected a number"),
        ({"structure": "dendrites"}, "expected one of islands"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MicrographSimulator(**wrong)  # type: ignore[arg-type]


def test_structures_that_pixels_cannot_show_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="unrelated pixels"):
        two_phases("islands", (8, 8), 3.0, 0.8, rng)
    with pytest.raises(ValueError, match="smaller than pixels"):
        two_phases("particles", (8, 8), 3.0, 0.97, rng)
    with pytest.raises(ValueError, match="expected a fraction"):
        two_phases("labyrinth", (8, 8), 10.0, 1.0, rng)
