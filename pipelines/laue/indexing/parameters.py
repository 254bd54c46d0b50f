"""What the indexer may be told, and what it knows of a material on a detector."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.laue.crystal import Material
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.indexing.match import CELL_PX, Scene
from pipelines.laue.indexing.vote import AngleTable, build_angle_table
from pipelines.laue.reflections import build_reflections


@dataclass(frozen=True, slots=True)
class IndexingParameters:
    """What the indexer may be told.

    Attributes
    ----------
    angle_tolerance_deg : float
        Between a measured angle of two scattering vectors and a computed one, when voting.
    match_radius_px : float
        A computed spot is matched by a measured one within this distance, after refinement.
    max_strain : float
        Deviatoric strain components up to this are searched for, and larger ones flagged.
    max_false_probability : float
        A crystal is reported when chance would give one as good in this frame more rarely.
    max_crystals : int
        Upper bound on the crystals of a frame.
    max_spots : int
        The brightest spots that are used at all; bounds the time on a frame full of noise.
    max_voters : int
        The brightest unexplained spots that vote.
    max_seeds : int
        Seeds tried without success before the frame is called explained.
    max_named : int
        The brightest spots that a network is asked to name, where there is one.
    max_seeds_after_network : int
        As `max_seeds`, when a network has led to crystals before.
    min_matched : int
        Fewest spots of a crystal.
    """

    angle_tolerance_deg: float = 0.15
    match_radius_px: float = 2.0
    max_strain: float = 5e-3
    max_false_probability: float = 1e-5
    max_crystals: int = 24
    max_spots: int = 4000
    max_voters: int = 500
    max_seeds: int = 60
    max_named: int = 120
    max_seeds_after_network: int = 20
    min_matched: int = 5

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0.0 < self.max_false_probability < 1.0:
            raise ValueError(f"max_false_probability {self.max_false_probability}: expected between 0 and 1")
        for name in ("angle_tolerance_deg", "match_radius_px", "max_strain"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected more than 0")
        if self.match_radius_px > CELL_PX:
            raise ValueError(f"match_radius_px {self.match_radius_px}: expected at most {CELL_PX:g}")
        for name in (
            "max_crystals",
            "max_spots",
            "max_voters",
            "max_seeds",
            "max_named",
            "max_seeds_after_network",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")
        if self.min_matched < 4:
            raise ValueError(
                f"min_matched {self.min_matched}: three spots determine a rotation, expected 4 or more"
            )


@dataclass(frozen=True, eq=False)
class Phase:
    """A material as the indexer needs it on one detector."""

    material: Material
    scene: Scene
    angles: AngleTable
    n_search: int
    symmetry_order: int

    @classmethod
    def prepare(
        cls,
        material: Material,
        calibration: Calibration,
        area: DetectorArea,
        energy_keV: tuple[float, float],
        hypotheses: int = 200,
        partners: int = 1200,
    ) -> Phase:
        """Tabulate reflections and angles of a material (up to a second for a large cell)."""
        reflections = build_reflections(material, energy_keV)
        if len(reflections.g_norm) == 0:
            low, high = energy_keV
            raise ValueError(f"{material.name}: no reflection is excited between {low:g} and {high:g} keV")
        table = build_angle_table(reflections, hypotheses, partners, energy_keV)
        scene = Scene(reflections, calibration, area, energy_keV)
        return cls(material, scene, table, partners, len(material.lattice_rotations))
