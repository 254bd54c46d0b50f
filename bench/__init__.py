"""Benchmarks: every figure that the project claims, measured by one command (`python -m bench`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bench:
    """One module of rows.

    Attributes
    ----------
    name : str
        What is typed after ``python -m bench``.
    module : str
        Module with a function ``rows(report: bench.report.Report) -> None``.
    about : str
        One line for ``--list``.
    cores : int
        To how many cores the process (and what it starts) is tied while the rows run.
    """

    name: str
    module: str
    about: str
    cores: int = 1


BENCHES = (
    Bench("peaks", "bench.peaks", "peak search: time, and quality on rendered frames"),
    Bench(
        "indexing", "bench.indexing", "peaks to refined crystals: time, found, false, misorientation, strain"
    ),
    Bench("lauenn", "bench.lauenn", "networks: classes right and honest, crystals and time with and without"),
    Bench("engines", "bench.engines", "what runs the networks, in how many bits: time, answers, crystals"),
    Bench("calibrate", "bench.calibrate", "calibration: converged starts, residual, sigmas; drift watch"),
    Bench("maps", "bench.maps", "map points a second, grains linked"),
    Bench("source", "bench.source", "decoding of detector messages"),
    Bench("transport", "bench.transport", "a source without analysis beside a bare PULL socket", cores=2),
    Bench("ledger", "bench.ledger", "frames a second that the ledger holds"),
    Bench("daemon", "bench.daemon", "frames a second through a real daemon", cores=2),
    Bench("exchange", "bench.exchange", "models swapped and shadowed under a detector", cores=2),
    Bench("micrographs", "bench.micrographs", "codes of held-out micrographs, and time of an image"),
    Bench("judgement", "bench.micrograph_judgement", "process conditions, strangers, drift alarm"),
    Bench("drawing", "bench.micrograph_drawing", "micrographs that are drawn, as distributions (torch)"),
    Bench("micrograph-stream", "bench.micrograph_stream", "micrographs a second through a daemon", cores=2),
    Bench("left-out", "bench.left_out", "conditions that a model was never shown (torch; trains)", cores=2),
    Bench("start", "bench.start", "from the start of a daemon until it is ready", cores=2),
)
"""A new benchmark is one module here and one line in this list; they run in this order."""
