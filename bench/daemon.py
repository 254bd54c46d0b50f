"""Frames through a real daemon: how many a second, how late, how much memory.

Detector and daemon are processes of their own and share the two cores that the row grants. All
frames differ; each is decompressed, searched, indexed, refined, published and written to a file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.frames import Recipe, frames
from bench.patterns import GEOMETRY_C
from bench.report import Report
from bench.rig import counts, process, wait_until, write_config
from grainwatch.messages import AnyResult, LaueResult, MicrographResult
from pipelines.results_files import ResultsFile, results_files

WORKERS = 2
ASKED_HZ = 12.0
ASKED_HZ_WITH_BUNDLE = 15.0
ASKED_GIB = 1.5
START_S = 120.0
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Run:
    """What was seen of a run.

    Attributes
    ----------
    pss_bytes : list of int
        Memory of all processes of the daemon together, shared pages counted once.
    core_share : dict of str to float
        Processor time by wall time in the window, of "front", "workers" and "detector".
    latency_s : (n,) array
        From the arrival of a frame to its publication, in the window.
    results : list of FrameResult
        All of the file.
    """

    rate_hz: float = 0.0
    seconds: float = 0.0
    pss_bytes: list[int] = field(default_factory=list)
    core_share: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    latency_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    compute_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    results: list[AnyResult] = field(default_factory=list)

    @property
    def crystals(self) -> npt.NDArray[np.int64]:
        """Found in each frame."""
        return np.array([len(r.crystals) for r in self.results if isinstance(r, LaueResult)], dtype=np.int64)


def rows(report: Report) -> None:
    """Add the rows."""
    count = report.scale(full=300, quick=8)
    recipe = Recipe(count, report.seed)
    folder = frames(recipe)
    size = sum(path.stat().st_size for path in folder.iterdir()) / count / 1e6
    rows_, columns = GEOMETRY_C.shape
    said = (
        f"{count} different {rows_}x{columns} uint16 frames, bslz4 {size:.2f} MB, {recipe.crystals}"
        f" {recipe.material} grains, geometry C, 2 cores for daemon ({WORKERS} workers) and detector,"
        f" seed {report.seed}"
    )
    fast = through_a_daemon(folder, rate_hz=0.0, seconds=report.scale(full=60, quick=4))
    check(fast)
    report.add(
        "daemon, frames through it, none dropped",
        fast.rate_hz,
        "frames/s",
        at_least=ASKED_HZ,
        conditions=f"{fast.seconds:.0f} s as fast as it takes them (policy block), {said}",
        data={"counts": fast.counts, "core_share": fast.core_share, "seconds": fast.seconds},
    )
    report.add(
        "daemon, memory of all its processes",
        max(fast.pss_bytes) / 2**30,
        "GiB",
        at_most=ASKED_GIB,
        conditions="largest sum of PSS in that run, its queues full",
        data={"pss_bytes": fast.pss_bytes},
    )
    report.add(
        "daemon, crystals found of those in the frames",
        100
        * float(np.minimum(fast.crystals, recipe.crystals).sum())
        / (recipe.crystals * len(fast.crystals)),
        "%",
        conditions=f"{len(fast.crystals)} results of that run",
        data={"crystals": np.bincount(fast.crystals)},
    )
    report.add(
        "daemon, share of a core that the detector took",
        100 * fast.core_share["detector"],
        "%",
        conditions=f"in that run; front {100 * fast.core_share['front']:.0f} %,"
        f" workers {100 * fast.core_share['workers']:.0f} %",
    )
    named = through_a_daemon(
        folder, rate_hz=0.0, seconds=report.scale(full=60, quick=4), bundle=[recipe.material]
    )
    check(named)
    report.add(
        "daemon with the shipped bundle, frames through it, none dropped",
        named.rate_hz,
        "frames/s",
        at_least=ASKED_HZ_WITH_BUNDLE,
        conditions=f"as above, classical: {fast.rate_hz:.1f} frames/s",
        data={"counts": named.counts, "core_share": named.core_share, "seconds": named.seconds},
    )
    steady = through_a_daemon(folder, rate_hz=ASKED_HZ, seconds=report.scale(full=60, quick=4))
    check(steady)
    late, work = 1e3 * steady.latency_s, 1e3 * steady.compute_s
    report.add(
        f"daemon at {ASKED_HZ:g} frames/s, latency p50",
        float(np.quantile(late, 0.5)),
        "ms",
        conditions=f"arrival to publication, {len(late)} frames; computing {np.median(work):.1f} ms of it;"
        f" detector {100 * steady.core_share['detector']:.0f} % of a core",
        data={"latency_s": steady.latency_s, "core_share": steady.core_share, "counts": steady.counts},
    )
    report.add(
        f"daemon at {ASKED_HZ:g} frames/s, latency p99",
        float(np.quantile(late, 0.99)),
        "ms",
        conditions=f"worst {late.max():.0f} ms; computing p99 {np.quantile(work, 0.99):.0f} ms",
    )


def through_a_daemon(
    folder: Path,
    rate_hz: float,
    seconds: float,
    workers: int = WORKERS,
    config: str = "",
    bundle: Sequence[str] = (),
) -> Run:
    """Send frames through a daemon for some seconds once it has got going; see `measured`."""
    with tempfile.TemporaryDirectory(prefix="grainwatch-bench-") as scratch:
        place = Path(scratch)
        address = write_config(place, workers, config, bundle)
        count = str(10**9 if not rate_hz else round(rate_hz * (seconds + 2)))
        detector = ["-m", "bench.frames", str(folder), address, str(rate_hz), count]
        return measured(place, detector, seconds, endless=not rate_hz)


def measured(place: Path, detector_arguments: Sequence[str], seconds: float, *, endless: bool) -> Run:
    """Run the daemon of a folder, and a detector beside it.

    Parameters
    ----------
    place : Path
        With ``grainwatch.toml``, of one stream, whose results go to ``results``.
    detector_arguments : sequence of str
        For Python.
    seconds : float
        That are measured, from the tenth frame on.
    endless : bool
        Whether the detector sends until it is ended.

    Raises
    ------
    RuntimeError
        If a process fails.
    """
    with process(place / "daemon.txt", "-m", "grainwatch", "run", str(place / "grainwatch.toml")) as front:
        wait_until(place, front, lambda status: status["state"] == "running", START_S)
        with process(place / "detector.txt", *detector_arguments) as detector:
            wait_until(place, front, lambda status: status["streams"][0]["done"] >= 10, START_S)
            run, begin, end = _watch(place, front, detector, seconds)
            if endless:
                detector.terminate()
            detector.wait(60)
        wait_until(place, front, lambda status: not status["streams"][0]["in_flight"], START_S)
        run.counts = counts(place)
        front.send_signal(signal.SIGTERM)
        if front.wait(30):
            raise RuntimeError((place / "daemon.txt").read_text())
    (path,) = results_files(place / "results")
    with ResultsFile(path) as file:
        run.results = [
            found for found in file.messages() if isinstance(found, (LaueResult, MicrographResult))
        ]
    inside = [r for r in run.results if begin <= r.times.received and r.times.published <= end]
    run.latency_s = np.array([r.times.published - r.times.received for r in inside])
    run.compute_s = np.array([1e-3 * r.compute_ms for r in inside])
    if len(run.results) != run.counts["done"]:
        raise RuntimeError(f"{len(run.results)} results in the file, {run.counts['done']} frames done")
    return run


def _watch(
    place: Path, front: subprocess.Popen[bytes], detector: subprocess.Popen[bytes], seconds: float
) -> tuple[Run, float, float]:
    run = Run()
    groups = {"front": [front.pid], "workers": _children(front.pid), "detector": [detector.pid]}
    daemon = [*groups["front"], *groups["workers"]]
    before = {name: sum(map(_cpu_s, pids)) for name, pids in groups.items()}
    done, began, begin = counts(place)["done"], time.monotonic(), time.time()
    while (passed := time.monotonic() - began) < seconds:
        run.pss_bytes.append(sum(map(_pss_bytes, daemon)))
        time.sleep(min(0.5, seconds - passed))
    run.rate_hz = (counts(place)["done"] - done) / (time.monotonic() - began)
    run.seconds = time.monotonic() - began
    run.core_share = {
        name: (sum(map(_cpu_s, pids)) - before[name]) / run.seconds for name, pids in groups.items()
    }
    return run, begin, time.time()


def check(run: Run) -> None:
    """A rate says nothing unless every frame that was received is done."""
    bad = {k: run.counts[k] for k in ("failed", "dropped", "lost", "missing", "in_flight") if run.counts[k]}
    if bad or run.counts["received"] != run.counts["done"]:
        raise RuntimeError(f"not every frame was done: {run.counts}")


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/{pid}/smaps_rollup holds no Pss")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK
