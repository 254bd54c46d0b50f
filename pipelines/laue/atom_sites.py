"""The atom sites of a CIF, and whether the atoms that they stand for can exist together.

A Bragg reflection shows the average over all cells. A site that is filled in some cells only, and
alternatives of a disordered group, therefore count with their share and need no ordered model;
but the shares must be ones that can be true.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import gemmi
import numpy as np
import numpy.typing as npt

from pipelines.laue.symmetry import Operations, lattice_distances_A

FloatArray = npt.NDArray[np.float64]

_FARTHEST = 100.0
"""In cells. A molecule may reach out of its cell; what is farther is no fraction."""

_ONE_PLACE_A = 0.5
"""Two atoms are never nearer (the shortest bond, H-H, is 0.74): such sites are alternatives."""

_FULL = 1.02
"""What fills one place may add up to this: refined occupancies scatter about 1."""

_MOST_SITES = 2000
_MOST_IMAGES = 50_000

_DEFAULT_B_ISO = 0.5
"""Angstrom², for a site whose CIF gives no displacement parameter: a usual value of a hard solid."""

_SOFT_U = 0.2
"""Angstrom². Atoms of a solid move less; a larger U is often a B in the wrong column."""

_REQUIRED = ("label", "fract_x", "fract_y", "fract_z")
_OPTIONAL = ("?occupancy", "?disorder_group", "?disorder_assembly")

_B_OF_U = 8 * math.pi**2
_MOST_B = 100.0

_COMPOSITION = 0.05
"""Sites and stated formula may differ by this share of the electrons: formulas are often idealised."""


@dataclass(frozen=True)
class CifSite:
    """An atom site of a CIF.

    Attributes
    ----------
    label, element : str
    xyz : tuple of 3 float
        Fractional coordinates.
    occupancy : float
        Share of the cells that hold the atom, above 0, up to 1.
    b_iso : float
        8 pi² <u²>, angstrom².
    alternative : str
        Disorder group, "" for a site that is in none; -1 is an alternative to its own images.
    assembly : str
        What the group is a group of.
    """

    label: str
    element: str
    xyz: tuple[float, float, float]
    occupancy: float
    b_iso: float
    alternative: str = ""
    assembly: str = ""


def read_sites(
    block: gemmi.cif.Block, group: gemmi.SpaceGroup, basis: FloatArray
) -> tuple[tuple[CifSite, ...], list[str], list[str]]:
    """Read the sites of a data block and judge them.

    Parameters
    ----------
    block : gemmi.cif.Block
    group : gemmi.SpaceGroup
        That the coordinates are meant for.
    basis : (3, 3) float64
        Columns a, b, c in angstrom.

    Returns
    -------
    sites : tuple of CifSite
    remarks : list of str
        What was understood and how; it leaves no doubt.
    doubts : list of str
        What may make the structure factors wrong.

    Raises
    ------
    ValueError
        Naming the site and what to do.
    """
    read, doubts = _rows(block)
    sites = [site for site in read if site.occupancy > 0]
    if not sites:
        raise ValueError("no atom site has an occupancy above 0")
    operations = Operations.of(group)
    if len(sites) > _MOST_SITES or len(sites) * len(operations) > _MOST_IMAGES:
        raise ValueError(
            f"{len(sites)} atom sites under {len(operations)} symmetry operations are more than can be used"
            f" (up to {_MOST_SITES} sites and {_MOST_IMAGES} images)"
        )
    _check_alternatives(sites)
    sites = [_whole(site, operations, basis) for site in sites]
    _check_crowding(sites, operations, basis)
    remarks = []
    if len(sites) < len(read):
        empty = [site.label for site in read if site.occupancy == 0]
        remarks.append(f"left out, as their occupancy is 0: {_some(empty)}")
    disordered = [site.label for site in sites if site.alternative]
    if disordered:
        remarks.append(f"disordered, the average over all cells is used: {_some(disordered)}")
    return tuple(sites), remarks, [*doubts, *_composition(block, sites, operations, basis)]


def _rows(block: gemmi.cif.Block) -> tuple[list[CifSite], list[str]]:
    for column in _REQUIRED:
        if not len(block.find_values(f"_atom_site_{column}")):
            raise ValueError(f"_atom_site_{column} is missing; a site needs a label and three coordinates")
    small = gemmi.make_small_structure_from_block(block)
    table = block.find("_atom_site_", [*_REQUIRED, *_OPTIONAL])
    if len(table) != len(small.sites):
        raise ValueError("labels and coordinates of the atom sites are not in one loop; put them into one")
    sites: list[CifSite] = []
    unknown: list[str] = []
    still: list[str] = []
    soft: list[str] = []
    for atom, row in zip(small.sites, table, strict=True):
        occupancy, group, assembly = (row[i] if row.has(i) else "." for i in (4, 5, 6))
        if occupancy == "?":
            unknown.append(atom.label)
        b_iso = _b_iso(atom, small.cell)
        if b_iso < 0:
            still.append(atom.label)
            b_iso = _DEFAULT_B_ISO
        if b_iso > _SOFT_U * _B_OF_U:
            soft.append(atom.label)
        alternative = "" if gemmi.cif.is_null(group) or group == "0" else gemmi.cif.as_string(group)
        sites.append(
            CifSite(
                atom.label,
                _element(atom),
                _xyz(atom),
                _occupancy(atom.label, occupancy),
                b_iso,
                alternative,
                "" if gemmi.cif.is_null(assembly) else gemmi.cif.as_string(assembly),
            )
        )
    doubts = []
    if unknown:
        doubts.append(f"of unknown occupancy (?), taken as full: {_some(unknown)}")
    if still:
        doubts.append(f"of a negative displacement parameter, B = {_DEFAULT_B_ISO} taken: {_some(still)}")
    if soft:
        doubts.append(
            f"of a U above {_SOFT_U:g} angstrom^2, more than atoms of a solid move (is it B?): {_some(soft)}"
        )
    return sites, doubts


def _element(atom: gemmi.SmallStructure.Site) -> str:
    if atom.element.atomic_number == 0:
        raise ValueError(f"site {atom.label} has type {atom.type_symbol!r}, which is no chemical element")
    return str(atom.element.name)


def _xyz(atom: gemmi.SmallStructure.Site) -> tuple[float, float, float]:
    x, y, z = atom.fract.tolist()
    if not all(math.isfinite(v) for v in (x, y, z)):
        raise ValueError(f"site {atom.label} has no coordinates; complete or remove it")
    if max(abs(x), abs(y), abs(z)) > _FARTHEST:
        raise ValueError(
            f"site {atom.label} lies at {x:g}, {y:g}, {z:g}; expected fractions of the cell's edges"
        )
    return x, y, z


def _occupancy(label: str, text: str) -> float:
    if gemmi.cif.is_null(text):
        return 1.0  # what the CIF dictionary says
    value = gemmi.cif.as_number(text)
    if not 0 <= value <= _FULL:
        raise ValueError(f"site {label} has occupancy {text}; expected a number from 0 to 1")
    return min(value, 1.0)


def _b_iso(atom: gemmi.SmallStructure.Site, cell: gemmi.UnitCell) -> float:
    """B in angstrom², the default where the file has none, as it is where it is negative.

    Of U_ij, which stand along the cell's axes, as 8 pi² U_eq (Fischer & Tillmanns, Acta Cryst. C 44,
    775, 1988): a third of the trace for right angles alone.
    """
    u = atom.u_iso
    if u == 0 and atom.aniso.nonzero():
        u = cell.calculate_u_eq(atom.aniso)
    if u == 0 or not math.isfinite(u):
        return _DEFAULT_B_ISO
    if u * _B_OF_U >= _MOST_B:
        raise ValueError(f"site {atom.label} has U = {u:.3g} angstrom^2; expected below 1 (is it B?)")
    return float(_B_OF_U * u)


def _check_alternatives(sites: Sequence[CifSite]) -> None:
    """Refuse groups of one assembly of which more than one is in every cell."""
    by_assembly: dict[str, dict[str, CifSite]] = {}
    for site in sites:
        if site.alternative:
            groups = by_assembly.setdefault(site.assembly, {})
            # Several disordered places may share their numbers: the least filled site says too little
            # rather than too much.
            least = groups.get(site.alternative)
            if least is None or site.occupancy < least.occupancy:
                groups[site.alternative] = site
    for groups in by_assembly.values():
        together = sum(site.occupancy for site in groups.values())
        if len(groups) > 1 and together > _FULL:
            raise ValueError(
                f"sites {_some([site.label for site in groups.values()])} are alternatives"
                f" (_atom_site_disorder_group), yet their occupancies add up to {together:.3g};"
                " give each its share"
            )


def _whole(site: CifSite, operations: Operations, basis: FloatArray) -> CifSite:
    """A site that is split about a special position too narrowly to be told apart, as one atom on it."""
    if not site.alternative.startswith("-"):
        return site
    return replace(site, occupancy=min(1.0, site.occupancy * operations.fixing(site.xyz, basis)))


def _check_crowding(sites: Sequence[CifSite], operations: Operations, basis: FloatArray) -> None:
    """Refuse a place that would have to hold more than one atom."""
    images = np.stack([operations.images(site.xyz) for site in sites])
    weight = np.array([site.occupancy / operations.fixing(site.xyz, basis) for site in sites])
    for site in sites:
        here = lattice_distances_A(images, site.xyz, basis) < _ONE_PLACE_A
        together = float(np.sum(weight * here.sum(axis=1)))
        if together > _FULL:
            others = [s.label for s, row in zip(sites, here, strict=True) if row.any() and s is not site]
            whose = f"{site.label} and {_some(others)}" if others else f"{site.label} and its own images"
            raise ValueError(
                f"{whose} are within {_ONE_PLACE_A:g} angstrom and fill one place {together:.3g} times;"
                " correct coordinates, occupancies or space group"
            )


def _composition(
    block: gemmi.cif.Block, sites: Sequence[CifSite], operations: Operations, basis: FloatArray
) -> list[str]:
    """Say where the sites are not what the formula says: a wrong origin, group or occupancy shows so.

    Hydrogen is left out, in files as here; without Z only the ratios are compared.
    """
    formula_text = block.find_value("_chemical_formula_sum")
    stated = _formula(gemmi.cif.as_string(formula_text)) if formula_text is not None else {}
    if not stated:
        return []
    made: dict[str, float] = {}
    for site in sites:
        atoms = site.occupancy * len(operations) / operations.fixing(site.xyz, basis)
        if site.element not in ("H", "D"):
            made[site.element] = made.get(site.element, 0.0) + atoms
    z_text = block.find_value("_cell_formula_units_Z")
    z = gemmi.cif.as_number(z_text) if z_text is not None else math.nan
    units = z if z > 0 else sum(made.values()) / sum(stated.values())
    expected = {element: count * units for element, count in stated.items()}
    electrons = {e: gemmi.Element(e).atomic_number for e in made.keys() | expected.keys()}
    off = sum(n * abs(made.get(e, 0.0) - expected.get(e, 0.0)) for e, n in electrons.items())
    if off <= _COMPOSITION * sum(n * expected.get(e, 0.0) for e, n in electrons.items()):
        return []
    return [
        f"the sites make {_written(made)} a cell, expected {_written(expected)} from the formula"
        f"{' and Z' if z > 0 else ''}: check occupancies, origin and space group"
    ]


def _formula(text: str) -> dict[str, float]:
    """Atoms of "Al2 O3", hydrogen left out; nothing where it cannot be read."""
    counts: dict[str, float] = {}
    for part in text.replace(",", " ").split():
        match = re.fullmatch(r"([A-Z][a-z]?)(\d*\.?\d*)(?:\(\d+\))?", part)
        if match is None or gemmi.Element(match[1]).atomic_number == 0:
            return {}
        if match[1] not in ("H", "D"):
            counts[match[1]] = counts.get(match[1], 0.0) + float(match[2] or 1)
    return counts if sum(counts.values()) > 0 else {}


def _written(counts: dict[str, float]) -> str:
    return " ".join(f"{element}{count:.4g}" for element, count in sorted(counts.items()))


def _some(labels: Sequence[str]) -> str:
    """The first labels of many."""
    return ", ".join(labels[:6]) + (f" and {len(labels) - 6} more" if len(labels) > 6 else "")
