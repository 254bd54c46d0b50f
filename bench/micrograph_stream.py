"""Micrographs through a real daemon, sent as areaDetector's ZeroMQ plug-in sends arrays."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from bench.daemon import WORKERS, Run, check, measured
from bench.micrograph_models import BUNDLES, SYNTHETIC
from bench.report import Report
from daemon.demo.station import free_ports
from grainwatch.messages import MicrographResult

ASKED_HZ = 10.0


def rows(report: Report) -> None:
    """Add the rows."""
    seconds = report.scale(full=60, quick=5)
    images = report.scale(full=100, quick=20)
    for patches, asked in ((4, ASKED_HZ), (16, None))[: report.scale(full=2, quick=1)]:
        run = through_a_daemon(report.seed, seconds, patches, images)
        check(run)
        # Of a short run no image came and went within the time that was measured: the queues are full.
        took = (
            f"; computing {1e3 * np.median(run.compute_s):.0f} ms an image, {np.median(run.latency_s):.1f} s"
            " from arrival to publication with full queues"
            if len(run.latency_s)
            else ""
        )
        results = [r for r in run.results if isinstance(r, MicrographResult)]
        whole = sum(r.posterior is not None and r.novelty is not None for r in results)
        if whole < len(run.results):
            raise RuntimeError(f"{whole} of {len(run.results)} images have posterior and novelty")
        report.add(
            f"daemon, micrographs through it, {patches} patches for the posterior, none dropped",
            run.rate_hz,
            "images/s",
            at_least=asked,
            conditions=f"{run.seconds:.0f} s as fast as it takes them, {images} different synthetic images of"
            f" 512 x 512 px as array-1.0 over PUSH, bundle {SYNTHETIC}: fingerprint, morphology, posterior,"
            f" novelty, neighbours, alarm; 2 cores for daemon ({WORKERS} workers) and detector{took}",
            data={"counts": run.counts, "core_share": run.core_share, "seconds": run.seconds},
        )


def through_a_daemon(seed: int, seconds: float, posterior_patches: int, images: int) -> Run:
    """Send synthetic micrographs through a daemon for some seconds, as fast as it takes them."""
    with tempfile.TemporaryDirectory(prefix="grainwatch-bench-") as scratch:
        place = Path(scratch)
        detector, results, catch_up = (f"tcp://127.0.0.1:{port}" for port in free_ports(3))
        (place / "grainwatch.toml").write_text(
            f"""
[daemon]
state_dir = "{place}/state"
runtime_dir = "{place}/run"
workers = {WORKERS}
[streams.sem.source]
type = "areadetector"
address = "{detector}"
role = "primary"
[streams.sem.pipeline]
type = "micrograph"
bundle = ["{BUNDLES / SYNTHETIC}"]
posterior_patches = {posterior_patches}
[sinks.zmq]
results = "{results}"
catch_up = "{catch_up}"
results_dir = "{place}/results"
[sinks.hdf5]
folder = "{place}/results"
"""
        )
        arguments = ["-m", "grainwatch", "simulate", "areadetector", "--bind", detector]
        arguments += ["--pattern", "push", "--micrographs", str(images), "--repeat", str(10**6)]
        arguments += ["--rate", "0", "--seed", str(seed)]
        return measured(place, arguments, seconds, endless=True)
