"""Material, calibration and classes that a training is about; one clear line for what cannot be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offline_training.laue.domain import GeometryRange, PatternRange
from pipelines.laue.classes import ClassList, choose_classes
from pipelines.laue.crystal import load_material
from pipelines.laue.geometry import Calibration
from pipelines.laue.lauetools_files import read_det
from pipelines.laue.reflections import ReflectionList, build_reflections

HELD_OUT = PatternRange(
    crystals=(5, 5), noise_px=(0.2, 0.2), missing=(0.2, 0.2), spurious=(0.1, 0.1), log_volume=0.0, strain=0.0
)
"""Conditions that figures are stated for."""

_CLASS_PATTERNS = 300


@dataclass(frozen=True, eq=False)
class Prepared:
    """What patterns are simulated from.

    Attributes
    ----------
    reflections : ReflectionList
    classes : ClassList
    nominal : Calibration
    geometry : GeometryRange
    """

    reflections: ReflectionList
    classes: ClassList
    nominal: Calibration
    geometry: GeometryRange

    def stated(self) -> dict[str, Any]:
        """Return what a file must say of it, to be told from another."""
        return {
            "material": self.reflections.material.name,
            "space_group": self.reflections.material.space_group,
            "cell_A_deg": list(self.reflections.material.cell_A_deg),
            "energy_keV": list(self.reflections.energy_keV),
            "calibration": {
                name: getattr(self.nominal, name)
                for name in ("dd_mm", "xcen_px", "ycen_px", "xbet_deg", "xgam_deg", "pixel_size_mm")
            },
            "geometry": asdict(self.geometry),
            "classes": len(self.classes),
        }


def prepare(
    material: str,
    geometry: str | Path,
    energy_keV: tuple[float, float],
    *,
    coverage: float | None = None,
    max_index: int | None = None,
    over: GeometryRange | None = None,
    seed: int = 0,
) -> Prepared:
    """Read the material and the calibration, and choose classes.

    Parameters
    ----------
    material : str
        Built-in name or CIF.
    geometry : str or Path
        A .det file.
    energy_keV : (float, float)
    coverage : float, optional
        Choose families until this share of the spots on the detector has a class.
    max_index : int, optional
        Instead, all families with a member whose indices do not exceed this, as LaueNN does.
    over : GeometryRange, optional
        Detector positions; that of a bundle by default.
    seed : int

    Raises
    ------
    ValueError
        If the material or the calibration cannot be used, or nothing of it reaches the detector.
    OSError
        If a file cannot be read.
    """
    over = over or GeometryRange()
    try:
        nominal = read_det(geometry).calibration
    except UnicodeDecodeError as error:
        raise ValueError(f"{geometry}: is no .det file (not a text)") from error
    reflections = build_reflections(load_material(material), energy_keV)
    rng = np.random.default_rng((seed, 7))
    calibrations = [over.draw(nominal, rng) for _ in range(_CLASS_PATTERNS)]
    if max_index is not None:
        classes = families_up_to(reflections, max_index)
    else:
        classes = choose_classes(reflections, calibrations, rng, 0.86 if coverage is None else coverage)
    return Prepared(reflections, classes, nominal, over)


def families_up_to(reflections: ReflectionList, max_index: int) -> ClassList:
    """Return the families that have a member whose indices are at most `max_index`.

    Shares are not known: zeros.

    Raises
    ------
    ValueError
        If there is none.
    """
    listed = np.abs(reflections.hkl.astype(np.int64)).max(axis=1) <= max_index
    families = np.unique(reflections.family[listed])
    if max_index < 1 or not len(families):
        raise ValueError(
            f"max_index {max_index}: no reflection of {reflections.material.name} has so low ones"
        )
    representatives, _ = reflections.families()
    return ClassList(reflections.hkl[representatives[families]], np.zeros(len(families)))
