"""Cells, frames, symmetry and structure factors of all crystal systems."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import gemmi
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from orix.quaternion import symmetry

from pipelines.laue.crystal import Material, Site, load_material, material_names, on_hexagonal_axes

VECTORS = Path(__file__).resolve().parents[2] / "data" / "geometry_vectors.json"
Cell = tuple[float, float, float, float, float, float]

CELLS: dict[str, Cell] = {
    "triclinic": (4.1, 5.3, 6.7, 81.0, 97.0, 104.0),
    "monoclinic": (4.1, 5.3, 6.7, 90.0, 103.0, 90.0),
    "orthorhombic": (4.1, 5.3, 6.7, 90.0, 90.0, 90.0),
    "tetragonal": (4.1, 4.1, 6.7, 90.0, 90.0, 90.0),
    "trigonal": (4.1, 4.1, 6.7, 90.0, 90.0, 120.0),
    "hexagonal": (4.1, 4.1, 6.7, 90.0, 90.0, 120.0),
    "cubic": (4.1, 4.1, 4.1, 90.0, 90.0, 90.0),
}
GENERIC = (Site("Zr", 0.1131, 0.2317, 0.4173), Site("O", 0.3719, 0.0523, 0.1871))


def in_group(symbol: str, sites: tuple[Site, ...] = GENERIC) -> Material:
    group = gemmi.find_spacegroup_by_name(symbol)
    cell = CELLS[group.crystal_system_str()]
    if group.crystal_system_str() == "monoclinic":
        a, b, c, _, beta, _ = cell
        angles = {"a": (beta, 90.0, 90.0), "b": (90.0, beta, 90.0), "c": (90.0, 90.0, beta)}
        cell = (a, b, c, *angles[group.monoclinic_unique_axis()])
    return Material(symbol, cell, symbol, sites)


def small_structure(material: Material) -> gemmi.SmallStructure:
    """Return the same structure for gemmi's own structure factors."""
    structure = gemmi.SmallStructure()
    structure.cell = gemmi.UnitCell(*material.cell_A_deg)
    structure.spacegroup_hm = material.space_group
    structure.determine_and_set_spacegroup("H1")
    for site in material.sites:
        atom = gemmi.SmallStructure.Site()
        atom.label = atom.type_symbol = site.element
        atom.element = gemmi.Element(site.element)
        atom.fract = gemmi.Fractional(site.x, site.y, site.z)
        atom.occ = site.occupancy
        atom.u_iso = site.b_iso / (8 * np.pi**2)
        structure.add_site(atom)
    structure.change_occupancies_to_crystallographic()
    return structure


def sphere(limit: int) -> np.ndarray:
    axis = np.arange(-limit, limit + 1)
    hkl = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    return hkl[np.any(hkl != 0, axis=1)]


# --- cell and frames


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text(encoding="utf-8"))["cases"])
def test_b0_is_that_of_lauetools(case: dict[str, object]) -> None:
    material = load_material(str(case["material"]))
    assert list(material.cell_A_deg) == case["lattice_A_deg"]
    np.testing.assert_allclose(material.B0, np.array(case["B0"]), atol=1e-15)


lengths = st.floats(2.0, 30.0)
angles = st.floats(50.0, 130.0)


