"""Peaks to refined crystals: time, found and false crystals, misorientation, strain, reliability."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.bounds import mean_at_most_95
from bench.patterns import BAND_KEV, GEOMETRY_C, Condition, pattern, reflections
from bench.report import Report
from offline_training.laue.scoring import Tally, score
from pipelines import rotations
from pipelines.laue.crystal import load_material
from pipelines.laue.forward import simulate_pattern
from pipelines.laue.geometry import DetectorArea
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.parameters import IndexingParameters, Phase
from pipelines.laue.indexing.refine import decompose, strain_sigma

FloatArray = npt.NDArray[np.float64]

_CASES = (
    ("Cu", 1, 99.0, 50.0, "lauetools.index.Cu.1", "100 % at 1.5 s"),
    ("Cu", 2, 99.0, 50.0, "lauetools.index.Cu.2", "100 % at 3.2 s"),
    ("Cu", 5, 99.0, 50.0, "lauetools.index.Cu.5", "100 % at 7.9 s"),
    ("Cu", 10, 98.0, None, "lauetools.index.Cu.10", "100 % at 17.2 s"),
    ("Ti", 1, None, None, "lauetools.index.Ti.1", ""),
    ("Ti", 2, None, None, "", ""),
    ("Al2O3", 1, None, None, "lauetools.index.Al2O3.1", ""),
    ("Al2O3", 2, None, None, "", ""),
    ("ZrO2", 1, None, None, "lauetools.index.ZrO2.1", "1 of 2 at 3.2 and 40 s"),
    ("ZrO2", 2, None, None, "", ""),
    ("ZrO2", 5, None, None, "", ""),
)


def rows(report: Report) -> None:
    """Add the rows."""
    indexers = {name: _indexer(name) for name in ("Cu", "Ti", "Al2O3", "ZrO2")}
    n = report.scale(full=100, quick=10)
    false = patterns = 0
    for material, grains, found_least, ms_most, key, published in _CASES:
        count = n if material == "Cu" else report.scale(full=50, quick=5)
        tally = _run(report, indexers[material], Condition(material, grains), count)
        false, patterns = false + tally.false, patterns + count
        _report_case(report, material, grains, tally, found_least, ms_most, key, published)
    report.add(
        "false crystals per 100 patterns, all of the above",
        100.0 * false / patterns,
        at_most=0.5,
        peer="LaueTools 0 of 24 patterns",
        conditions=f"{false} in {patterns} patterns; 95 % bound {100 * mean_at_most_95(false, patterns):.2f}",
        data={"false": false, "patterns": patterns},
    )
    _nulls(report, indexers)
    _strain(report, indexers["Cu"])
    _reliability(report, indexers["Cu"])


def _indexer(name: str, parameters: IndexingParameters | None = None) -> Indexer:
    area = DetectorArea.of(GEOMETRY_C)
    phase = Phase.prepare(load_material(name), GEOMETRY_C, area, BAND_KEV)
    indexer = Indexer((phase,), parameters or IndexingParameters())
    indexer.index(np.random.default_rng(0).uniform(100, 1900, (100, 2)))
    return indexer


def _run(report: Report, indexer: Indexer, condition: Condition, count: int) -> Tally:
    tally = Tally()
    for number in range(count):
        made = pattern(report, condition, number)
        tally.add(indexer, made.xy_px, made.ubs)
    return tally


def _report_case(
    report: Report,
    material: str,
    grains: int,
    tally: Tally,
    found_least: float | None,
    ms_most: float | None,
    key: str,
    published: str,
) -> None:
    label = f"{material} {grains} grain{'s' if grains > 1 else ''}"
    condition = str(Condition(material, grains))
    miso = [m for s in tally.scores for m in s.misorientation_deg]
    p90 = 1e3 * float(np.quantile(tally.times_s, 0.9))
    report.add(
        f"{label}: crystals found, count unknown",
        100.0 * tally.found / tally.truths,
        "%",
        at_least=found_least,
        peer=report.peer(f"{key}.found", published=published) if key else "",
        conditions=f"{len(tally.scores)} patterns, {condition}, seed {report.seed}; {tally.false} false",
        data={"found": tally.found, "truths": tally.truths, "false": tally.false},
    )
    report.add(
        f"{label}: peaks to refined crystals",
        1e3 * float(np.median(tally.times_s)),
        "ms",
        at_most=ms_most,
        peer=report.peer(f"{key}.time", published=published) if key else "",
        conditions=f"median of {len(tally.times_s)}, 90 % within {p90:.0f} ms, one core",
        data={"times_s": tally.times_s},
    )
    report.add(
        f"{label}: median misorientation, 0.2 px noise",
        float(np.median(miso)) if miso else float("nan"),
        "deg",
        at_most=0.01 if material == "Cu" and not report.quick else None,
        peer="0.006-0.011 deg (LaueTools, published)" if material == "Cu" else "",
        data={"misorientation_deg": miso},
    )


def _nulls(report: Report, indexers: dict[str, Indexer]) -> None:
    # Random peaks in the numbers that frames have, and peaks of a material that is not searched.
    share = report.scale(full=100, quick=10)
    false = total = 0
    counts: dict[str, int] = {}
    cases: list[tuple[str, Condition]] = [
        (name, Condition("Cu", 0, peaks=peaks)) for name in ("Cu", "Ti", "ZrO2") for peaks in (60, 150)
    ]
    cases += [
        ("Ti", Condition("Cu", 5)),
        ("ZrO2", Condition("Cu", 5)),
        ("Cu", Condition("ZrO2", 1)),
        ("Cu", Condition("Ti", 2)),
    ]
    for name, condition in cases:
        here = 0
        for number in range(share):
            here += len(indexers[name].index(pattern(report, condition, number).xy_px))
        counts[f"{name} in {condition}"] = here
        false, total = false + here, total + share
    report.add(
        "false crystals per 100 null patterns (random peaks; wrong material)",
        100.0 * false / total,
        at_most=1.0,
        peer=report.peer("lauetools.null.60.false", published="0 of 24 patterns"),
        conditions=f"{false} in {total} patterns; 95 % bound {100 * mean_at_most_95(false, total):.2f}",
        data=counts,
    )


def _strain(report: Report, indexer: Indexer) -> None:
    # z = (estimate − truth) / sigma of each strain and rotation component; one crystal a pattern.
    listed = reflections("Cu")
    area = DetectorArea.of(GEOMETRY_C)
    rng = report.rng("strain")
    count = report.scale(full=200, quick=40)
    strain_z: list[FloatArray] = []
    rotation_z: list[FloatArray] = []
    for _ in range(count):
        random = rng.normal(0.0, 1e-3, (3, 3))
        strain = (random + random.T) / 2
        strain -= np.eye(3) * np.trace(strain) / 3
        turn = rotations.to_matrix(rotations.random_rotations(1, rng)[0])
        m = turn @ np.linalg.inv(np.eye(3) + strain)
        made = simulate_pattern(
            [listed], (m @ listed.material.B0)[None], GEOMETRY_C, area, rng, spurious_fraction=0.1
        )
        for found in indexer.index(made.xy_px)[:1]:
            if found.strain is None:
                continue
            rotation, _ = decompose(found.matrix)
            equivalent = _nearest_equivalent(rotation, turn, listed.material.lattice_rotations)
            estimate = equivalent @ found.strain @ equivalent.T
            sigma = strain_sigma(found.covariance, turn.T)
            upper = np.triu_indices(3)
            strain_z.append(((estimate - strain) / sigma)[upper])
            lab = rotation @ equivalent.T @ turn.T
            vector = np.array([lab[2, 1] - lab[1, 2], lab[0, 2] - lab[2, 0], lab[1, 0] - lab[0, 1]]) / 2
            rotation_z.append(vector / np.sqrt(np.diag(found.covariance)[:3]))
    for what, values in (("strain", strain_z), ("orientation", rotation_z)):
        z = np.concatenate(values)
        report.add(
            f"(estimate - truth)/sigma of {what}, standard deviation",
            float(np.std(z)),
            at_least=None if report.quick else 0.9,  # 40 patterns scatter by more than 0.1
            at_most=None if report.quick else 1.1,
            peer="no peer gives a sigma",
            conditions=f"{len(values)} of {count} strained Cu patterns (1e-3), 0.2 px, seed {report.seed}",
            data={"z": z.tolist()},
        )


def _nearest_equivalent(rotation: FloatArray, truth: FloatArray, operators: FloatArray) -> FloatArray:
    # The symmetry operator S with rotation ~ truth S.
    trace = np.einsum("ij,nij->n", truth.T @ rotation, operators)
    return np.asarray(operators[int(np.argmax(trace))])


def _reliability(report: Report, indexer: Indexer) -> None:
    # With nearly everything let through: of the crystals said to be false with probability p, how
    # many are? Sparse, weak grains among random peaks give the doubtful ones.
    open_door = Indexer(
        indexer.phases, IndexingParameters(max_false_probability=1 - 1e-12, min_matched=4, max_seeds=30)
    )
    rng = report.rng("reliability")
    listed = reflections("Cu")
    area = DetectorArea.of(GEOMETRY_C)
    said: list[float] = []
    wrong: list[bool] = []
    for _ in range(report.scale(full=400, quick=40)):
        turn = rotations.to_matrix(rotations.random_rotations(1, rng))
        made = simulate_pattern(
            [listed],
            turn @ listed.material.B0,
            GEOMETRY_C,
            area,
            rng,
            missing_fraction=float(rng.uniform(0.5, 0.9)),
            spurious_fraction=float(rng.uniform(5.0, 15.0)),
        )
        for found in open_door.index(made.xy_px):
            here = score((found.matrix @ listed.material.B0)[None], made.ubs, listed.material)
            said.append(found.false_probability)
            wrong.append(here.found == 0)
    _reliability_rows(report, said, wrong)


def _reliability_rows(report: Report, said: Sequence[float], wrong: Sequence[bool]) -> None:
    edges = (0.0, 1e-3, 1e-2, 0.1, 0.5, 1.0)
    p, is_wrong = np.array(said), np.array(wrong)
    table = []
    for low, high in itertools.pairwise(edges):
        inside = (p >= low) & (p < high) if high < 1.0 else (p >= low)
        table.append([low, high, int(inside.sum()), int(is_wrong[inside].sum())])
    shown = "; ".join(f"{low:g}-{high:g}: {bad} of {n}" for low, high, n, bad in table)
    observed, stated = int(is_wrong.sum()), float(p.sum())
    report.add(
        "false crystals observed over stated, doubtful crystals let through",
        observed / max(stated, 1e-9),
        at_most=1.2,
        conditions=f"{observed} observed, {stated:.1f} stated; p: false of all: {shown}",
        data={"bins": table},
    )
    _plot(Path(".out") / "bench" / "reliability.png", table)


def _plot(path: Path, table: Sequence[Sequence[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    for low, high, n, bad in table:
        if n:
            middle = 0.5 * (low + high)
            rate = bad / n
            spread = np.sqrt(max(rate * (1 - rate), 1 / n) / n)
            axes.errorbar(middle, rate, yerr=spread, fmt="o", color="#4e79a7")
            axes.annotate(f"{int(n)}", (middle, rate), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.plot([0, 1], [0, 1], "--", color="#999999")
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set_xlim(0.0, 1.5)
    axes.set_xlabel("false_probability as stated")
    axes.set_ylabel("share that is false")
    axes.set_title("Reliability (numbers: crystals in the bin)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
