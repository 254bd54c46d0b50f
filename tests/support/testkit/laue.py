"""Laue patterns with a known answer, for tests of the indexer and of what is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from pipelines import rotations
from pipelines.laue.crystal import Material, Site, load_material
from pipelines.laue.forward import Pattern, simulate_pattern
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.indexing.assign import IndexedCrystal
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.parameters import Phase

FloatArray = npt.NDArray[np.float64]

BAND_KEV = (5.0, 22.0)
CALIBRATION = Calibration.from_lauetools(
    (79.612, 977.81, 932.17, 0.477, 0.447), 0.0734, (2018, 2016), "sCMOS"
)
AREA = DetectorArea.of(CALIBRATION)

# Cells and sites rounded from Wyckoff, Crystal Structures 1 (1963); the triclinic one is invented.
RUTILE = Material(
    "rutile",
    (4.594, 4.594, 2.959, 90, 90, 90),
    "P 42/m n m",
    (Site("Ti", 0, 0, 0), Site("O", 0.305, 0.305, 0)),
)
ARAGONITE = Material(
    "aragonite",
    (4.959, 7.968, 5.741, 90, 90, 90),
    "P m c n",
    (
        Site("Ca", 0.25, 0.415, 0.757),
        Site("C", 0.25, 0.762, 0.918),
        Site("O", 0.25, 0.922, 0.904),
        Site("O", 0.474, 0.681, 0.913),
    ),
)
TRICLINIC = Material(
    "triclinic",
    (4.1, 5.3, 6.2, 83.0, 97.5, 104.0),
    "P -1",
    (Site("Cu", 0.11, 0.23, 0.31), Site("O", 0.62, 0.17, 0.83)),
)
OTHER_MATERIALS = {m.name: m for m in (RUTILE, ARAGONITE, TRICLINIC)}
ONE_OF_EACH_SYSTEM = ("Cu", "Ti", "Al2O3", "rutile", "aragonite", "ZrO2", "triclinic")


@cache
def material(name: str) -> Material:
    """Return a material of the tests or a built-in one."""
    return OTHER_MATERIALS.get(name) or load_material(name)


@cache
def phase(
    name: str, calibration: Calibration = CALIBRATION, energy_keV: tuple[float, float] = BAND_KEV
) -> Phase:
    """Return a material prepared for a detector, made once."""
    return Phase.prepare(material(name), calibration, DetectorArea.of(calibration), energy_keV)


@cache
def indexer(
    *names: str, calibration: Calibration = CALIBRATION, energy_keV: tuple[float, float] = BAND_KEV
) -> Indexer:
    """Return an indexer with its usual parameters."""
    return Indexer([phase(name, calibration, energy_keV) for name in names])


def random_turns(n: int, seed: int) -> FloatArray:
    """Return n rotation matrices, uniform on SO(3)."""
    return rotations.to_matrix(rotations.random_rotations(n, np.random.default_rng(seed)))


def turn_about(axis: npt.ArrayLike, angle_deg: float) -> FloatArray:
    """Return the rotation about an axis, right-handed."""
    direction = np.asarray(axis, dtype=np.float64)
    direction = direction / np.linalg.norm(direction)
    half = np.radians(angle_deg) / 2
    return rotations.to_matrix(np.array([np.cos(half), *(np.sin(half) * direction)]))


def random_strain(rng: np.random.Generator, size: float) -> FloatArray:
    """Return a symmetric strain without trace whose components have a standard deviation of about `size`."""
    e = rng.normal(0.0, size, (3, 3))
    e = (e + e.T) / 2
    return np.asarray(e - np.eye(3) * np.trace(e) / 3)


def simulated(
    name: str | Sequence[str],
    matrices: npt.ArrayLike,
    seed: int,
    *,
    calibration: Calibration = CALIBRATION,
    area: DetectorArea | None = None,
    energy_keV: tuple[float, float] = BAND_KEV,
    **conditions: float,
) -> Pattern:
    """Return the peak list of crystals M = UB B0⁻¹, (m, 3, 3), of one or several materials."""
    batch = np.asarray(matrices, dtype=np.float64).reshape(-1, 3, 3)
    names = [name] * len(batch) if isinstance(name, str) else list(name)
    phases = [phase(n, calibration, energy_keV) for n in names]
    ubs = np.array([m @ p.material.B0 for m, p in zip(batch, phases, strict=True)])
    return simulate_pattern(
        [p.scene.reflections for p in phases],
        ubs,
        calibration,
        area or DetectorArea.of(calibration),
        np.random.default_rng(seed),
        **conditions,
    )


def rotation_part(matrix: FloatArray) -> FloatArray:
    """Return the rotation that is nearest to a matrix."""
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right)


def misorientation_deg(one: FloatArray, other: FloatArray, of: Material) -> float:
    """Return the smallest rotation angle between two crystals M, symmetric equivalents being the same."""
    between = rotation_part(one).T @ rotation_part(other)
    cosine = (np.einsum("ij,nji->n", between, of.lattice_rotations) - 1) / 2
    near = float(np.degrees(np.arccos(np.clip(cosine.max(), -1, 1))))
    return near


def equivalent_of(matrix: FloatArray, truth: FloatArray, of: Material) -> FloatArray:
    """Return M S, S of the lattice's rotations, that is nearest to `truth`: M as if indexed like it."""
    candidates = matrix @ of.lattice_rotations
    return np.asarray(candidates[int(np.argmin(np.sum((candidates - truth) ** 2, axis=(1, 2))))])


def found_and_false(
    returned: Sequence[IndexedCrystal],
    phases: Sequence[Phase],
    names: Sequence[str],
    truths: npt.ArrayLike,
    within_deg: float = 0.2,
) -> tuple[int, int]:
    """Count the true crystals that were returned, each once, and all other crystals returned."""
    open_truths = list(zip(names, np.asarray(truths, dtype=np.float64).reshape(-1, 3, 3), strict=True))
    false = 0
    for crystal in returned:
        of = phases[crystal.phase].material
        for number, (name, truth) in enumerate(open_truths):
            if name == of.name and misorientation_deg(crystal.matrix, truth, of) < within_deg:
                del open_truths[number]
                break
        else:
            false += 1
    return len(names) - len(open_truths), false