@given(st.tuples(lengths, lengths, lengths, angles, angles, angles))
def test_b0_of_any_cell(cell: Cell) -> None:
    cosines = np.cos(np.radians(cell[3:]))
    assume(1 - cosines @ cosines + 2 * cosines.prod() > 0.02)
    material = Material("any", cell, "P -1", GENERIC)
    b0 = material.B0
    assert np.array_equal(np.triu(b0), b0)
    assert (np.diag(b0) > 0).all()
    unit_cell = gemmi.UnitCell(*cell)
    hkl = sphere(2)
    spacing = [unit_cell.calculate_d(h) for h in hkl.tolist()]
    np.testing.assert_allclose(1 / np.linalg.norm(hkl @ b0.T, axis=1), spacing, rtol=1e-9)
    assert material.volume_A3 == pytest.approx(unit_cell.volume, rel=1e-9)

    frame = material.crystal_frame
    np.testing.assert_allclose(frame @ frame.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(frame) == pytest.approx(1.0)
    a, c_star = frame @ material.direct_basis[:, 0], frame @ b0[:, 2]
    np.testing.assert_allclose(a, [cell[0], 0, 0], atol=1e-9)
    np.testing.assert_allclose(c_star, [0, 0, np.linalg.norm(b0[:, 2])], atol=1e-12)


def test_the_two_frames_differ_by_30_deg_for_hexagonal_and_not_at_all_for_cubic() -> None:
    turn = np.array([[np.sqrt(3) / 2, 0.5, 0.0], [-0.5, np.sqrt(3) / 2, 0.0], [0.0, 0.0, 1.0]])
    frame = load_material("Mg").crystal_frame
    np.testing.assert_allclose(np.minimum(abs(frame - turn), abs(frame - turn.T)), 0, atol=1e-12)
    # a lies 30 deg from a*, on the side away from b*: a·b* = 0.
    mg = load_material("Mg")
    assert mg.direct_basis[:, 0] @ mg.B0[:, 1] == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_array_equal(load_material("Cu").crystal_frame, np.eye(3))


# --- symmetry

LAUE = [  # space group, Laue class, proper rotations in orix (e1 || a, e3 || c*)
    ("P -1", "-1", symmetry.C1),
    ("P 1 21/c 1", "2/m", None),  # the twofold axis is b: orix has it along c
    ("P m m m", "mmm", symmetry.D2),
    ("I 41/a", "4/m", symmetry.C4),
    ("I 4/m c m", "4/mmm", symmetry.D4),
    ("R -3:H", "-3", symmetry.C3),
    ("R -3 c:H", "-3m", symmetry.D3),
    ("P 6/m", "6/m", symmetry.C6),
    ("P 63/m m c", "6/mmm", symmetry.D6),
    ("P a -3", "m-3", symmetry.T),
    ("F d -3 m:2", "m-3m", symmetry.O),
    ("P 63 m c", "6/mmm", symmetry.D6),  # polar groups have the rotations of their Laue class
    ("F -4 3 m", "m-3m", symmetry.O),
    ("P m n 21", "mmm", symmetry.D2),
]


def same_rotations(p: np.ndarray, q: np.ndarray) -> bool:
    return len(p) == len(q) and bool(np.allclose(np.abs(p @ q.T).max(axis=1), 1.0, atol=1e-9))


@pytest.mark.parametrize(("symbol", "laue", "oracle"), LAUE)
def test_rotations_of_the_laue_group(symbol: str, laue: str, oracle: symmetry.Symmetry | None) -> None:
    material = in_group(symbol)
    assert material.laue_group == laue
    group = material.proper_point_group
    np.testing.assert_allclose(group[0], [1, 0, 0, 0], atol=1e-12)
    expected = np.array([[1, 0, 0, 0], [0, 0, 1, 0]]) if oracle is None else oracle.data
    assert same_rotations(group, expected)


def test_both_trigonal_orientations_of_the_twofold_axis() -> None:
    along_a = in_group("P -3 m 1").proper_point_group
    between = in_group("P -3 1 m").proper_point_group
    assert same_rotations(along_a, symmetry.D3x.data)
    assert same_rotations(between, symmetry.D3y.data)


@pytest.mark.parametrize("symbol", [row[0] for row in LAUE])
def test_lattice_rotations_map_the_reciprocal_lattice_to_itself(symbol: str) -> None:
    material = in_group(symbol)
    for rotation, w in zip(material.lattice_rotations, material.hkl_operators, strict=True):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        moved = sphere(2) @ material.B0.T @ rotation  # rotation⁻¹ applied to g
        np.testing.assert_allclose(moved, (sphere(2) @ w) @ material.B0.T, atol=1e-12)


# --- structure factors


@pytest.mark.parametrize("name", material_names())
def test_structure_factors_are_gemmis(name: str) -> None:
    material = load_material(name)
    hkl = sphere(4)
    structure = small_structure(material)
    calculator = gemmi.StructureFactorCalculatorX(structure.cell)  # with its symmetry images
    expected = [calculator.calculate_sf_from_small_structure(structure, h) for h in hkl.tolist()]
    np.testing.assert_allclose(material.structure_factors(hkl), expected, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "electrons"),
    [("Cu", 4 * 29), ("Si", 8 * 14), ("ZrO2", 4 * (40 + 16)), ("Al2O3", 12 * 13 + 18 * 8)],
)
def test_at_rest_all_electrons_scatter(name: str, electrons: int) -> None:
    assert load_material(name).structure_factors([[0, 0, 0]])[0] == pytest.approx(electrons, rel=1e-3)


def test_every_setting_of_every_group_extinguishes_what_gemmi_says() -> None:
    hkl = sphere(4)
    checked = 0
    for group in gemmi.spacegroup_table():
        if group.ext == "R":
            continue
        material = in_group(group.xhm())
        f2 = np.abs(material.structure_factors(hkl)) ** 2
        largest = material.largest_structure_factors(np.linalg.norm(hkl @ material.B0.T, axis=1)) ** 2
        absent = group.operations().systematic_absences(hkl.astype(np.int32))
        assert f2[absent].max(initial=0.0) < 1e-20 * largest.max(), group.xhm()
        assert (f2[~absent] / largest[~absent]).min() > 1e-12, group.xhm()
        checked += 1
    assert checked > 500


