"""Publishes synthetic results through the real sinks, for who writes a subscriber at home.

``python -m daemon.sinks.simulator --count 100 --rate 20`` prints the addresses it has bound as
one line of JSON, publishes, and stays to answer until its standard input is closed. The crystals
are random orientations: the numbers mean nothing, their form is that of the real ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from daemon.sinks import publisher, results_file
from daemon.sinks.base import Published, SeriesClosed, SeriesOpened, Sink, SinkContext, SinkEvent
from grainwatch import __version__
from grainwatch.messages import (
    AnyMessage,
    ArrayData,
    Crystal,
    Fingerprint,
    FrameKey,
    Health,
    ImageStatistics,
    LaueResult,
    MicrographResult,
    ModelInfo,
    Neighbour,
    Novelty,
    PatchGrid,
    PhaseMorphology,
    ProcessPosterior,
    Provenance,
    Times,
    encode,
)

CELL_A = 3.6
PEAKS = 120


def synthetic_crystal(rng: np.random.Generator, material: str = "Cu") -> Crystal:
    """Return a crystal of uniformly random orientation, cubic cell of 3.6 angstrom."""
    w, x, y, z = quaternion = _unit_quaternion(rng)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    expected = int(rng.integers(60, 90))
    matched = int(rng.integers(30, expected))
    strain = rng.normal(scale=1e-4, size=(3, 3))
    strain = (strain + strain.T) / 2
    return Crystal(
        material=material,
        UB=ArrayData.of(rotation / CELL_A),
        B0=ArrayData.of(np.eye(3) / CELL_A),
        quaternion=(float(quaternion[0]), float(quaternion[1]), float(quaternion[2]), float(quaternion[3])),
        euler_deg=_bunge_deg(rotation.T),
        strain_crystal=ArrayData.of(strain),
        strain_sample=ArrayData.of(strain),
        strain_sigma=ArrayData.of(np.full((3, 3), np.nan)),
        orientation_sigma_deg=0.003,
        spots_matched=matched,
        spots_expected=expected,
        match_rate=matched / expected,
        chance_match_rate=0.08,
        false_probability=1e-9,
        residual_px=float(rng.uniform(0.1, 0.3)),
        depth_um=0.0,
        spot_indices=ArrayData.of(np.arange(matched), "<i4"),
        hkl=ArrayData.of(rng.integers(-9, 10, (matched, 3)), "<i2"),
    )


def synthetic_result(
    frame: int,
    rng: np.random.Generator,
    *,
    seq: int,
    series_uid: str,
    source: str = "laue",
    publisher: str = "simulator",
    crystals: int = 2,
    again: bool = False,
) -> LaueResult:
    """Return a result with random peaks and so many random crystals, stamped with the time now."""
    now = time.time()
    return LaueResult(
        publisher=publisher,
        seq=seq,
        again=again,
        times=Times(acquired=now, received=now, processed=now, published=now),
        key=FrameKey(source, series_uid, frame),
        provenance=Provenance(ModelInfo("synthetic", __version__), "none", "none"),
        n_peaks=PEAKS,
        peaks=ArrayData.of(rng.uniform(1, 2000, (PEAKS, 4)), "<f4"),
        crystals=tuple(synthetic_crystal(rng) for _ in range(crystals)),
        grid_index=(frame % 10, frame // 10),
        compute_ms=1.0,
    )


def synthetic_micrograph(
    frame: int,
    rng: np.random.Generator,
    *,
    seq: int,
    series_uid: str,
    source: str = "sem",
    publisher: str = "simulator",
    pixel_size_um: float | None = 0.05,
) -> MicrographResult:
    """Return what a micrograph of 512 x 512 px might show, stamped with the time now."""
    now, model, n = time.time(), ModelInfo("synthetic", __version__), 16
    fraction, path_px = float(rng.uniform(0.4, 0.8)), float(rng.uniform(10.0, 40.0))
    rates = (0.5, 2.0, 8.0)
    p = rng.dirichlet(np.ones(len(rates)))
    mean = float(p @ np.array(rates))
    return MicrographResult(
        publisher=publisher,
        seq=seq,
        times=Times(acquired=now, received=now, processed=now, published=now),
        key=FrameKey(source, series_uid, frame),
        provenance=Provenance(model, "", "none"),
        compute_ms=60.0,
        shape_px=(512, 512),
        pixel_size_um=pixel_size_um,
        instrument="synthetic",
        statistics=ImageStatistics(0.5, 0.2, 6.5, 0.3, 0.01, 0.01, full_scale=255.0),
        patches=PatchGrid(128, 128, (0, 0), (4, 4), ArrayData.of(np.arange(n), "<i4")),
        fingerprints=(
            Fingerprint(
                model,
                "vqvae",
                ArrayData.of(rng.normal(size=128), "<f4"),
                ArrayData.of(rng.uniform(size=128), "<f4"),
                ArrayData.of(rng.integers(0, 512, (n, 16, 16)), "<u2"),
                512,
            ),
        ),
        morphology=PhaseMorphology(
            phase="bright",
            threshold=120,
            separability=0.8,
            doubtful=0.03,
            fraction=fraction,
            fraction_spread=0.05,
            free_path_rows_px=path_px,
            free_path_columns_px=path_px,
            free_path_px=path_px,
            free_path_spread_px=2.0,
            free_path_um=None if pixel_size_um is None else path_px * pixel_size_um,
            free_path_spread_um=None if pixel_size_um is None else 2.0 * pixel_size_um,
            chords=(400.0, 410.0),
            patches=n,
        ),
        posterior=ProcessPosterior(
            quantity="ln_cooling_rate",
            candidates=tuple(map(str, rates)),
            values=rates,
            probability=tuple(map(float, p)),
            log_likelihood=(-900.0, -890.0, -910.0),
            mean=mean,
            sigma=float(np.sqrt(p @ (np.array(rates) - mean) ** 2)),
            typicality=0.4,
            none_of_these=False,
            patches=n,
        ),
        novelty=Novelty(0.4, False, 0.05, 1.1, 0.9, 0.02, 6.9),
        neighbours=(Neighbour(FrameKey(source, series_uid, max(frame - 1, 0)), 0.8),),
        flags=() if pixel_size_um else ("pixel_size_unknown",),
    )


def synthetic_health(seq: int, uptime_s: float, publisher: str = "simulator") -> Health:
    """Return the health of a daemon without streams."""
    return Health(
        publisher=publisher,
        seq=seq,
        times=Times(published=time.time()),
        name=publisher,
        version=__version__,
        state="running",
        uptime_s=uptime_s,
        workers=0,
        worker_restarts=0,
    )


def published(message: AnyMessage, stream: str = "laue") -> Published:
    """Wrap a message as sinks take it."""
    return Published(stream, message, encode(message))


def simulate(sinks: list[Sink], context: SinkContext, options: argparse.Namespace) -> None:
    """Publish series of synthetic results at a fixed rate, and health once a second until stopped."""
    rng = np.random.default_rng(options.seed)
    seqs = itertools.count(options.first_seq)
    stop = threading.Event()
    threading.Thread(target=_wait_for_end_of_input, args=(stop,), daemon=True).start()
    started = next_health = time.monotonic()

    def emit(events: list[SinkEvent]) -> None:
        for sink in sinks:
            sink.handle(events)
            sink.idle()

    def health() -> None:
        nonlocal next_health
        if time.monotonic() >= next_health:
            next_health += 1.0
            message = synthetic_health(next(seqs), time.monotonic() - started, context.daemon_name)
            emit([published(message)])

    emitted = 0
    for number in range(options.series):
        uid = f"{options.seed:08x}{number:024x}"
        emit([SeriesOpened("laue", uid, time.time(), detector_series=str(number), n_frames=options.count)])
        for frame in range(options.count):
            health()
            result = synthetic_result(
                frame, rng, seq=next(seqs), series_uid=uid, publisher=context.daemon_name
            )
            emit([published(result)])
            emitted += 1
            if stop.wait(max(0.0, started + emitted / options.rate - time.monotonic())):
                return
        counts = {"received": options.count, "done": options.count}
        emit([SeriesClosed("laue", uid, time.time(), counts)])
    while options.stay and not stop.wait(0.1):
        health()
        emit([])


@dataclass(frozen=True, slots=True)
class Running:
    """A simulator in a process of its own, and the addresses it has bound."""

    process: subprocess.Popen[bytes]
    results: str
    catch_up: str


@contextmanager
def running(*arguments: str) -> Iterator[Running]:
    """Run the simulator in a process of its own; it ends with the ``with`` block.

    Raises
    ------
    RuntimeError
        If it does not start; what it said is on standard error.
    """
    command = [sys.executable, "-m", "daemon.sinks.simulator", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the simulator ended at once with status {process.wait()}")
        # The end of the block closes its standard input, which ends it.
        yield Running(process, **json.loads(line))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m daemon.sinks.simulator", description=__doc__)
    parser.add_argument(
        "--results", default="tcp://127.0.0.1:*", help="PUB address (the system picks the port)"
    )
    parser.add_argument("--catch-up", default="tcp://127.0.0.1:*", help='ROUTER address, "" for none')
    parser.add_argument("--folder", help="write results files there, and catch up from them")
    parser.add_argument("--count", type=int, default=100, help="results in a series")
    parser.add_argument("--series", type=int, default=1)
    parser.add_argument("--rate", type=float, default=20.0, help="results a second")
    parser.add_argument("--first-seq", type=int, default=1)
    parser.add_argument("--ring-messages", type=int, default=10_000)
    parser.add_argument("--name", default="simulator")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-stay", dest="stay", action="store_false", help="end after the last result")
    options = parser.parse_args()
    context = SinkContext(options.name, Path(options.folder or "."))
    config = publisher.Config(
        results=options.results,
        catch_up=options.catch_up,
        results_dir=options.folder or "",
        ring_messages=options.ring_messages,
    )
    zmq_sink = publisher.open_sink(config, context)
    sinks: list[Sink] = [zmq_sink]
    if options.folder:
        sinks.append(results_file.open_sink(results_file.Config(folder=options.folder), context))
    addresses = {"results": zmq_sink.results_address, "catch_up": zmq_sink.catch_up_address}
    print(json.dumps(addresses), flush=True)
    try:
        simulate(sinks, context, options)
    except KeyboardInterrupt:
        pass
    finally:
        for sink in reversed(sinks):
            sink.close()


def _wait_for_end_of_input(stop: threading.Event) -> None:
    # Past Python's own buffer, whose lock would be held when the program ends.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()


def _unit_quaternion(rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    q = rng.normal(size=4)
    q /= np.linalg.norm(q)
    return -q if q[0] < 0 else q


def _bunge_deg(g: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> tuple[float, float, float]:
    """Bunge angles of a passive rotation matrix (away from Phi = 0)."""
    angles = (
        np.degrees([np.arctan2(g[2, 0], -g[2, 1]), np.arccos(g[2, 2]), np.arctan2(g[0, 2], g[1, 2])]) % 360
    )
    return float(angles[0]), float(angles[1]), float(angles[2])


if __name__ == "__main__":
    main()
