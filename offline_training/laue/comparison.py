"""The indexer with and without a network on the same simulated patterns, in turn.

Section 4 of LaueNN's supporting information compares one image; here both ways see every pattern,
made by the forward simulation, which is not the one that the network learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta, chi2

from offline_training.laue.scoring import FOUND_WITHIN_DEG, Tally
from pipelines import rotations
from pipelines.laue.crystal import Material, load_material
from pipelines.laue.forward import random_positions, simulate_pattern
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.parameters import Phase
from pipelines.laue.proposals import Proposer, SpotClassifier

WAYS = ("with", "without")


@dataclass(frozen=True)
class Conditions:
    """What the patterns are like.

    Attributes
    ----------
    grains : tuple of int
        Crystals of a pattern, equal volumes; 0 for random peaks alone.
    patterns : int
        Of each number of grains.
    noise_px : float
        Standard deviation of a position in x and in y.
    missing : float
        Share of each crystal's spots that is lost, four in five of them among its weakest 40 %.
    spurious : float
        Random peaks for each real one that is left.
    random_peaks : int
        Of a pattern without grains.
    seed : int
    """

    grains: tuple[int, ...] = (1, 2, 5)
    patterns: int = 20
    noise_px: float = 0.2
    missing: float = 0.2
    spurious: float = 0.1
    random_peaks: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not self.grains or not all(0 <= g <= 24 for g in self.grains):
            raise ValueError(f"grains {self.grains}: expected numbers from 0 (random peaks) to 24")
        if self.patterns < 1:
            raise ValueError(f"patterns {self.patterns}: expected 1 or more")
        if not (0 <= self.noise_px <= 10 and 0 <= self.missing < 1 and 0 <= self.spurious <= 20):
            raise ValueError(
                f"noise {self.noise_px} px, missing {self.missing}, spurious {self.spurious}: expected"
                " 0 to 10, 0 to below 1 and 0 to 20"
            )

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"{self.patterns} patterns each, {self.noise_px:g} px noise, {100 * self.missing:g} % missing,"
            f" {100 * self.spurious:g} % spurious, seed {self.seed}"
        )


@dataclass(frozen=True, eq=False)
class Contest:
    """One bundle, and the two indexers that it is about."""

    bundle: str
    material: Material
    calibration: Calibration
    indexers: dict[str, Indexer]

    @classmethod
    def prepare(cls, folder: Path, calibration: Calibration, material: str | None = None) -> Contest:
        """Load a bundle and tabulate its material.

        Parameters
        ----------
        folder : Path
            Of the bundle.
        calibration : Calibration
        material : str, optional
            Built-in name or CIF; that which the bundle names by default.

        Raises
        ------
        ValueError
            If the bundle cannot be used, or not for this material and detector.
        """
        classifier = SpotClassifier(folder)
        domain = classifier.domain
        of = load_material(material or domain.material)
        if problem := domain.mismatch(of, calibration, domain.energy_keV):
            raise ValueError(f"{folder} is not made for this: {problem}")
        phase = Phase.prepare(of, calibration, DetectorArea.of(calibration), domain.energy_keV)
        proposer = Proposer(classifier, phase.scene.reflections, phase.angles)
        indexers = {"with": Indexer((phase,), proposers=(proposer,)), "without": Indexer((phase,))}
        return cls(str(folder), of, calibration, indexers)


@dataclass(frozen=True)
class Seen:
    """So many patterns of so many have been indexed both ways."""

    done: int
    patterns: int
    label: str


def compare(
    contests: Sequence[Contest], conditions: Conditions, report: Callable[[Seen], None] = lambda _: None
) -> dict[str, Any]:
    """Index the same patterns with and without each network.

    Returns
    -------
    dict
        ``conditions`` and ``rows``, one for each bundle and number of grains: for both ways what
        was found, what was false, the times, and the ratio of times pattern by pattern.
    """
    rows = []
    total = len(contests) * len(conditions.grains) * conditions.patterns
    done = 0
    for contest in contests:
        for grains in conditions.grains:
            label = f"{contest.material.name} {grains}" if grains else f"{contest.material.name} none"
            tallies = {way: Tally() for way in WAYS}
            # A first pattern that does not count: caches and threads wake up.
            for number in range(-1, conditions.patterns):
                xy_px, truth = _pattern(contest, conditions, grains, number)
                # Who begins alternates, so that neither always finds the caches filled.
                for way in WAYS if number % 2 else WAYS[::-1]:
                    (tallies[way] if number >= 0 else Tally()).add(contest.indexers[way], xy_px, truth)
                done += number >= 0
                report(Seen(done, total, label))
            ratio = np.array(tallies["with"].times_s) / np.array(tallies["without"].times_s)
            rows.append(
                {
                    "label": label,
                    "bundle": contest.bundle,
                    "material": contest.material.name,
                    "grains": grains,
                    **{way: _figures(tallies[way]) for way in WAYS},
                    "time_ratio_10_50_90": np.quantile(ratio, (0.1, 0.5, 0.9)).tolist(),
                }
            )
    return {
        "conditions": asdict(conditions)
        | {"found_within_deg": FOUND_WITHIN_DEG, "count_of_crystals": "unknown"},
        "rows": rows,
    }


def _pattern(
    contest: Contest, conditions: Conditions, grains: int, number: int
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    # Pattern number i of a condition depends on the seed, the grains and i alone.
    rng = np.random.default_rng((conditions.seed, grains, number + 1))
    area = DetectorArea.of(contest.calibration)
    if grains == 0:
        return random_positions(conditions.random_peaks, area, rng), np.empty((0, 3, 3))
    scene = contest.indexers["without"].phases[0].scene
    turns = rotations.to_matrix(rotations.random_rotations(grains, rng))
    made = simulate_pattern(
        [scene.reflections] * grains,
        turns @ contest.material.B0,
        contest.calibration,
        area,
        rng,
        noise_px=conditions.noise_px,
        missing_fraction=conditions.missing,
        spurious_fraction=conditions.spurious,
        energy_keV=scene.reflections.energy_keV,
    )
    return made.xy_px, made.ubs


def _figures(tally: Tally) -> dict[str, Any]:
    patterns = len(tally.scores)
    found, truths, false = tally.found, tally.truths, tally.false
    angles = [angle for score in tally.scores for angle in score.misorientation_deg]
    return {
        "found": found,
        "truths": truths,
        "found_share": found / truths if truths else None,
        # Clopper and Pearson, Biometrika 26, 404 (1934).
        "found_95": [
            float(beta.ppf(0.025, found, truths - found + 1)) if found else 0.0,
            float(beta.ppf(0.975, found + 1, truths - found)) if found < truths else 1.0,
        ]
        if truths
        else None,
        "false": false,
        "false_per_100": 100.0 * false / patterns,
        "false_per_100_at_most_95": 100.0 * float(chi2.ppf(0.95, 2 * (false + 1))) / (2 * patterns),
        "misorientation_deg": float(np.median(angles)) if angles else None,
        "time_s_10_50_90": np.quantile(tally.times_s, (0.1, 0.5, 0.9)).tolist(),
        "times_s": tally.times_s,
    }
