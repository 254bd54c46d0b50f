"""Inverse pole figure colours: corners, symmetry, continuity, and orix's fundamental sectors."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orix.quaternion import symmetry
from orix.vector import Vector3d

from pipelines.laue.crystal import load_material, material_names
from pipelines.maps.colours import ColourKey
from pipelines.rotations import multiply, random_rotations, rotate, to_fundamental_zone

LAUE = {
    group.name: group
    for group in (
        symmetry.Ci,
        symmetry.C2h,
        symmetry.D2h,
        symmetry.S6,
        symmetry.D3d,
        symmetry.C4h,
        symmetry.D4h,
        symmetry.C6h,
        symmetry.D6h,
        symmetry.Th,
        symmetry.Oh,
    )
}
TRIANGLES = {"-1": 4, "-3": 4, "2/m": 2, "-3m": 2, "4/m": 2, "6/m": 2, "m-3": 2}
HOLOHEDRY = {
    **dict.fromkeys(["-1", "2/m", "mmm"], "mmm"),
    **dict.fromkeys(["-3", "-3m", "6/m", "6/mmm"], "6/mmm"),
    **dict.fromkeys(["4/m", "4/mmm"], "4/mmm"),
    **dict.fromkeys(["m-3", "m-3m"], "m-3m"),
}
names = st.sampled_from(sorted(LAUE))


def operators(name: str) -> npt.NDArray[np.float64]:
    return np.asarray(LAUE[name].proper_subgroup.data, dtype=np.float64)


def random_directions(n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    v = rng.standard_normal((n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def test_corners_are_red_green_blue() -> None:
    def named(name: str, *directions: list[float]) -> npt.NDArray[np.float64]:
        v = np.array(directions, dtype=np.float64)
        return ColourKey.of(operators(name)).colours(v / np.linalg.norm(v, axis=1, keepdims=True))

    assert np.allclose(named("m-3m", [0, 0, 1], [1, 0, 1], [1, 1, 1]), np.eye(3), atol=1e-7)
    assert np.allclose(named("m-3m", [0, -1, 0], [0, -1, 1], [-1, 1, 1]), np.eye(3), atol=1e-7)
    # e1 || a, so 2-1-10 is at 0 deg and 10-10 at 30 deg from it
    assert np.allclose(named("6/mmm", [0, 0, 1], [1, 0, 0], [math.sqrt(3), 1, 0]), np.eye(3), atol=1e-7)
    assert np.allclose(named("4/mmm", [0, 0, 1], [1, 0, 0], [1, 1, 0]), np.eye(3), atol=1e-7)
    assert np.allclose(named("2/m", [0, 0, 1], [1, 0, 0], [0, 1, 0]), np.eye(3), atol=1e-7)


def test_a_cube_along_z_is_red() -> None:
    key = ColourKey.of(load_material("Cu").proper_point_group)
    assert np.allclose(key.orientation_colours([1.0, 0.0, 0.0, 0.0], "z"), [1, 0, 0], atol=1e-7)
    tilted = [math.cos(math.radians(22.5)), math.sin(math.radians(22.5)), 0.0, 0.0]  # 45 deg about x
    assert np.allclose(key.orientation_colours(tilted, "z"), [0, 1, 0], atol=1e-7)
    assert np.allclose(key.orientation_colours(tilted, "x"), [1, 0, 0], atol=1e-7)


@settings(deadline=None)
@given(names, st.integers(0, 2**32 - 1))
def test_equivalent_directions_have_one_colour(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    key = ColourKey.of(operators(name))
    v = random_directions(5, rng)
    colours = key.colours(v)
    assert colours.min() >= 0
    assert colours.max() <= 1
    for q in key.operators:
        assert np.allclose(key.colours(rotate(q, v)), colours, atol=1e-6)
        assert np.allclose(key.colours(-rotate(q, v)), colours, atol=1e-6)


@settings(deadline=None)
@given(names, st.integers(0, 2**32 - 1))
def test_equal_colours_mean_equivalent_directions(name: str, seed: int) -> None:
    """But for -1 and -3, where the key says that triangles share a colour."""
    rng = np.random.default_rng(seed)
    key, whole = ColourKey.of(operators(name)), operators(HOLOHEDRY[name])
    assert key.lattice == HOLOHEDRY[name]
    assert key.triangles == TRIANGLES.get(name, 1)
    v = random_directions(1, rng)[0]
    images = np.concatenate([rotate(whole, v), -rotate(whole, v)])
    same = np.abs(key.colours(images) - key.colours(v)).max(axis=1) < 1e-6
    orbit = np.concatenate([rotate(key.operators, v), -rotate(key.operators, v)])
    equivalent = (np.linalg.norm(images[:, None] - orbit[None], axis=-1) < 1e-6).any(axis=1)
    assert (same >= equivalent).all()
    if key.triangles <= 2 and key.weights(v)[0].min() > 0.01:
        assert np.array_equal(same, equivalent)


@pytest.mark.parametrize("name", sorted(LAUE))
def test_colours_are_continuous(name: str) -> None:
    rng = np.random.default_rng(0)
    key = ColourKey.of(operators(name))
    v = random_directions(20000, rng)
    near = v + rng.normal(0, 1e-6, v.shape)
    jump = np.abs(key.colours(v) - key.colours(near / np.linalg.norm(near, axis=1, keepdims=True)))
    assert jump.max() < 0.02  # a square root rises steeply next to an edge, but does not jump


@pytest.mark.parametrize("name", ["mmm", "4/mmm", "6/mmm", "m-3m"])
def test_the_triangle_is_the_fundamental_sector_of_orix(name: str) -> None:
    key = ColourKey.of(operators(name))
    v = random_directions(500, np.random.default_rng(1))
    sector = Vector3d(v).in_fundamental_sector(LAUE[name]).data
    weights, own = key.weights(v)
    assert own.all()
    assert np.allclose(weights @ key.corners, sector, atol=1e-9)


@given(st.sampled_from(material_names()), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_every_material_has_a_key_that_knows_its_symmetry(name: str, seed: int) -> None:
    group = load_material(name).proper_point_group
    key = ColourKey.of(group)
    rng = np.random.default_rng(seed)
    q = random_rotations(1, rng)[0]
    for direction in "xyz":
        colour = key.orientation_colours(q, direction)
        other = key.orientation_colours(multiply(group[rng.integers(len(group))], q), direction)
        assert np.allclose(colour, other, atol=1e-5)
        assert np.allclose(
            colour, key.orientation_colours(to_fundamental_zone(q, group), direction), atol=1e-5
        )


def test_holes_stay_holes_and_odd_axes_are_refused() -> None:
    key = ColourKey.of(operators("m-3"))
    assert np.isnan(key.colours([[math.nan] * 3])).all()
    turn = [math.cos(0.2), math.sin(0.2), 0.0, 0.0]
    moved = multiply(multiply(turn, operators("4/m")), [turn[0], -turn[1], 0.0, 0.0])
    with pytest.raises(ValueError, match="order 4 are not those of a 4/mmm lattice"):
        ColourKey.of(moved)
