"""Whether a material can show itself on a detector at all."""

from __future__ import annotations

import numpy as np

from pipelines import rotations
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.reflections import ReflectionList

_ORIENTATIONS = 64


def check_reach(
    reflections: ReflectionList, calibration: Calibration, area: DetectorArea, least: int
) -> None:
    """Refuse a material of which no crystal can be found on this detector in this band.

    Of `_ORIENTATIONS` random orientations one has to put `least` spots on the detector; mostly the
    first one does.

    Raises
    ------
    ValueError
        Naming the material, how many spots it shows and what to check.
    """
    most = 0
    turns = rotations.to_matrix(rotations.random_rotations(_ORIENTATIONS, np.random.default_rng(0)))
    for turn in turns:
        most = max(most, len(simulate_spots(turn @ reflections.material.B0, reflections, calibration, area)))
        if most >= least:
            return
    low, high = reflections.energy_keV
    shown = f"at most {most} spot{'s' if most > 1 else ''}" if most else "no spot"
    raise ValueError(
        f"{reflections.material.name} puts {shown} on the detector between {low:g} and {high:g} keV,"
        f" a crystal needs {least}: check energy band, calibration and mask"
    )
