"""Quaternions against orix, closed forms and their own inverses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orix.quaternion import Orientation, symmetry
from orix.vector import Vector3d
from scipy import stats

from pipelines import rotations

GROUPS = {
    "-1": symmetry.C1,
    "2/m": symmetry.C2y,
    "mmm": symmetry.D2,
    "4/m": symmetry.C4,
    "4/mmm": symmetry.D4,
    "-3": symmetry.C3,
    "-3m": symmetry.D3,
    "6/m": symmetry.C6,
    "6/mmm": symmetry.D6,
    "m-3": symmetry.T,
    "m-3m": symmetry.O,
}
ANGLE = st.floats(0, 360)
unit_quaternions = (
    st.tuples(*[st.floats(-1, 1)] * 4)
    .filter(lambda q: sum(v * v for v in q) > 1e-3)
    .map(lambda q: np.array(q) / np.linalg.norm(q))
)


def same_rotation(p: np.ndarray, q: np.ndarray, atol: float = 1e-9) -> bool:
    return bool(np.allclose(np.abs(np.sum(p * q, axis=-1)), 1.0, atol=atol))


@given(unit_quaternions)
def test_matrix_and_back(q: np.ndarray) -> None:
    matrix = rotations.to_matrix(q)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1.0)
    back = rotations.from_matrix(matrix)
    assert back[0] >= 0
    assert same_rotation(back, q)


@given(unit_quaternions, unit_quaternions, st.tuples(*[st.floats(-5, 5)] * 3))
def test_the_product_turns_by_one_and_then_the_other(
    p: np.ndarray, q: np.ndarray, v: tuple[float, float, float]
) -> None:
    product = rotations.multiply(p, q)
    np.testing.assert_allclose(
        rotations.to_matrix(product), rotations.to_matrix(p) @ rotations.to_matrix(q), atol=1e-12
    )
    sandwich = rotations.multiply(rotations.multiply(q, np.array([0.0, *v])), rotations.conjugate(q))
    np.testing.assert_allclose(sandwich[1:], rotations.rotate(q, v), atol=1e-12)
    assert same_rotation(rotations.multiply(q, rotations.conjugate(q)), np.array([1.0, 0, 0, 0]))


def test_half_turns_keep_their_digits() -> None:
    half_turns = rotations.positive(
        np.array([[0, 1.0, 0, 0], [0, 0, -1.0, 0], [0, 0.6, 0, -0.8], [1e-9, 0.6, 0.8, 0]])
    )
    assert (half_turns[:, 0] >= 0).all()
    np.testing.assert_allclose(rotations.from_matrix(rotations.to_matrix(half_turns)), half_turns, atol=1e-15)


@given(ANGLE, st.floats(0, 180), ANGLE)
def test_bunge_angles_are_three_passive_turns(phi1: float, tilt: float, phi2: float) -> None:
    def z(angle: float) -> np.ndarray:
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])

    def x(angle: float) -> np.ndarray:
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        return np.array([[1, 0, 0], [0, c, s], [0, -s, c]])

    q = rotations.from_euler_deg([phi1, tilt, phi2])
    np.testing.assert_allclose(rotations.to_matrix(q), z(phi2) @ x(tilt) @ z(phi1), atol=1e-12)


@given(unit_quaternions)
def test_bunge_angles_and_back(q: np.ndarray) -> None:
    euler = rotations.to_euler_deg(q)
    assert (euler >= 0).all()
    assert (euler < [360, 180.0001, 360]).all()
    assert same_rotation(rotations.from_euler_deg(euler), q)


@pytest.mark.parametrize(
    "euler", [(0, 0, 0), (30, 0, 40), (30, 180, 40), (359.9999999, 0, 0), (10, 1e-8, 20)]
)
def test_degenerate_bunge_angles(euler: tuple[float, float, float]) -> None:
    q = rotations.from_euler_deg(euler)
    assert same_rotation(rotations.from_euler_deg(rotations.to_euler_deg(q)), q, atol=1e-12)


def test_bunge_angles_are_those_of_orix() -> None:
    rng = np.random.default_rng(1)
    euler = np.column_stack([rng.uniform(0, 360, 200), rng.uniform(0, 180, 200), rng.uniform(0, 360, 200)])
    theirs = Orientation.from_euler(euler, degrees=True)
    q = rotations.from_euler_deg(euler)
    assert same_rotation(q, theirs.data)
    np.testing.assert_allclose(rotations.to_euler_deg(q), euler, atol=1e-8)
    # and both turn a sample direction into the crystal frame
    np.testing.assert_allclose(
        rotations.rotate(q, [1.0, 2.0, 3.0]), (theirs * Vector3d([1, 2, 3])).data, atol=1e-12
    )


@pytest.mark.parametrize("laue", GROUPS)
def test_fundamental_zone_is_that_of_orix(laue: str) -> None:
    group = GROUPS[laue]
    q = rotations.random_rotations(300, np.random.default_rng(2))
    reduced = rotations.to_fundamental_zone(q, group.data)
    assert (reduced[:, 0] >= 0).all()
    theirs = Orientation(q, symmetry=group).reduce()
    np.testing.assert_allclose(reduced, rotations.positive(theirs.data), atol=1e-9)


@pytest.mark.parametrize("laue", GROUPS)
def test_misorientation_is_that_of_orix(laue: str) -> None:
    group = GROUPS[laue]
    rng = np.random.default_rng(3)
    p, q = rotations.random_rotations(100, rng), rotations.random_rotations(100, rng)
    theirs = Orientation(p, symmetry=group).angle_with(Orientation(q, symmetry=group), degrees=True)
    np.testing.assert_allclose(rotations.misorientation_deg(p, q, group.data), theirs, atol=1e-6)


@pytest.mark.parametrize("laue", GROUPS)
def test_equivalent_orientations_come_out_equal(laue: str) -> None:
    group = GROUPS[laue].data
    rng = np.random.default_rng(4)
    q = rotations.random_rotations(50, rng)
    on_the_boundary = rotations.from_euler_deg(
        [[45.0, 0.0, 0.0], [30.0, 0.0, 0.0], [0.0, 90.0, 0.0], [0.0, 180.0, 0.0]]
    )
    q = np.concatenate([q, on_the_boundary])
    equivalents = rotations.multiply(group, q[:, None, :])
    reduced = rotations.to_fundamental_zone(equivalents, group)
    np.testing.assert_allclose(reduced - reduced[:, :1], 0.0, atol=1e-8)
    np.testing.assert_allclose(rotations.misorientation_deg(equivalents, q[:, None], group), 0.0, atol=1e-5)


def test_largest_cubic_misorientation() -> None:
    q = rotations.random_rotations(20_000, np.random.default_rng(5))
    largest = rotations.angle_deg(rotations.to_fundamental_zone(q, symmetry.O.data)).max()
    assert 60 < largest <= 62.7994 + 1e-3  # Mackenzie, Biometrika 45, 229 (1958)


def test_mean_of_a_cluster() -> None:
    rng = np.random.default_rng(6)
    centre = rotations.random_rotations(1, rng)[0]
    small = np.column_stack([np.ones(4000), rng.normal(0, 0.01, (4000, 3))])
    small /= np.linalg.norm(small, axis=1, keepdims=True)
    cluster = rotations.multiply(small, centre) * rng.choice([-1.0, 1.0], (4000, 1))
    between = rotations.multiply(rotations.mean(cluster), rotations.conjugate(centre))
    assert rotations.angle_deg(between) < 0.1
    weights = np.zeros(4000)
    weights[7] = 2.0
    assert same_rotation(rotations.mean(cluster, weights), cluster[7])


def test_equivalents_are_brought_together_before_a_mean() -> None:
    rng = np.random.default_rng(7)
    group = symmetry.O.data
    centre = rotations.random_rotations(1, rng)[0]
    scattered = rotations.multiply(group[rng.integers(0, 24, 100)], centre)
    aligned = rotations.nearest_equivalent(scattered, centre, group)
    np.testing.assert_allclose(aligned, np.broadcast_to(centre, (100, 4)), atol=1e-12)


def test_no_mean_of_nothing() -> None:
    with pytest.raises(ValueError, match="undefined"):
        rotations.mean(np.empty((0, 4)))
    with pytest.raises(ValueError, match="undefined"):
        rotations.mean(np.eye(4), np.zeros(4))


def test_random_rotations_are_uniform() -> None:
    q = rotations.random_rotations(20_000, np.random.default_rng(8))
    angle = np.radians(rotations.angle_deg(q))
    # Haar measure: the density of the rotation angle is (1 − cos w)/pi.
    assert stats.kstest(angle, lambda w: (w - np.sin(w)) / np.pi).pvalue > 0.01
    turned = rotations.rotate(q, [0.0, 0.0, 1.0])
    assert stats.kstest(turned[:, 2], "uniform", args=(-1, 2)).pvalue > 0.01
    assert (
        stats.kstest(np.arctan2(turned[:, 1], turned[:, 0]), "uniform", args=(-np.pi, 2 * np.pi)).pvalue
        > 0.01
    )
