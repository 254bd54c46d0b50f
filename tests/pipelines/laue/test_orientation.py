"""From UB to the published orientation, proven on what it is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffpy.structure import Lattice, Structure
from hypothesis import given
from hypothesis import strategies as st
from orix.crystal_map import Phase
from orix.quaternion import Orientation
from orix.vector import Miller

from pipelines import rotations
from pipelines.laue.crystal import load_material, material_names
from pipelines.laue.lauetools_files import read_fit
from pipelines.laue.orientation import (
    SAMPLE_FRAMES,
    lattice_rotation,
    lattice_rotation_of,
    orientation_of,
)


def ub_of_axes(name: str, a_lab: np.ndarray, c_star_lab: np.ndarray) -> np.ndarray:
    """Return UB of a crystal whose a and c* point along two given lab directions.

    Written with the direct basis alone: UB = (A⁻¹)ᵀ of the basis in the lab.
    """
    material = load_material(name)
    a, b, c = material.cell_A_deg[:3]
    alpha, beta, gamma = np.radians(material.cell_A_deg[3:])
    e1, e3 = a_lab / np.linalg.norm(a_lab), c_star_lab / np.linalg.norm(c_star_lab)
    e2 = np.cross(e3, e1)
    # a along e1, b in the plane of e1 and e2, c wherever the angles put it; then c* is along e3.
    b_vector = b * (np.cos(gamma) * e1 + np.sin(gamma) * e2)
    cx = np.cos(beta)
    cy = (np.cos(alpha) - np.cos(beta) * np.cos(gamma)) / np.sin(gamma)
    c_vector = c * (cx * e1 + cy * e2 + np.sqrt(1 - cx**2 - cy**2) * e3)
    return np.linalg.inv(np.column_stack([a * e1, b_vector, c_vector])).T


def basal_schmid_factor(quaternion: np.ndarray, load_sample: np.ndarray) -> float:
    """Return the largest Schmid factor on (0001)<11-20>, as a plasticity code has it: e1 || a, e3 || c."""
    load = rotations.rotate(quaternion, load_sample / np.linalg.norm(load_sample))
    angles = np.radians([0.0, 60.0, 120.0])
    slip = np.column_stack([np.cos(angles), np.sin(angles), np.zeros(3)])
    return float(np.max(np.abs(load[2] * (slip @ load))))


@pytest.mark.parametrize("frame", ["lab", "tilt40"])
def test_basal_schmid_factor_of_a_known_magnesium_grain(frame: str) -> None:
    # The load along sample z; c inclined by 45 deg to it and one a axis in the plane of both:
    # |cos 45 cos 45| = 1/2 exactly. With a* mistaken for a it would be cos 30 / 2 = 0.433.
    to_lab = SAMPLE_FRAMES[frame].T
    turn = rotations.to_matrix(rotations.from_euler_deg([25.0, 0.0, 0.0])).T  # any azimuth
    c_lab = to_lab @ turn @ np.array([np.sqrt(0.5), 0.0, np.sqrt(0.5)])
    a_lab = to_lab @ turn @ np.array([np.sqrt(0.5), 0.0, -np.sqrt(0.5)])
    quaternion, _ = orientation_of(ub_of_axes("Mg", a_lab, c_lab), load_material("Mg"), SAMPLE_FRAMES[frame])
    assert basal_schmid_factor(quaternion, np.array([0.0, 0.0, 1.0])) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(("azimuth_deg", "tilt_deg"), [(10.0, 20.0), (30.0, 45.0), (50.0, 70.0)])
def test_basal_schmid_factor_by_its_closed_form(azimuth_deg: float, tilt_deg: float) -> None:
    # Lab frame: c = z tilted by t from the load; the nearest a axis at azimuth w from the tilt's plane:
    # m = cos t sin t cos(w folded to within 30 deg).
    t, w = np.radians(tilt_deg), np.radians(azimuth_deg)
    c = np.array([np.sin(t), 0.0, np.cos(t)])
    in_plane, across = np.array([np.cos(t), 0.0, -np.sin(t)]), np.array([0.0, 1.0, 0.0])
    a = np.cos(w) * in_plane + np.sin(w) * across
    quaternion, _ = orientation_of(ub_of_axes("Mg", a, c), load_material("Mg"), SAMPLE_FRAMES["lab"])
    folded = np.radians(abs((azimuth_deg + 30.0) % 60.0 - 30.0))
    expected = np.cos(t) * np.sin(t) * np.cos(folded)
    assert basal_schmid_factor(quaternion, np.array([0.0, 0.0, 1.0])) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", material_names())
def test_the_orientation_turns_sample_axes_into_crystal_axes(name: str) -> None:
    rng = np.random.default_rng(1)
    material = load_material(name)
    for q in rotations.random_rotations(20, rng):
        axes = rotations.to_matrix(q)
        ub = ub_of_axes(name, axes[:, 0], axes[:, 2])
        quaternion, u = orientation_of(ub, material, SAMPLE_FRAMES["lab"])
        np.testing.assert_allclose(u @ material.B0, ub, atol=1e-12)
        # Columns of `axes` are e1, e2, e3 in the sample: the passive matrix is its transpose.
        expected = rotations.from_matrix(axes.T)
        assert rotations.misorientation_deg(quaternion, expected, material.proper_point_group) < 1e-5
        assert quaternion[0] >= 0


@pytest.mark.parametrize("name", ["Cu", "Mg", "Al2O3", "ZrO2"])
def test_orix_finds_the_plane_normals_where_ub_has_them(name: str) -> None:
    material = load_material(name)
    phase = Phase(space_group=1, structure=Structure(lattice=Lattice(*material.cell_A_deg)))
    rng = np.random.default_rng(2)
    hkl = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 2], [-2, 1, 3]])
    # orix has a || x and c* || z too, so its cartesian reciprocal vectors are ours.
    in_crystal = Miller(hkl=hkl, phase=phase).data
    np.testing.assert_allclose(in_crystal, hkl @ (material.crystal_frame @ material.B0).T, atol=1e-9)
    for q in rotations.random_rotations(5, rng):
        ub = lattice_rotation_of(q, material, SAMPLE_FRAMES["lab"]) @ material.B0
        in_sample = (~Orientation(q) * Miller(hkl=hkl, phase=phase)).data
        np.testing.assert_allclose(in_sample, hkl @ ub.T, atol=1e-9)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["Cu", "Ti", "Al2O3", "ZrO2"]),
    st.sampled_from(["lab", "tilt40"]),
)
def test_from_orientation_to_ub_and_back(seed: int, name: str, frame: str) -> None:
    material, rotation = load_material(name), SAMPLE_FRAMES[frame]
    q = rotations.to_fundamental_zone(
        rotations.random_rotations(3, np.random.default_rng(seed)), material.proper_point_group
    )
    back, _ = orientation_of(lattice_rotation_of(q, material, rotation) @ material.B0, material, rotation)
    np.testing.assert_allclose(back, q, atol=1e-9)


@pytest.mark.parametrize("name", ["Cu", "Ti", "Al2O3", "ZrO2"])
def test_equivalent_ub_are_one_orientation(name: str) -> None:
    material = load_material(name)
    u = rotations.to_matrix(rotations.random_rotations(1, np.random.default_rng(3))[0])
    quaternions, _ = orientation_of(u @ material.lattice_rotations @ material.B0, material, np.eye(3))
    np.testing.assert_allclose(quaternions - quaternions[0], 0.0, atol=1e-9)


def test_strain_leaves_the_rotation() -> None:
    material = load_material("ZrO2")
    u = rotations.to_matrix(rotations.random_rotations(1, np.random.default_rng(4))[0])
    stretch = np.eye(3) + 1e-3 * np.array([[1.0, 0.4, -0.3], [0.4, -2.0, 0.2], [-0.3, 0.2, 1.0]])
    np.testing.assert_allclose(lattice_rotation(u @ stretch @ material.B0, material), u, atol=1e-12)


def test_a_tilted_sample_leans_against_the_beam() -> None:
    normal_lab = SAMPLE_FRAMES["tilt40"].T @ np.array([0.0, 0.0, 1.0])
    np.testing.assert_allclose(normal_lab, [-np.sin(np.radians(40)), 0, np.cos(np.radians(40))])


@pytest.mark.truth
def test_the_tilted_frame_is_that_of_lauetools(truth_dir: Path) -> None:
    # The file's strain of Cu is uniaxial along the sample's normal: it pins R, not just the angle.
    for grain in read_fit(truth_dir / "truth" / "CuSi" / "SiCustrain4.fit"):
        assert grain.strain_crystal is not None
        assert grain.strain_sample is not None
        u = lattice_rotation(grain.UB, load_material(grain.material))
        to_sample = SAMPLE_FRAMES["tilt40"] @ u
        in_sample = to_sample @ grain.strain_crystal @ to_sample.T
        np.testing.assert_allclose(in_sample, grain.strain_sample, atol=2e-5)  # printed to 1e-5


@pytest.mark.parametrize("ub", [np.zeros((3, 3)), -np.eye(3), np.full((3, 3), np.nan)])
def test_what_is_no_ub_is_refused(ub: np.ndarray) -> None:
    with pytest.raises(ValueError, match="UB"):
        orientation_of(ub, load_material("Cu"), np.eye(3))


def test_what_is_no_rotation_of_the_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="sample rotation"):
        orientation_of(np.eye(3) / 3.6, load_material("Cu"), np.diag([1.0, 1.0, -1.0]))
