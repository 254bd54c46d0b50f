"""Features: the histogram against the plain formula, invariance, order of partners."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import rotations
from pipelines.laue.features import LAUENN_2022, N_OWN, FeatureMaker, FeatureSpec

FloatArray = npt.NDArray[np.float64]

_PLAIN = FeatureSpec(bins=300, step_deg=0.25, partners=0, own=False)


def _vectors(n: int, seed: int) -> FloatArray:
    # Scattering vectors as a detector above the sample sees them: within 40 deg of one direction.
    v = np.random.default_rng(seed).normal((-0.7, 0.0, 0.7), 0.4, (n, 3))
    return np.asarray(v / np.linalg.norm(v, axis=1, keepdims=True))


def _by_formula(q: FloatArray, i: int, spec: FeatureSpec) -> FloatArray:
    partners = q[: spec.partners or len(q)]
    others = np.delete(partners, i, axis=0) if i < len(partners) else partners
    angle = np.degrees(np.arccos(np.clip(others @ q[i], -1, 1)))
    counts = np.histogram(angle, spec.bins, (0, spec.bins * spec.step_deg))[0].astype(float)
    return np.asarray(counts / counts.max() if spec.normalise else counts)


@pytest.mark.parametrize(
    "spec", [_PLAIN, LAUENN_2022, FeatureSpec(1400, 0.05, partners=40, own=False)], ids=str
)
def test_histograms_are_those_of_the_formula(spec: FeatureSpec) -> None:
    q = _vectors(90, 3)
    got = FeatureMaker(spec).features(q)
    assert got.shape == (90, spec.width)
    expected = np.array([_by_formula(q, i, spec) for i in range(len(q))])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_lauenn_2022_is_that_of_the_paper() -> None:
    assert (LAUENN_2022.bins, LAUENN_2022.step_deg, LAUENN_2022.width) == (900, 0.1, 900)
    assert FeatureMaker(LAUENN_2022).features(_vectors(30, 1)).max(axis=1) == pytest.approx(np.ones(30))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_angles_do_not_feel_a_rotation(seed: int) -> None:
    q = _vectors(40, seed)
    turn = rotations.to_matrix(rotations.random_rotations(1, np.random.default_rng(seed)))[0]
    maker = FeatureMaker(_PLAIN)
    # A rounding error may move an angle over the edge of a bin: the running sums differ by one there.
    difference = np.cumsum(maker.features(q), axis=1) - np.cumsum(maker.features(q @ turn.T), axis=1)
    assert np.abs(difference).max() <= 1
    assert np.count_nonzero(difference) <= 2


def test_angles_at_the_very_edges_are_counted_or_left_out() -> None:
    q = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [-1.0, 0, 0]])
    whole = FeatureMaker(FeatureSpec(bins=180, step_deg=1.0, partners=0, own=False)).features(q, [0])[0]
    assert (whole[0], whole[90]) == (1, 1)
    assert whole.sum() in (2, 3)
    half = FeatureMaker(FeatureSpec(bins=60, step_deg=1.0, partners=0, own=False)).features(q, [0])[0]
    assert half.sum() == 1


def test_numbers_of_the_spot_itself() -> None:
    q = _vectors(50, 7)
    own = FeatureMaker(FeatureSpec(bins=10, step_deg=1.0)).features(q)[:, 10:]
    assert own.shape == (50, N_OWN)
    np.testing.assert_allclose(own[:, :24].sum(axis=1), 1.0, atol=1e-6)
    sine = 0.1 + 0.9 / 23 * (own[:, :24] @ np.arange(24))
    np.testing.assert_allclose(sine, np.clip(-q[:, 0], 0.1, 1.0), atol=1e-5)
    np.testing.assert_allclose(own[:, 24:26], q[:, 1:], atol=1e-6)
    assert (np.diff(own[:, 26]) > 0).all()


def test_few_spots_and_chosen_spots() -> None:
    maker = FeatureMaker(FeatureSpec())
    q = _vectors(12, 1)
    np.testing.assert_array_equal(maker.features(q, [3, 0]), maker.features(q)[[3, 0]])
    assert maker.features(np.empty((0, 3))).shape == (0, maker.spec.width)
    assert not maker.features(q[:1])[:, : maker.spec.bins].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bins": 0}, "bins 0"), ({"step_deg": 1.0}, "up to 180"), ({"partners": -1}, "-1")],
)
def test_an_impossible_specification_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureSpec(**change)  # type: ignore[arg-type]