def test_well_known_extinctions() -> None:
    def visible(name: str, hkl: list[int]) -> bool:
        return bool(abs(load_material(name).structure_factors([hkl])[0]) > 1e-6)

    assert visible("Cu", [1, 1, 1])
    assert not visible("Cu", [1, 0, 0])
    assert visible("Cu", [2, 0, 0])
    assert not visible("Fe", [1, 0, 0])
    assert visible("Si", [2, 2, 0])
    assert not visible("Si", [2, 0, 0])
    assert not visible("Si", [2, 2, 2])
    assert visible("CdTe", [2, 0, 0])
    assert not visible("Mg", [0, 0, 1])
    assert not visible("Mg", [1, 1, 1])
    assert visible("ZrO2", [-1, 0, 2])
    assert not visible("ZrO2", [-1, 0, 1])


def test_a_special_position_rounded_as_in_a_cif_is_one_atom() -> None:
    exact = load_material("Mg")
    rounded = Material(
        "Mg", exact.cell_A_deg, exact.space_group, (Site("Mg", 0.3333, 0.6667, 0.25, 1.0, 1.5),)
    )
    hkl = sphere(4)
    np.testing.assert_allclose(
        np.abs(rounded.structure_factors(hkl)), np.abs(exact.structure_factors(hkl)), atol=0.01
    )
    assert abs(rounded.structure_factors([[0, 0, 1]])[0]) < 1e-9


def test_materials_travel_to_worker_processes() -> None:
    material = load_material("ZrO2")
    assert len(material.proper_point_group) == 2  # fills the caches
    assert pickle.dumps(material)


# --- CIF

CORUNDUM_R = """data_corundum
_cell_length_a 5.12692
_cell_length_b 5.12692
_cell_length_c 5.12692
_cell_angle_alpha 55.2812
_cell_angle_beta 55.2812
_cell_angle_gamma 55.2812
_symmetry_space_group_name_H-M 'R -3 c :R'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_U_iso_or_equiv
Al1 Al3+ 0.35216 0.35216 0.35216 0.002660
O1 O2- 0.55624 -0.05624 0.25 0.003293
"""


def cif(folder: Path, text: str) -> Path:
    path = folder / "structure.cif"
    path.write_text(text, encoding="utf-8")
    return path


def test_rhombohedral_axes_become_hexagonal_ones(tmp_path: Path) -> None:
    read, known = load_material(str(cif(tmp_path, CORUNDUM_R))), load_material("Al2O3")
    assert read.space_group == "R -3 c:H"
    np.testing.assert_allclose(read.cell_A_deg, known.cell_A_deg, rtol=1e-4)
    hkl = sphere(4)
    mine, theirs = np.abs(read.structure_factors(hkl)), np.abs(known.structure_factors(hkl))
    np.testing.assert_allclose(mine, theirs, atol=0.3)
    np.testing.assert_array_equal(mine < 1e-9, theirs < 1e-9)  # obverse, as the group's symbol has it


def test_hexagonal_axes_keep_every_distance() -> None:
    cell = (5.12692, 5.12692, 5.12692, 55.2812, 55.2812, 55.2812)
    hexagonal, (site,) = on_hexagonal_axes(cell, [Site("Al", 0.1, 0.25, 0.4)])
    before = gemmi.UnitCell(*cell).orthogonalize(gemmi.Fractional(0.1, 0.25, 0.4)).length()
    after = gemmi.UnitCell(*hexagonal).orthogonalize(gemmi.Fractional(site.x, site.y, site.z)).length()
    assert after == pytest.approx(before, abs=1e-9)
    assert gemmi.UnitCell(*hexagonal).volume == pytest.approx(3 * gemmi.UnitCell(*cell).volume, rel=1e-9)


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'Unobtainium' is neither built in .*; built in: Al, .*ZrO2"):
        load_material("Unobtainium")
    with pytest.raises(FileNotFoundError, match="no such CIF"):
        load_material(tmp_path / "absent.cif")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("cu", "Cu"),
        ("copper", "Cu"),
        ("Germanum", "Ge"),
        ("Sapphire", "Al2O3"),
        ("ZrO", "ZrO2"),
        ("gan", "GaN"),
    ],
)
def test_what_people_type_instead_is_understood(typed: str, meant: str) -> None:
    with pytest.raises(
        ValueError, match=rf"built in nor the path of a CIF: did you mean {meant}\? built in: Al"
    ):
        load_material(typed)


def test_all_promised_materials_are_there() -> None:
    promised = ["Cu", "Al", "Ni", "Fe", "W", "Si", "Ge", "CdTe"]
    promised += ["GaN", "ZnO", "Ti", "Mg", "Zr", "ZrO2", "Al2O3"]
    assert set(promised) <= set(material_names())


@pytest.mark.parametrize(
    ("site", "complaint"),
    [
        (("Xx", 0, 0, 0), "no chemical element"),
        (("Cu", float("nan"), 0, 0), "no coordinates"),
        (("Cu", 0, 0, 0, 0.0), "occupancy"),
        (("Cu", 0, 0, 0, 1.0, -1.0), "B = -1"),
    ],
)
def test_impossible_sites_are_refused(site: tuple[object, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Site(*site)  # type: ignore[arg-type]
