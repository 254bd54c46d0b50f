"""Whether two models found the same crystals of a frame."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grainwatch.messages import ArrayData, Crystal, FrameKey, LaueResult, ModelInfo, Provenance
from pipelines.laue.compare import SAME_DEG, compare_crystals
from pipelines.laue.crystal import load_material
from pipelines.rotations import multiply, random_rotations, to_fundamental_zone

GROUPS = {name: load_material(name).proper_point_group for name in ("Cu", "ZrO2")}
NOTHING = ArrayData.of(np.zeros((3, 3)))


def crystal(material: str, quaternion: np.ndarray, spots: int = 20) -> Crystal:
    w, x, y, z = to_fundamental_zone(quaternion, GROUPS[material]).tolist()
    return Crystal(
        material=material, UB=NOTHING, B0=NOTHING, quaternion=(w, x, y, z), euler_deg=(0.0, 0.0, 0.0),
        strain_crystal=NOTHING, strain_sample=NOTHING, strain_sigma=NOTHING, orientation_sigma_deg=0.0,
        spots_matched=spots, spots_expected=30, match_rate=0.7, chance_match_rate=0.1, false_probability=0.0,
        residual_px=0.1, depth_um=0.0, spot_indices=NOTHING, hkl=NOTHING,
    )  # fmt: skip


def result(*crystals: Crystal) -> LaueResult:
    return LaueResult(
        key=FrameKey("s", "uid", 0, ""),
        provenance=Provenance(ModelInfo("m", "1")),
        n_peaks=100,
        peaks=ArrayData.of(np.zeros((0, 4)), "<f4"),
        crystals=crystals,
    )


def turned(quaternion: np.ndarray, angle_deg: float, axis: np.ndarray) -> np.ndarray:
    half = np.deg2rad(angle_deg) / 2
    turn = np.array([np.cos(half), *(np.sin(half) * axis / np.linalg.norm(axis))])
    return np.asarray(multiply(turn, quaternion))


@given(st.integers(0, 10_000), st.integers(0, 6), st.floats(0.0, 0.9 * SAME_DEG))
def test_the_same_crystals_in_another_order_agree(seed: int, count: int, angle_deg: float) -> None:
    rng = np.random.default_rng(seed)
    materials = rng.choice(list(GROUPS), count)
    quaternions = random_rotations(count, rng)
    ours = [crystal(m, q) for m, q in zip(materials, quaternions, strict=True)]
    near = [
        crystal(m, turned(q, angle_deg, rng.normal(size=3)), 21)
        for m, q in zip(materials, quaternions, strict=True)
    ]
    rng.shuffle(near)
    found = compare_crystals(result(*ours), result(*near), GROUPS)
    assert found.agree
    assert found.figures["in_both"] == count
    assert found.figures["only_live"] == found.figures["only_shadow"] == 0
    assert found.figures["spots_more"] == count
    if count:
        assert found.figures["misorientation_deg"] == pytest.approx(angle_deg, abs=1e-4)


def test_what_only_one_of_them_found_is_counted() -> None:
    a, b, c = random_rotations(3, np.random.default_rng(1))
    live = result(crystal("Cu", a), crystal("Cu", b))
    other = result(crystal("Cu", b), crystal("Cu", c), crystal("ZrO2", a))
    found = compare_crystals(live, other, GROUPS)
    assert not found.agree
    assert {k: found.figures[k] for k in ("in_both", "only_live", "only_shadow")} == {
        "in_both": 1.0,
        "only_live": 1.0,
        "only_shadow": 2.0,
    }
    empty = compare_crystals(result(), other, GROUPS)
    assert (empty.agree, empty.figures["only_shadow"]) == (False, 3.0)
    assert "misorientation_deg" not in empty.figures
    assert compare_crystals(result(), result(), GROUPS).agree


def test_twins_and_neighbours_are_paired_with_their_own() -> None:
    """One of two near crystals must not be given the other's partner, however they are sorted."""
    rng = np.random.default_rng(2)
    (a,) = random_rotations(1, rng)
    b = turned(a, 0.8, np.array([1.0, 0, 0]))
    live = result(crystal("Cu", a), crystal("Cu", b))
    other = result(
        crystal("Cu", turned(b, -0.35, np.array([1.0, 0, 0]))),
        crystal("Cu", turned(a, 0.3, np.array([1.0, 0, 0]))),
    )
    assert compare_crystals(live, other, GROUPS).figures["in_both"] == 2


def test_a_crystal_that_is_too_far_is_another_one() -> None:
    (a,) = random_rotations(1, np.random.default_rng(3))
    live = result(crystal("Cu", a))
    far = result(crystal("Cu", turned(a, 1.1 * SAME_DEG, np.array([0.0, 1, 1]))))
    assert not compare_crystals(live, far, GROUPS).agree
    poorer = result(crystal("Cu", a, spots=3))
    assert compare_crystals(live, poorer, GROUPS).figures["spots_more"] == -17
