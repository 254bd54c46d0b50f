"""CIFs as they come: used as physics has it, or refused by one line; never read as something else."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path

import gemmi
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.laue.crystal import Material, load_material

ZIRCONIA = """data_zro2
_cell_length_a 5.1505(1)
_cell_length_b 5.2116(1)
_cell_length_c 5.3173(1)
_cell_angle_alpha 90
_cell_angle_beta 99.23(1)
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1 21/c 1'
_cell_formula_units_Z 4
_chemical_formula_sum 'O2 Zr'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
_atom_site_disorder_group
_atom_site_B_iso_or_equiv
Zr1 Zr 0.2754(1) 0.0395(1) 0.2083(1) 1.0 . 0.4
O1 O 0.0700(1) 0.3317(1) 0.3447(1) 1.0 . 0.6
O2 O 0.4496(1) 0.7569(1) 0.4792(1) 1.0 . 0.6
"""

CUBIC = """data_{name}
_cell_length_a {a}
_cell_length_b {a}
_cell_length_c {a}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
{symmetry}
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
_atom_site_disorder_group
_atom_site_U_iso_or_equiv
{sites}
"""


def cubic(*sites: str, a: float = 3.6, group: str = "F m -3 m", name: str = "x", symmetry: str = "") -> str:
    named = symmetry or f"_space_group_name_H-M_alt '{group}'"
    return CUBIC.format(a=a, symmetry=named, sites="\n".join(sites), name=name)


def listed(symbol: str) -> str:
    """The loop of operations of a group, as most programs write it."""
    ops = gemmi.find_spacegroup_by_name(symbol).operations()
    return "loop_\n_symmetry_equiv_pos_as_xyz\n" + "\n".join(f"'{op.triplet()}'" for op in ops)


COPPER = "Cu1 Cu 0 0 0 1 . 0.007"
SILICON_1 = "Si1 Si 0 0 0 1 . 0.006"
SILICON_2 = "Si1 Si 0.125 0.125 0.125 1 . 0.006"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "structure.cif"


def read(path: Path, text: str | bytes) -> Material:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_material(path)


def refusal(path: Path, text: str | bytes) -> str:
    """What a refused file is told, less its name."""
    with pytest.raises(ValueError, match=r".") as caught:
        read(path, text)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def sphere(limit: int) -> np.ndarray:
    axis = np.arange(-limit, limit + 1)
    hkl = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    return hkl[np.any(hkl != 0, axis=1)]


def form_factor(element: str, hkl: np.ndarray, a: float, u: float) -> np.ndarray:
    s2 = np.sum(hkl**2, axis=1) / (4 * a * a)
    of = gemmi.Element(element).it92
    return np.array([of.calculate_sf(s) for s in s2]) * np.exp(-8 * math.pi**2 * u * s2)


def by_gemmi(path: Path, hkl: np.ndarray) -> np.ndarray:
    """Structure factors of the file by gemmi alone: its reader, its calculator."""
    structure = gemmi.read_small_structure(str(path))
    structure.change_occupancies_to_crystallographic()
    calculator = gemmi.StructureFactorCalculatorX(structure.cell)
    return np.array([calculator.calculate_sf_from_small_structure(structure, h) for h in hkl.tolist()])


# ---------------------------------------------------------------- what is used


def test_a_cif_is_the_built_in_material(path: Path) -> None:
    found, known = read(path, ZIRCONIA), load_material("ZrO2")
    assert found.name == "structure"
    assert found.cell_A_deg == known.cell_A_deg
    assert (found.remarks, found.doubtful) == ((), False)
    hkl = sphere(4)
    np.testing.assert_allclose(found.structure_factors(hkl), known.structure_factors(hkl), atol=1e-6)


def test_a_mixed_site_scatters_as_its_average_atom(path: Path) -> None:
    # Cd0.9 Zn0.1 Te, zinc blende: F = 4 (0.9 f_Cd + 0.1 f_Zn + f_Te i^(h+k+l)) for unmixed hkl, else 0.
    a, u = 6.46, 0.01
    found = read(
        path,
        cubic(
            f"Cd1 Cd 0 0 0 0.9 . {u}",
            f"Zn1 Zn 0 0 0 0.1 . {u}",
            f"Te1 Te 0.25 0.25 0.25 1 . {u}",
            a=a,
            group="F -4 3 m",
        ),
    )
    assert found.remarks == ()
    hkl = sphere(4)
    parity = hkl % 2
    unmixed = (parity == parity[:, :1]).all(axis=1)
    mixed = 0.9 * form_factor("Cd", hkl, a, u) + 0.1 * form_factor("Zn", hkl, a, u)
    expected = 4 * (mixed + form_factor("Te", hkl, a, u) * 1j ** (hkl.sum(axis=1) % 4)) * unmixed
    np.testing.assert_allclose(found.structure_factors(hkl), expected, atol=1e-4)
    np.testing.assert_allclose(found.structure_factors(hkl), by_gemmi(path, hkl), atol=2e-4)


def test_a_partly_filled_site_on_a_special_position_counts_with_its_share(path: Path) -> None:
    # Wuestite Fe0.95 O: rock salt with 5 % vacancies. F = 4 (0.95 f_Fe + f_O (-1)^h).
    a = 4.31
    text = cubic("Fe1 Fe 0 0 0 0.95 . 0.008", "O1 O 0.5 0.5 0.5 . . 0.008", a=a)
    found = read(path, text)
    hkl = np.array([[1, 1, 1], [2, 0, 0], [3, 1, 1], [4, 2, 0]])
    sign = np.where(hkl[:, 0] % 2, -1, 1)
    expected = 4 * (0.95 * form_factor("Fe", hkl, a, 0.008) + sign * form_factor("O", hkl, a, 0.008))
    np.testing.assert_allclose(found.structure_factors(hkl), expected, atol=1e-4)
    full = read(path, text.replace("0.95", "1"))
    weak = np.array([[1, 1, 1]])
    assert abs(found.structure_factors(weak)[0]) < abs(full.structure_factors(weak)[0])


@pytest.mark.parametrize(("one", "other"), [("1", "2"), ("A", "B"), ("-1", "-2")])
def test_alternatives_of_a_disordered_group_are_averaged(path: Path, one: str, other: str) -> None:
    # An atom in one of two places along z, 70 to 30: f (0.7 exp(2πi l z1) + 0.3 exp(2πi l z2)).
    a, z1, z2 = 5.0, 0.10, 0.22
    symmetry = "_space_group_name_H-M_alt 'P 1'"
    found = read(
        path,
        cubic(
            f"O1A O 0.3 0.2 {z1} 0.7 {one} 0.01", f"O1B O 0.3 0.2 {z2} 0.3 {other} 0.01",
            a=a, symmetry=symmetry,
        ),
    )  # fmt: skip
    hkl = sphere(3)
    h, k, l_ = hkl.T
    waves = 0.7 * np.exp(2j * np.pi * l_ * z1) + 0.3 * np.exp(2j * np.pi * l_ * z2)
    expected = form_factor("O", hkl, a, 0.01) * np.exp(2j * np.pi * (0.3 * h + 0.2 * k)) * waves
    np.testing.assert_allclose(found.structure_factors(hkl), expected, atol=1e-4)
    assert found.remarks[0] == "disordered, the average over all cells is used: O1A, O1B"


@pytest.mark.parametrize("split_A", [0.03, 0.3])
def test_an_atom_split_about_a_special_position_is_one_atom(path: Path, split_A: float) -> None:
    # Half an atom at z and half at -z about the mirror of P m: together f cos(2π l z), however near.
    a = 5.0
    z = split_A / 2 / a
    symmetry = "_space_group_name_H-M_alt 'P 1 1 m'"
    found = read(path, cubic(f"O1 O 0.3 0.2 {z} 0.5 -1 0.01", a=a, symmetry=symmetry))
    hkl = sphere(2)
    h, k, l_ = hkl.T
    average = form_factor("O", hkl, a, 0.01) * np.cos(2 * np.pi * l_ * z)
    expected = average * np.exp(2j * np.pi * (0.3 * h + 0.2 * k))
    np.testing.assert_allclose(np.abs(found.structure_factors(hkl)), np.abs(expected), atol=0.01)
    assert found.remarks == ("disordered, the average over all cells is used: O1",)
    assert not found.doubtful


def test_operations_count_where_the_symbol_is_that_of_the_type(path: Path) -> None:
    # "P 21/c" is the type of P 1 21/n 1, and is written beside its operations often enough.
    text = ZIRCONIA.replace("'P 1 21/c 1'\n", f"'P 21/c'\n{listed('P 1 21/n 1')}\n")
    found = read(path, text.replace("99.23(1)", "90.5"))
    assert found.space_group == "P 1 21/n 1"
    assert found.remarks == (
        "space group is named P 21/c, the symmetry operations are those of P 1 21/n 1:"
        " the symmetry operations count",
    )


@pytest.mark.parametrize("symbol", ["F d -3 m", "F d -3 m S", "?"])
def test_operations_tell_the_origin(path: Path, symbol: str) -> None:
    for origin, site in (("1", SILICON_1), ("2", SILICON_2)):
        symmetry = f"_symmetry_space_group_name_H-M '{symbol}'\n{listed(f'F d -3 m:{origin}')}"
        found = read(path, cubic(site, a=5.43, symmetry=symmetry))
        assert found.space_group == f"F d -3 m:{origin}"
        known = np.abs(load_material("Si").structure_factors(sphere(3)))
        np.testing.assert_array_equal(np.abs(found.structure_factors(sphere(3))) > 1, known > 1)
        assert found.remarks == ()


@pytest.mark.parametrize("symbol", ["Fm-3m", "F m 3 m", "F M -3 M", "F m -3 m "])
def test_a_symbol_may_be_written_as_people_write_it(path: Path, symbol: str) -> None:
    assert read(path, cubic(COPPER, group=symbol)).space_group == "F m -3 m"


def test_brackets_and_the_hall_symbol_are_understood(path: Path) -> None:
    assert read(path, ZIRCONIA.replace("P 1 21/c 1", "P 2(1)/c")).space_group == "P 1 21/c 1"
    hall = "_space_group_name_Hall '-F 4 2 3'\n_space_group_IT_number 225"
    assert read(path, cubic(COPPER, symmetry=hall)).space_group == "F m -3 m"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + cubic(COPPER).encode(),
        cubic(COPPER).encode("utf-16"),
        cubic(COPPER).replace("\n", "\r\n").encode(),
        (cubic(COPPER) + "_publ_author 'M\xfcller, Universit\xe4t'\n").encode("latin-1"),
        (cubic(COPPER) + "_publ_author 'Müller, Universität 大学'\n# ±\n").encode(),
        ("data_global\n_journal_year 2020\n" + cubic(COPPER) + "data_powder\n_pd_x 1\n").encode(),
    ],
    ids=["utf-8 with mark", "utf-16", "windows", "latin-1", "utf-8", "other blocks"],
)
def test_a_file_of_any_program_is_read(path: Path, content: bytes) -> None:
    assert read(path, content).space_group == "F m -3 m"


def test_a_site_without_atoms_is_left_out_and_said(path: Path) -> None:
    found = read(path, cubic(COPPER, "H1 H 0.5 0.5 0.5 0 . 0.01"))
    assert [site.element for site in found.sites] == ["Cu"]
    assert found.remarks == ("left out, as their occupancy is 0: H1",)
    assert not found.doubtful


def test_a_refined_occupancy_scatters_about_one(path: Path) -> None:
    assert read(path, cubic(COPPER.replace(" 1 .", " 1.004(5) ."))).sites[0].occupancy == 1.0


# ---------------------------------------------------------------- what is used, with a doubt


@pytest.mark.parametrize(
    ("text", "remark"),
    [
        (cubic(COPPER.replace(" 1 .", " ? .")), "of unknown occupancy (?), taken as full: Cu1"),
        (
            cubic(COPPER.replace("0.007", "-0.002")),
            "of a negative displacement parameter, B = 0.5 taken",
        ),
        (cubic(COPPER.replace("0.007", "0.55")), "of a U above 0.2 angstrom^2,"),
        (
            cubic(COPPER) + "_chemical_formula_sum Cu\n_cell_formula_units_Z 1\n",
            "the sites make Cu4 a cell, expected Cu1 from the formula and Z: check occupancies, origin and",
        ),
        (
            ZIRCONIA.replace("O2 O 0.4496(1) 0.7569(1) 0.4792(1) 1.0 . 0.6\n", ""),
            "the sites make O4 Zr4 a cell, expected O8 Zr4 from the formula and Z: check",
        ),
        (
            cubic("Cd1 Cd 0 0 0 1 . 0.01", "Te1 Te 0.25 0.25 0.25 1 . 0.01", a=6.46, group="F -4 3 m")
            + "_chemical_formula_sum 'Cd0.5 Te'\n",
            "the sites make Cd4 Te4 a cell, expected Cd2.667 Te5.333 from the formula: check",
        ),
        (
            cubic(COPPER).replace("_cell_length_b 3.6", "_cell_length_b 3.605"),
            "the cell misses the symmetry of F m -3 m by 0.14 %; strains are counted from this cell",
        ),
        (
            cubic(COPPER, "Cu2 Cu 0.5 0.5 0 1 . 0.007", group="P 1"),
            "space group P 1 on a cell with 24 rotations: if the crystal has them, each orientation is one",
        ),
    ],
    ids=["occupancy", "negative U", "large U", "Z", "lost site", "ratio", "metric", "P 1"],
)
def test_a_doubt_is_kept_with_the_material(path: Path, text: str, remark: str) -> None:
    found = read(path, text)
    assert found.doubtful
    assert len(found.remarks) == 1
    assert found.remarks[0].startswith(remark)


def test_an_idealised_formula_raises_no_doubt(path: Path) -> None:
    sites = ("Cu1 Cu 0 0 0 0.97 . 0.01", "Zn1 Zn 0 0 0 0.03 . 0.01", "O1 O 0.5 0.5 0.5 1 . 0.01")
    text = cubic(*sites, a=4.3) + "_chemical_formula_sum 'Cu O'\n_cell_formula_units_Z 4\n"
    assert read(path, text).remarks == ()


@pytest.mark.parametrize("formula", ["'Cu H2'", "'C H3 (O H)'", "?", "''", "'Cu1'", "'Xx7'"])
def test_hydrogen_and_unreadable_formulas_raise_no_doubt(path: Path, formula: str) -> None:
    assert not read(path, f"{cubic(COPPER)}_chemical_formula_sum {formula}\n").doubtful


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("P 1 21/c 1", "X 9 9 9"), "space group 'X 9 9 9' is unknown; write a Hermann-Mauguin symbol"),
        (("_symmetry_space_group_name_H-M 'P 1 21/c 1'\n", ""), "the space group is missing; write its"),
        (("'P 1 21/c 1'", "?"), "the space group is missing; write its"),
        (("name_H-M 'P 1 21/c 1'", "name_Hall 'nonsense'"), "the Hall symbol 'nonsense' is none"),
        (("name_H-M 'P 1 21/c 1'", "x 1\n_space_group_IT_number 14"), "by its number 14 alone, which leaves"),
        (("Zr1 Zr ", "Zr1 Qq "), "site Zr1 has type 'Qq', which is no chemical element"),
        (("Zr1 Zr ", "Zr1 Og "), "no X-ray form factor is tabulated for element 'Og'"),
        (("_cell_length_a 5.1505(1)\n", ""), "_cell_length_a is missing; the cell needs three lengths"),
        (("_cell_length_b 5.2116(1)\n", ""), "_cell_length_b is missing"),
        (("_cell_angle_beta 99.23(1)\n", ""), "_cell_angle_beta is missing"),
        (("99.23(1)", "?"), "_cell_angle_beta is missing"),
        (("5.2116(1)", "wide"), "_cell_length_b is 'wide', expected a number"),
        (("5.2116(1)", "-5.2"), "_cell_length_b is -5.2, expected 1.5 to 500 angstrom"),
        (("5.2116(1)", "0.52"), "_cell_length_b is 0.52, expected 1.5 to 500 angstrom"),
        (("99.23(1)", "180"), "no cell has the angles 90, 180, 90 deg"),
        (("99.23(1)", "-99"), "no cell has the angles 90, -99, 90 deg"),
        (("gamma 90", "gamma 95"), "contradicts space group P 1 21/c 1, which is monoclinic: expected two"),
        (("0.2083(1) 1.0", "0.2083(1) 1.4"), "site Zr1 has occupancy 1.4; expected a number from 0 to 1"),
        (("0.2083(1) 1.0", "0.2083(1) -0.5"), "site Zr1 has occupancy -0.5; expected a number"),
        (("0.2083(1) 1.0", "0.2083(1) full"), "site Zr1 has occupancy full; expected a number"),
        (("0.2754(1)", "?"), "site Zr1 has no coordinates; complete or remove it"),
        (("0.2754(1)", "1e308"), "site Zr1 lies at 1e+308, 0.0395, 0.2083; expected fractions of the cell's"),
        ((" . 0.4\n", " . 400\n"), "site Zr1 has U = 5.07 angstrom^2; expected below 1"),
        (("0.4792(1) 1.0 . 0.6", "0.4792(1) 1.0 ."), "is not a readable CIF: line 11: Wrong number"),
        (("data_zro2", "loop_"), "is not a readable CIF: line 1: expected block header"),
        (("0.4792(1) 1.0", "0.4792(1) 1.0 . 0.6\nO3 O 0.46 0.76 0.48 1.0"), "O2 and O3 are within 0.5"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(path: Path, change: tuple[str, str], complaint: str) -> None:
    assert change[0] in ZIRCONIA
    assert complaint in refusal(path, ZIRCONIA.replace(*change))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "the file is empty; expected a CIF with a structure"),
        (b" \n\n", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is a binary file, not a CIF"),
        ("grüße, no CIF at all\n".encode("latin-1"), "is not a readable CIF: line 1: expected block header"),
        (b"\xff\xfe\x00", "is not a readable CIF"),
        ("data_é\n", "is not a readable CIF: line 1"),
        (
            "data_x\n_cell_length_a 3\n_cell_length_a 4\n",
            "is not a readable CIF: line 3: duplicate tag _cell",
        ),
        (
            "data_x\n_journal 'a'\n",
            "no data block has a cell (_cell_length_a ...); give the CIF of a structure",
        ),
        (
            "data_x\n_cell.length_a 30\n",
            "has dotted names (_cell.length_a), as macromolecular CIFs do; give one",
        ),
        (ZIRCONIA.split("loop_", maxsplit=1)[0], "no atom sites (_atom_site_fract_x ...)"),
        (
            cubic("Cu1 Cu 0 0 1 . 0.007").replace("_atom_site_fract_z\n", ""),
            "_atom_site_fract_z is missing; a site needs a label and three coordinates",
        ),
        (
            cubic("Cu 0 0 0 1 . 0.007").replace("_atom_site_label\n", ""),
            "_atom_site_label is missing; a site needs a label",
        ),
        (
            cubic("Cu1 Cu 0 0 1 . 0.007").replace("_atom_site_fract_z\n", "") + "_atom_site_fract_z 0\n",
            "labels and coordinates of the atom sites are not in one loop",
        ),
        (cubic(COPPER, name="one") + cubic(COPPER, name="two"), "holds 2 structures (one, two); give a file"),
        (
            cubic(COPPER).replace("_cell_length_b 3.6", "_cell_length_b 3.7"),
            "cell (3.6, 3.7, 3.6, 90, 90, 90) contradicts space group F m -3 m, which is cubic:"
            " expected a = b = c, angles of 90 deg",
        ),
        (
            cubic(COPPER, symmetry=f"_space_group_name_H-M_alt 'F m -3 m'\n{listed('P m -3 m')}"),
            "the symmetry operations (P m -3 m) and the space group symbol 'F m -3 m' (F m -3 m) contradict"
            " each other; correct the one that is wrong",
        ),
        (
            cubic(
                COPPER, symmetry="_symmetry_space_group_name_H-M 'F m -3 m'\n_symmetry_Int_Tables_number 221"
            ),
            "(F m -3 m, number 225) and the group's number in the file (221) contradict each other",
        ),
        (
            cubic(COPPER, symmetry="loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\nx+1/2,y,z\ny,x,z"),
            "the 3 symmetry operations are not all of one tabulated space group",
        ),
        (
            cubic(COPPER, symmetry="loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\nup"),
            "symmetry operation 'up': expected one like '-x,y+1/2,z'",
        ),
        (
            cubic(SILICON_1, a=5.43, group="F d -3 m"),
            "space group 'F d -3 m' has two choices of the origin, and no symmetry operations say which is"
            " meant; write 'F d -3 m:1' or 'F d -3 m:2'",
        ),
        (  # all four atoms of the cell, and the operations that make them from one
            cubic(COPPER, "Cu2 Cu 0.5 0.5 0 1 . 0.007", "Cu3 Cu 0.5 0 0.5 1 . 0.007"),
            "Cu1 and Cu2, Cu3 are within 0.5 angstrom and fill one place 3 times; correct coordinates",
        ),
        (
            cubic("Cu1 Cu 0.03 0.03 0 1 . 0.007"),
            "Cu1 and its own images are within 0.5 angstrom and fill one place",
        ),
        (
            cubic("Cd1 Cd 0 0 0 0.9 . 0.01", "Zn1 Zn 0 0 0 0.2 . 0.01", a=6.46),
            "Cd1 and Zn1 are within 0.5 angstrom and fill one place 1.1 times",
        ),
        (  # too far apart to be in each other's way, and yet alternatives
            cubic("O1A O 0.1 0.2 0.3 1 1 0.01", "O1B O 0.4 0.2 0.3 1 2 0.01", a=5, group="P 1").replace(
                "'P 1'", "'P -1'"
            ),
            "sites O1A, O1B are alternatives (_atom_site_disorder_group), yet their occupancies add up to 2;"
            " give each its share",
        ),
        (cubic(COPPER.replace(" 1 .", " 0 .")), "no atom site has an occupancy above 0"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(path: Path, text: str | bytes, complaint: str) -> None:
    assert complaint in refusal(path, text)


def test_a_huge_file_is_refused_unread(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: a disk that holds nothing
    with pytest.raises(ValueError, match="is larger than 64 MiB; give the structure alone"):
        load_material(path)


def test_more_atoms_than_can_be_used_are_refused(path: Path) -> None:
    sites = [f"C{i} C {i / 3000:.6f} 0.2 0.3 0.001 . 0.01" for i in range(3000)]
    assert "3000 atom sites under 1 symmetry operations are more" in refusal(path, cubic(*sites, group="P 1"))


def test_several_disordered_places_may_share_their_numbers(path: Path) -> None:
    sites = [
        "O1A O 0.1 0.1 0.1 0.9 1 0.01",
        "O1B O 0.3 0.1 0.1 0.1 2 0.01",
        "O2A O 0.6 0.6 0.6 0.2 1 0.01",
        "O2B O 0.8 0.6 0.6 0.8 2 0.01",
    ]
    assert len(read(path, cubic(*sites, a=8, group="P 1")).sites) == 4


def test_a_folder_is_no_cif(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither built in nor the path of a CIF"):
        load_material(tmp_path)


PIECES = ["", "\0", "?", ".", "-1", "1e308", "nan", "loop_", "data_a", "'", ";", "é", "1(2)", "1/0,y,z", "P"]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_whatever_happens_to_a_file_it_is_read_or_refused_by_one_line(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([ZIRCONIA, cubic(COPPER), cubic(COPPER, symmetry=listed("F m -3 m"))]))
    for _ in range(data.draw(st.integers(1, 3))):
        words = re.split(r"([ \n])", text)
        at = data.draw(st.integers(0, len(words) - 1))
        other = words[data.draw(st.integers(0, len(words) - 1))]
        words[at] = data.draw(st.sampled_from([*PIECES, other]))
        text = "".join(words)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "structure.cif"
        file.write_text(text, encoding="utf-8")
        try:
            found, refused = load_material(file), ""
        except ValueError as error:
            refused = str(error)
        if refused:
            assert refused.startswith(f"{file}: ")
            assert "\n" not in refused
        else:
            assert np.isfinite(found.structure_factors(sphere(1))).all()


def test_anisotropic_displacements_count_along_the_axes_of_an_oblique_cell(tmp_path: Path) -> None:
    """U_eq of a monoclinic cell: [U22 + (U11 + U33 + 2 U13 cos β) / sin² β] / 3."""
    u11, u22, u33, u13 = 0.01, 0.02, 0.03, 0.002
    plain = ZIRCONIA.replace("99.23(1)", "120").replace("_atom_site_B_iso_or_equiv\n", "")
    plain = re.sub(r" 1\.0 \. 0\.\d", " 1.0 .", plain)
    columns = "".join(
        f"_atom_site_aniso_{c}\n" for c in ("label", "U_11", "U_22", "U_33", "U_12", "U_13", "U_23")
    )
    rows = "".join(f"{label} {u11} {u22} {u33} 0 {u13} 0\n" for label in ("Zr1", "O1", "O2"))
    path = tmp_path / "oblique.cif"
    path.write_text(f"{plain}loop_\n{columns}{rows}")
    beta = math.radians(120.0)
    u_eq = (u22 + (u11 + u33 + 2 * u13 * math.cos(beta)) / math.sin(beta) ** 2) / 3
    assert [site.b_iso for site in load_material(path).sites] == pytest.approx([8 * math.pi**2 * u_eq] * 3)
