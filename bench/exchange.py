"""Models exchanged under a detector: what a swap and a shadow cost the frames that run through.

Versions of the shipped bundle of copper that differ in a threshold take turns in a real daemon; all
frames are different real-sized ones.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import msgspec
import numpy as np
import numpy.typing as npt

from bench.daemon import START_S, WORKERS
from bench.frames import Recipe, frames
from bench.report import Report
from bench.rig import counts, process, tell, wait_until, write_config
from daemon.models.registry import Model, Registry
from grainwatch.messages import LaueResult
from pipelines.engines.bundle import DESCRIPTION, MANIFEST, load_bundle, write_bundle
from pipelines.engines.shipped import find_bundle
from pipelines.results_files import read_results, results_files

RATE_HZ = 15.0
PROBATION = 10
SHARE = 0.2
ASKED_SHADOW_RATIO = 1.3


@dataclass
class Rig:
    """A daemon under a detector, and two versions of its model in the registry."""

    place: Path
    front: Popen[bytes]
    detector: Popen[bytes]
    models: tuple[Model, Model]

    def do(self, what: str, model: Model, **more: object) -> float:
        """Ask for an exchange; return how long it took, seconds."""
        request = {"command": "models", "do": what, "name": model.name, "version": model.version, **more}
        took: float = tell(self.place, request, START_S)["models"]["took_s"]
        return took

    def wait_for(self, more: int) -> None:
        """Wait until so many more frames are done."""
        done = counts(self.place)["done"] + more
        wait_until(self.place, self.front, lambda status: status["streams"][0]["done"] >= done, START_S)

    def finish(self) -> tuple[dict[str, int], list[LaueResult]]:
        """Stop detector and daemon in order; return the accounts and what was published.

        Raises
        ------
        RuntimeError
            If a frame has no result: figures would say nothing.
        """
        self.detector.terminate()
        self.detector.wait(60)
        wait_until(self.place, self.front, lambda status: not status["streams"][0]["in_flight"], START_S)
        accounts = counts(self.place)
        self.front.send_signal(signal.SIGTERM)
        if self.front.wait(30):
            raise RuntimeError((self.place / "daemon.txt").read_text())
        results = [r for path in results_files(self.place / "results") for r in read_results(path)]
        if not accounts["received"] == accounts["done"] == len(results) or accounts["missing"]:
            raise RuntimeError(f"{len(results)} results; {accounts}")
        return accounts, results


def rows(report: Report) -> None:
    """Add the rows."""
    count = report.scale(full=300, quick=8)
    recipe = Recipe(count, report.seed)
    folder = frames(recipe)
    said = (
        f"{count} different 4-megapixel frames, {recipe.crystals} {recipe.material} grains, at {RATE_HZ:g}"
        f" frames/s, {WORKERS} workers and the detector on 2 cores, seed {report.seed}"
    )
    _swaps(report, folder, said)
    _shadow(report, folder, said)


def _swaps(report: Report, folder: Path, said: str) -> None:
    swaps, before_s = report.scale(full=100, quick=2), report.scale(full=30, quick=3)
    took = []
    with rig(folder) as at:
        begin = time.time()
        time.sleep(before_s)
        middle = time.time()
        for number in range(swaps):
            took.append(at.do("activate", at.models[number % 2]))
            at.wait_for(PROBATION + 5)
        end = time.time()
        accounts, results = at.finish()
    quiet, swapped = _latency_s(results, begin, middle), _latency_s(results, middle, end)
    known = {model.sha256 for model in at.models} | {load_bundle(find_bundle("Cu")).sha256}
    foreign = sum(r.provenance.model.sha256 not in known for r in results)
    report.add(
        f"{swaps} swaps, frames not answered, or by no version that there is",
        accounts["received"] - len(results) + foreign,
        "frames",
        at_most=0,
        conditions=f"of {accounts['received']}, probation {PROBATION} frames; that an answer is of one"
        f" version as a whole is tested in tests/system/test_models.py; {said}",
    )
    report.add(
        f"{swaps} swaps, latency that the slowest frame has more",
        1e3 * (swapped.max() - np.median(quiet)),
        "ms",
        conditions=f"than the median without swaps, {1e3 * np.median(quiet):.0f} ms (p99"
        f" {1e3 * np.quantile(quiet, 0.99):.0f}, worst {1e3 * quiet.max():.0f}); with swaps median"
        f" {1e3 * np.median(swapped):.0f}, p99 {1e3 * np.quantile(swapped, 0.99):.0f} ms",
        data={"quiet_s": quiet, "swapped_s": swapped},
    )
    report.add(
        f"{swaps} swaps, from the request until the new model computes, median",
        float(np.median(took)),
        "s",
        conditions=f"longest {max(took):.1f} s: {WORKERS} new workers get warm beside the old ones",
        data={"took_s": np.array(took)},
    )


def _shadow(report: Report, folder: Path, said: str) -> None:
    """Windows with and without a shadow take turns, so that the machine's moods fall on both."""
    pairs, seconds = report.scale(full=6, quick=1), report.scale(full=30, quick=3)
    windows: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with rig(folder) as at:
        model = at.models[0]
        for number in range(2 * pairs):
            shadowed = number % 2 == 1
            if number:
                at.do("shadow", model, share=SHARE if shadowed else 0)
            time.sleep(1.0)
            begin = time.time()
            time.sleep(seconds)
            windows[shadowed].append((begin, time.time()))
        at.wait_for(1)
        registry = Registry(at.place / "state")
        summary = registry.comparison_summary(registry.find(model.name, model.version))
        registry.close()
        _, results = at.finish()
    without, beside = (
        np.concatenate([_latency_s(results, *window) for window in windows[which]]) for which in (False, True)
    )
    p99 = {name: float(np.quantile(s, 0.99)) for name, s in (("without", without), ("beside", beside))}
    report.add(
        f"shadow of {100 * SHARE:g} % of the frames, live latency p99, by that without",
        p99["beside"] / p99["without"],
        "ratio",
        at_most=ASKED_SHADOW_RATIO,
        conditions=f"{1e3 * p99['beside']:.0f} against {1e3 * p99['without']:.0f} ms (medians"
        f" {1e3 * np.median(beside):.0f}, {1e3 * np.median(without):.0f}), {len(beside)} and {len(without)}"
        f" frames in {pairs} windows of {seconds:g} s each by turns; {summary['n']} compared; {said}",
        data={"without_s": without, "beside_s": beside},
    )


