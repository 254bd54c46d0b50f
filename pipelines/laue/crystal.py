"""A crystalline material: cell, symmetry, structure factors, and the two frames a crystal has.

Beside UB stands LaueTools' cartesian frame ("B0 frame": a* || x, c || z); everywhere else the
crystal frame of plasticity codes (e1 || a, e3 || c*). `Material.crystal_frame` is the one
rotation between them. Reciprocal vectors are in 1/angstrom without 2 pi.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import numpy.typing as npt

from grainwatch.config import did_you_mean
from pipelines import rotations
from pipelines.laue.cif import read_cif
from pipelines.laue.symmetry import METRIC_TOLERANCE, Operations, contradiction, metric_misfit

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_EXACT = 2e-4
"""Relative. A metric that misses its symmetry by less is rounded (120 deg as 119.99, 5.1269 as 5.127)."""

_OBLIQUITY_DEG = 0.02
"""A lattice that misses a rotation by less is taken to have it."""

_TABLE = Path(__file__).with_name("materials.toml")


@dataclass(frozen=True)
class Site:
    """One atom of the asymmetric unit.

    Attributes
    ----------
    element : str
        Symbol ("Zr").
    x, y, z : float
        Fractional coordinates.
    occupancy : float
        Fraction of cells that hold the atom, 0 to 1.
    b_iso : float
        Isotropic displacement parameter B = 8 pi² <u²>, angstrom².
    """

    element: str
    x: float
    y: float
    z: float
    occupancy: float = 1.0
    b_iso: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no atom."""
        if gemmi.Element(self.element).atomic_number == 0:
            raise ValueError(f"{self.element!r} is no chemical element")
        if gemmi.Element(self.element).it92 is None:
            raise ValueError(f"no X-ray form factor is tabulated for element {self.element!r}")
        if not all(math.isfinite(v) for v in (self.x, self.y, self.z)):
            raise ValueError(f"site of {self.element} has no coordinates")
        if not 0 < self.occupancy <= 1:
            raise ValueError(f"site of {self.element} has occupancy {self.occupancy}; expected 0 to 1")
        if not 0 <= self.b_iso < 100:
            raise ValueError(f"site of {self.element} has B = {self.b_iso} angstrom^2; expected 0 to 100")


@dataclass(frozen=True)
class Material:
    """A crystal structure.

    Attributes
    ----------
    name : str
    cell_A_deg : tuple of 6 float
        a, b, c in angstrom, alpha, beta, gamma in degrees. Trigonal groups on hexagonal axes.
    space_group : str
        Hermann-Mauguin symbol of any setting ("P 1 21/c 1", "F d -3 m:1", "R -3 m:H").
    sites : tuple of Site
        The asymmetric unit.
    remarks : tuple of str
        What a user should know about the file that it came from; a sentence each.
    doubtful : bool
        Whether one of them says that cell or structure factors may be wrong.
    """

    name: str
    cell_A_deg: tuple[float, float, float, float, float, float]
    space_group: str
    sites: tuple[Site, ...]
    remarks: tuple[str, ...] = field(default=(), compare=False)
    doubtful: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse an unknown group, an impossible cell, and a cell that the group forbids."""
        if gemmi.find_spacegroup_by_name(self.space_group) is None:
            raise ValueError(f"{self.name}: space group {self.space_group!r} is unknown")
        if self._group.ext == "R":
            raise ValueError(f"{self.name}: {self.space_group} is on rhombohedral axes; give hexagonal axes")
        if not all(math.isfinite(v) and v > 0 for v in self.cell_A_deg):
            raise ValueError(f"{self.name}: cell {self.cell_A_deg} has a length or an angle that is not > 0")
        alpha, beta, gamma = (math.cos(math.radians(v)) for v in self.cell_A_deg[3:])
        if 1 - alpha**2 - beta**2 - gamma**2 + 2 * alpha * beta * gamma <= 1e-6:
            raise ValueError(f"{self.name}: no cell has the angles {self.cell_A_deg[3:]} deg")
        if not self.sites:
            raise ValueError(f"{self.name}: the structure has no atom sites; structure factors need them")
        if self.metric_misfit > METRIC_TOLERANCE:
            raise ValueError(f"{self.name}: {contradiction(self._group, self.cell_A_deg)}")

    @cached_property
    def B0(self) -> FloatArray:
        """(3, 3), 1/angstrom: columns a*, b*, c* with a* || x, c || z (LaueTools, CrystalParameters).

        [[a*, b* cos γ*, c* cos β*], [0, b* sin γ*, −c* sin β* cos α], [0, 0, 1/c]].
        """
        a, b, c = self.cell_A_deg[:3]
        ca, cb, cg = (_cos_deg(v) for v in self.cell_A_deg[3:])
        sa, sb, sg = (_sin_deg(v) for v in self.cell_A_deg[3:])
        root = math.sqrt(1 - ca * ca - cb * cb - cg * cg + 2 * ca * cb * cg)  # V / (a b c)
        a_star, b_star, c_star = sa / (a * root), sb / (b * root), sg / (c * root)
        cos_beta_star = (ca * cg - cb) / (sa * sg)
        cos_gamma_star = (ca * cb - cg) / (sa * sb)
        sin_beta_star, sin_gamma_star = root / (sa * sg), root / (sa * sb)
        columns = np.array(
            [
                [a_star, b_star * cos_gamma_star, c_star * cos_beta_star],
                [0.0, b_star * sin_gamma_star, -c_star * sin_beta_star * ca],
                [0.0, 0.0, 1.0 / c],
            ]
        )
        return columns + 0.0  # -0 becomes 0

    @cached_property
    def direct_basis(self) -> FloatArray:
        """(3, 3), angstrom: columns a, b, c in the B0 frame, the inverse transpose of B0."""
        return np.asarray(np.linalg.inv(self.B0).T)

    @cached_property
    def crystal_frame(self) -> FloatArray:
        """Rotation (3, 3) from the B0 frame to the crystal frame: v_crystal = crystal_frame @ v_B0.

        The crystal frame has e1 || a and e3 || c*. For a hexagonal cell the two differ by 30 deg
        about c, for a cubic one not at all.
        """
        e1 = self.direct_basis[:, 0] / np.linalg.norm(self.direct_basis[:, 0])
        e3 = self.B0[:, 2] / np.linalg.norm(self.B0[:, 2])
        return np.stack([e1, np.cross(e3, e1), e3])

    @cached_property
    def lattice_rotations(self) -> FloatArray:
        """Proper rotations of the Laue group as matrices in the B0 frame, (n, 3, 3), identity first.

        UB @ B0⁻¹ @ S @ B0 predicts the same spots as UB for each S of them.
        """
        basis = self.direct_basis
        matrices = basis @ self._laue_operators @ np.linalg.inv(basis)
        left, _, right = np.linalg.svd(matrices)  # an angle of 119.998 deg in a CIF must not leave shear
        return np.asarray(left @ right)

    @cached_property
    def proper_point_group(self) -> FloatArray:
        """The same rotations as quaternions w, x, y, z in the crystal frame, (n, 4), identity first."""
        frame = self.crystal_frame
        return rotations.from_matrix(frame @ self.lattice_rotations @ frame.T)

    @cached_property
    def hkl_operators(self) -> IntArray:
        """Integer matrices W of the proper Laue group, (n, 3, 3): hkl @ W is equivalent to hkl."""
        return np.rint(self._laue_operators).astype(np.int64)

    @property
    def metric_misfit(self) -> float:
        """By how much, relative, the group's operations change squares of lengths; 0 for an exact cell."""
        return metric_misfit(self._laue_operators, self.direct_basis)

    @property
    def laue_group(self) -> str:
        """Symbol of the Laue class, for example "m-3m"."""
        return str(self._group.laue_str())

    @property
    def crystal_system(self) -> str:
        """One of "triclinic", "monoclinic", ..., "cubic"."""
        return str(self._group.crystal_system_str())

    @property
    def volume_A3(self) -> float:
        """Volume of the unit cell, angstrom³."""
        return float(np.linalg.det(self.direct_basis))

    def structure_factors(self, hkl: npt.ArrayLike) -> npt.NDArray[np.complex128]:
        """Return F(hkl), (n,), in electrons per cell, of reflections (n, 3).

        F = Σ occ f(s) exp(−B s²) exp(2πi h·x) with s = sinθ/λ = |g|/2; form factors of neutral
        atoms from International Tables C (1992), table 6.1.1.4, by way of gemmi. Dispersion is
        left out: it depends on the energy, of which a Laue spot may hold several.
        """
        triples = np.asarray(hkl, dtype=np.int64).reshape(-1, 3)
        s2 = 0.25 * np.sum((triples @ self.B0.T) ** 2, axis=1)
        total = np.zeros(len(triples), dtype=np.complex128)
        if len(triples) == 0:
            return total
        # exp(2πi h x) is looked up: an index takes few values, a list has many reflections.
        low = triples.min(axis=0)
        columns = triples - low
        indices = [np.arange(low[i], triples[:, i].max() + 1) for i in range(3)]
        for (element, b_iso), atoms in self._atoms.items():
            waves = [np.exp(2j * np.pi * np.outer(atoms[:, i], indices[i])) for i in range(3)]
            phase = np.zeros(len(triples), dtype=np.complex128)
            for weight, wx, wy, wz in zip(atoms[:, 3], *waves, strict=True):
                phase += weight * wx[columns[:, 0]] * wy[columns[:, 1]] * wz[columns[:, 2]]
            total += _form_factor(element, s2) * np.exp(-b_iso * s2) * phase
        return total

    def largest_structure_factors(self, g_norm: npt.ArrayLike) -> FloatArray:
        """Return Σ occ |f(s)| exp(−B s²), electrons: the |F| if all atoms scattered in phase.

        `g_norm` (n,) is |g| in 1/angstrom.
        """
        s2 = 0.25 * np.asarray(g_norm, dtype=np.float64) ** 2
        total = np.zeros_like(s2)
        for (element, b_iso), atoms in self._atoms.items():
            total += atoms[:, 3].sum() * np.abs(_form_factor(element, s2)) * np.exp(-b_iso * s2)
        return total

    @property  # not cached: a gemmi object would make the material impossible to pickle
    def _group(self) -> gemmi.SpaceGroup:
        return gemmi.find_spacegroup_by_name(self.space_group)

    @cached_property
    def _laue_operators(self) -> FloatArray:
        """Proper rotations of the Laue group on fractional coordinates, (n, 3, 3), identity first."""
        proper = {
            tuple(np.sign(np.linalg.det(w)) * w.ravel())
            for w in (np.array(op.rot) // gemmi.Op.DEN for op in self._group.operations().sym_ops)
        }
        ordered = sorted(proper, key=lambda w: (-w[0] - w[4] - w[8], tuple(-v for v in w)))
        return np.array(ordered, dtype=np.float64).reshape(-1, 3, 3)

    @cached_property
    def _atoms(self) -> dict[tuple[str, float], FloatArray]:
        """All atoms of the cell: (element, B) -> rows (x, y, z, weight).

        Every operation is applied to every site, and a site that k operations leave in place
        weighs 1/k: exact also where coordinates are rounded.
        """
        found: dict[tuple[str, float], list[FloatArray]] = {}
        operations = Operations.of(self._group)
        for site in self.sites:
            xyz = np.array([site.x, site.y, site.z])
            images = operations.images(xyz)
            k = operations.fixing(xyz, self.direct_basis)
            keys = np.rint(images % 1.0 * 1e9).astype(np.int64) % 10**9
            _, first, counts = np.unique(keys, axis=0, return_index=True, return_counts=True)
            rows = np.column_stack([images[first], counts * site.occupancy / k])
            found.setdefault((site.element, site.b_iso), []).append(rows)
        return {key: np.concatenate(rows) for key, rows in found.items()}


def on_hexagonal_axes(
    cell_A_deg: Iterable[float], sites: Iterable[Site]
) -> tuple[tuple[float, float, float, float, float, float], tuple[Site, ...]]:
    """Return cell and sites of a rhombohedral structure on hexagonal axes (obverse setting).

    a_h = a_r − b_r, b_h = b_r − c_r, c_h = a_r + b_r + c_r (International Tables A, table 5.1.3.1).
    """
    cell = gemmi.UnitCell(*cell_A_deg)
    basis = np.array(cell.orth.mat.tolist())
    change = np.array([[1.0, 0.0, 1.0], [-1.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
    a, _, c = np.linalg.norm(basis @ change, axis=0)
    inverse = np.linalg.inv(change)
    moved = []
    for site in sites:
        x, y, z = (float(v) for v in inverse @ np.array([site.x, site.y, site.z]))
        moved.append(Site(site.element, x, y, z, site.occupancy, site.b_iso))
    return (float(a), float(a), float(c), 90.0, 90.0, 120.0), tuple(moved)


def material_names() -> tuple[str, ...]:
    """Return the built-in names, sorted."""
    return tuple(sorted(_table()))


def load_material(name_or_cif: str | Path) -> Material:
    """Return a built-in material by its name, or the structure in a CIF.

    Parameters
    ----------
    name_or_cif : str or Path
        "Cu", or the path of a CIF. Trigonal structures on rhombohedral axes are put on hexagonal
        ones; anisotropic displacements are read as their isotropic equivalent.

    Raises
    ------
    ValueError
        If the name is unknown and no file, or the CIF cannot be used; the message says what is missing.
    FileNotFoundError
        If a path ending in .cif does not exist.
    """
    name = str(name_or_cif)
    if isinstance(name_or_cif, str) and name in _table():
        return _built_in(name)
    path = Path(name_or_cif)
    if path.is_file():
        return _from_cif(path)
    if path.suffix.lower() == ".cif":
        raise FileNotFoundError(f"{path}: no such CIF")
    meant = _meant(name)
    raise ValueError(
        f"material {name!r} is neither built in nor the path of a CIF{meant}"
        f"{'' if meant else ';'} built in: {', '.join(material_names())}"
    )


def _meant(name: str) -> str:
    """Return ": did you mean Cu?" for "cu" and "copper", "" where nothing is like it."""
    if like := did_you_mean(name, material_names()):
        return like
    called = {alias.lower(): known for known, entry in _table().items() for alias in entry["called"]}
    # Names of metals are much alike: more has to agree than for a symbol.
    aliases = difflib.get_close_matches(name.lower(), called, n=1, cutoff=0.8)
    return f": did you mean {called[aliases[0]]}?" if aliases else ""


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


@cache
def _built_in(name: str) -> Material:
    entry = _table()[name]
    a, b, c, alpha, beta, gamma = (float(v) for v in entry["cell_A_deg"])
    sites = tuple(Site(**site) for site in entry["sites"])
    return Material(name, (a, b, c, alpha, beta, gamma), entry["space_group"], sites)


def _from_cif(path: Path) -> Material:
    read = read_cif(path)
    try:
        cell, symbol = read.cell_A_deg, read.space_group
        sites = tuple(Site(s.element, *s.xyz, s.occupancy, s.b_iso) for s in read.sites)
        if symbol.endswith(":R"):
            cell, sites = on_hexagonal_axes(cell, sites)
            symbol = symbol.removesuffix(":R") + ":H"
        found = Material(path.stem, cell, symbol, sites)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    doubts = _doubts_of_the_cell(found)
    return replace(found, remarks=read.remarks + doubts, doubtful=read.doubtful or bool(doubts))


def _doubts_of_the_cell(of: Material) -> tuple[str, ...]:
    """What cell and group say about each other that a user may not have meant."""
    if of.metric_misfit > _EXACT:
        return (
            f"the cell misses the symmetry of {of.space_group} by {100 * of.metric_misfit / 2:.2g} %;"
            " strains are counted from this cell",
        )
    if of.crystal_system == "triclinic":
        # Programs that compute structures write P 1 and all atoms of the cell.
        lattice = len(list(gemmi.find_lattice_symmetry(gemmi.UnitCell(*of.cell_A_deg), "P", _OBLIQUITY_DEG)))
        if lattice > 1:
            return (
                f"space group {of.space_group} on a cell with {lattice} rotations: if the crystal has them,"
                f" each orientation is one of {lattice} for the same; give a file with its symmetry",
            )
    return ()


def _form_factor(element: str, s2: FloatArray) -> FloatArray:
    """X-ray form factor of a neutral atom at (sinθ/λ)² = s2, electrons."""
    coefficients = gemmi.Element(element).it92
    assert coefficients is not None  # or `Site` had refused it
    f = np.full_like(s2, coefficients.c)
    for a, b in zip(coefficients.a, coefficients.b, strict=True):
        f += a * np.exp(-b * s2)
    return f


def _cos_deg(angle: float) -> float:
    """Cosine that is exactly 0 at 90 deg, so that B0 of a cubic cell is diagonal."""
    return 0.0 if angle == 90.0 else math.cos(math.radians(angle))


def _sin_deg(angle: float) -> float:
    return 1.0 if angle == 90.0 else math.sin(math.radians(angle))
