"""Candidates by votes: the true orientation is among them, whatever the symmetry."""

from __future__ import annotations

import math

import numpy as np
import pytest
from testkit.laue import AREA, CALIBRATION, ONE_OF_EACH_SYSTEM, misorientation_deg, phase, random_turns

from pipelines.laue.forward import simulate_spots
from pipelines.laue.indexing.vote import AngleTable, candidates


def smallest_hkl(name: str, row: int) -> tuple[int, ...]:
    return tuple(phase(name).scene.reflections.hkl[row].tolist())


@pytest.mark.parametrize("name", ONE_OF_EACH_SYSTEM)
def test_the_true_orientation_is_a_candidate_of_every_tabulated_spot(name: str) -> None:
    listed = phase(name).scene.reflections
    table = phase(name).angles
    material = listed.material
    rotations = material.lattice_rotations
    tried = 0
    for matrix in random_turns(3, seed=17):
        spots = simulate_spots(matrix @ material.B0, listed, CALIBRATION, AREA)
        bright = np.argsort(-spots.intensity)[:300]
        q = np.ascontiguousarray(CALIBRATION.scattering_vectors(spots.xy_px[bright]))
        tabulated = listed.g_unit[table.hypothesis]
        for seed in range(min(30, len(bright))):
            g = listed.g_unit[spots.reflection[bright[seed]]]
            if np.linalg.norm((tabulated @ rotations) - g, axis=-1).min() > 1e-6:
                continue  # the table holds the reflections of small |g| alone
            tried += 1
            found, excess = candidates(table, q, seed, np.arange(len(q), dtype=np.int32), 0.15, 8)
            assert np.all(np.diff(excess) <= 0)
            np.testing.assert_allclose(
                found @ np.swapaxes(found, 1, 2), np.tile(np.eye(3), (len(found), 1, 1)), atol=1e-9
            )
            np.testing.assert_allclose(np.linalg.det(found), 1.0)
            assert min(misorientation_deg(m, matrix, material) for m in found) < 0.15
    assert tried >= 20


@pytest.mark.parametrize(
    ("name", "direction", "fold"),
    [
        ("Cu", (1, 0, 0), 4),
        ("Cu", (1, 1, 0), 2),
        ("Cu", (1, 1, 1), 3),
        ("Cu", (3, 1, 1), 1),
        ("Ti", (0, 0, 1), 6),
        ("Ti", (1, 0, 0), 2),
        ("Ti", (1, 0, 1), 1),
        ("Al2O3", (0, 0, 1), 3),
        ("Al2O3", (1, 1, 0), 2),
        ("rutile", (1, 1, 0), 2),
        ("rutile", (1, 0, 0), 2),
        ("aragonite", (0, 1, 0), 2),
        ("aragonite", (1, 1, 1), 1),
        ("ZrO2", (0, 1, 0), 2),
        ("ZrO2", (1, 0, 0), 1),
        ("triclinic", (0, 0, 1), 1),
    ],
)
def test_the_fold_of_an_axis(name: str, direction: tuple[int, int, int], fold: int) -> None:
    listed, table = phase(name).scene.reflections, phase(name).angles
    g = listed.material.B0 @ direction
    # Any equivalent of the direction may stand in the table.
    equivalents = listed.material.lattice_rotations @ (g / np.linalg.norm(g))
    distance = np.linalg.norm(listed.g_unit[table.hypothesis][:, None] - equivalents[None], axis=2).min(
        axis=1
    )
    (place,) = np.flatnonzero(distance < 1e-6)
    assert table.fold[place] == fold


@pytest.mark.parametrize("name", ONE_OF_EACH_SYSTEM)
def test_hypotheses_are_inequivalent_and_complete(name: str) -> None:
    listed, table = phase(name).scene.reflections, phase(name).angles
    rotations = listed.material.lattice_rotations
    unit = listed.g_unit[table.hypothesis]
    near = np.einsum("sij,hj->shi", rotations, unit)
    same = np.linalg.norm(near[:, :, None] - unit[None, None], axis=3).min(axis=0) < 1e-6
    np.testing.assert_array_equal(same, np.eye(len(unit), dtype=bool))
    # Every direction that is not longer than the last hypothesis is one of them, turned.
    within = listed.g_unit[: table.hypothesis[-1] + 1]
    missing = [i for i, g in enumerate(within) if np.linalg.norm(near - g, axis=2).min() > 1e-6]
    assert missing == []


@pytest.mark.parametrize("name", ONE_OF_EACH_SYSTEM)
def test_friedel_mates_are_hypotheses_of_their_own_where_no_rotation_joins_them(name: str) -> None:
    listed, table = phase(name).scene.reflections, phase(name).angles
    unit = listed.g_unit[table.hypothesis]
    rotations = listed.material.lattice_rotations
    turned = np.einsum("sij,hj->shi", rotations, unit)
    joined = np.linalg.norm(turned + unit, axis=2).min(axis=0) < 1e-6  # a rotation takes g to −g
    # A general direction and its mate differ in every crystal; only in the triclinic all of them do.
    assert joined.any() == (name != "triclinic")
    assert not joined.all()
    for g, norm in zip(unit[~joined], listed.g_norm[table.hypothesis][~joined], strict=True):
        mate = np.linalg.norm(turned + g, axis=2).min() < 1e-6
        assert mate or norm == listed.g_norm[table.hypothesis[-1]]  # where the table ends


def test_entries_of_the_table_are_angles_of_reflections() -> None:
    table: AngleTable = phase("Al2O3").angles
    listed = phase("Al2O3").scene.reflections
    for h in (0, 3, len(table.hypothesis) - 1):
        rows = slice(int(table.starts[h, 0]), int(table.starts[h, -1]))
        angle, azimuth = table.angle[rows].astype(float), table.azimuth[rows].astype(float)
        assert np.all(np.diff(angle) >= 0)
        assert np.all(azimuth < 2 * math.pi / table.fold[h])
        e1, e2, axis = table.frames[h]
        np.testing.assert_allclose(axis, listed.g_unit[table.hypothesis[h]])
        direction = np.sin(angle)[:, None] * (np.cos(azimuth)[:, None] * e1 + np.sin(azimuth)[:, None] * e2)
        direction += np.cos(angle)[:, None] * axis
        nearest = np.max(direction @ listed.g_unit[:1200].T, axis=1)
        assert nearest.min() > 1 - 1e-10


def test_few_or_coinciding_partners_give_no_candidate() -> None:
    table = phase("Cu").angles
    q = np.ascontiguousarray(CALIBRATION.scattering_vectors(np.full((40, 2), 900.0)))
    assert len(candidates(table, q, 0, np.arange(40, dtype=np.int32), 0.15, 8)[0]) == 0
    assert len(candidates(table, q, 0, np.empty(0, dtype=np.int32), 0.15, 8)[0]) == 0