@contextmanager
def rig(folder: Path) -> Iterator[Rig]:
    """Run a daemon with the bundle of copper under a detector that sends the frames of a folder."""
    with tempfile.TemporaryDirectory(prefix="grainwatch-bench-") as scratch:
        place = Path(scratch)
        more = f"[models]\nprobation_frames = {PROBATION}\n"
        address = write_config(place, WORKERS, more, ["Cu"])
        registry = Registry(place / "state")
        first, second = (registry.add(_version(place, name), "bench") for name in ("a", "b"))
        registry.close()
        arguments = ["-m", "bench.frames", str(folder), address, str(RATE_HZ), str(10**9)]
        with (
            process(place / "daemon.txt", "-m", "grainwatch", "run", str(place / "grainwatch.toml")) as front,
            process(place / "detector.txt", *arguments) as detector,
        ):
            at = Rig(place, front, detector, (first, second))
            wait_until(place, front, lambda status: status["state"] == "running", START_S)
            at.wait_for(20)
            yield at


def _latency_s(results: list[LaueResult], begin: float, end: float) -> npt.NDArray[np.float64]:
    """Return the time from arrival to publication of the frames that arrived in a window."""
    inside = [r.times for r in results if begin <= r.times.received < end]
    return np.array([times.published - times.received for times in inside])


def _version(place: Path, version: str) -> Path:
    """Write the bundle of copper under another version; it answers the same."""
    bundle = load_bundle(find_bundle("Cu"))
    described = msgspec.structs.replace(bundle.description, version=version)
    folder = place / f"bundle-{version}"
    files = {name: data for name, data in bundle.files.items() if name not in (DESCRIPTION, MANIFEST)}
    write_bundle(folder, described, files)
    return folder
