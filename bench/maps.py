"""Maps: how many points a second go in, and whether a large map is slower than a small one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import numpy as np

from bench.report import Report
from grainwatch.messages import LaueResult
from pipelines.laue.crystal import load_material
from pipelines.maps.builder import MapBuilder
from pipelines.maps.grid import ScanGrid
from pipelines.maps.polycrystal import scan_results, voronoi
from pipelines.rotations import random_rotations


def rows(report: Report) -> None:
    side = report.scale(full=320, quick=80)
    _scan(report, side, side * side // 100, "in the order of the scan")
    side = report.scale(full=150, quick=50)
    _scan(report, side, side * side // 100, "in random order", shuffled=True)
    _scan(report, side, 1, "in random order, all one grain", shuffled=True)


def _scan(report: Report, side: int, n_grains: int, words: str, *, shuffled: bool = False) -> None:
    rng = report.rng("maps", words)
    copper = load_material("Cu")
    grid = ScanGrid((side, side), (1.0, 1.0), snake=True)
    labels = voronoi(grid.shape, n_grains, rng)
    results: Iterable[LaueResult] = scan_results(grid, labels, random_rotations(n_grains, rng), copper, rng)
    if shuffled:
        everything = list(results)
        results = [everything[i] for i in rng.permutation(grid.size)]
    built = MapBuilder(
        grid.shape, grid.step_um, "simulated", "simulated", symmetry={"Cu": copper.proper_point_group}
    )
    times_s = np.empty(grid.size)
    crystals = 0
    for n, result in enumerate(results):
        start = time.perf_counter()
        built.add(result)
        times_s[n] = time.perf_counter() - start
        crystals += len(result.crystals)
    start = time.perf_counter()
    snapshot = built.snapshot()
    snapshot_s = time.perf_counter() - start
    tenths_s = [float(np.median(part)) for part in np.array_split(times_s, 10)]
    conditions = (
        f"{grid.size} points, {crystals} crystals, {len(snapshot.grains)} grains found, "
        f"Voronoi of {n_grains}, 2 deg, seed {report.seed}"
    )
    data = {"median_s_of_each_tenth": tenths_s, "snapshot_s": snapshot_s}
    report.add(
        f"map, points a second, {words}", grid.size / times_s.sum(), "1/s", conditions=conditions, data=data
    )
    report.add(
        f"map, slowest 1 in 1000 points, {words}",
        1e3 * float(np.quantile(times_s, 0.999)),
        "ms",
        conditions=conditions,
    )
    report.add(
        f"map, median of the last tenth against the first two, {words}",
        tenths_s[-1] / statistics.mean(tenths_s[:2]),
        at_most=2.0,
        conditions=conditions,
    )
    report.add(f"map, snapshot, {words}", snapshot_s, "s", conditions=conditions)
