"""What an engine is worth on this machine: parity and latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.engines.bundle import Bundle
from pipelines.engines.engine import Engine
from pipelines.engines.onnxruntime_engine import OnnxEngine
from pipelines.engines.selftest import SelfTest, deviation, read_self_test

BATCHES = (1, 32, 512)
_REPEATS = 20


@dataclass(frozen=True)
class Worth:
    """Figures of an engine.

    Attributes
    ----------
    off : float
        Largest difference of its answers to the bundle's self-test from those of ONNX Runtime in float32.
    latency_ms : dict of int to float
        Median time of a batch of so many rows, copies to and from the device included.
    """

    off: float
    latency_ms: dict[int, float]


def worth(engine: Engine, bundle: Bundle, batches: Sequence[int] = BATCHES) -> Worth:
    """Compare an engine with ONNX Runtime in float32, and time it."""
    given = read_self_test(bundle).inputs
    peer = SelfTest(given, OnnxEngine(bundle).run(given))
    latencies = {}
    for rows in batches:
        batch = {name: np.resize(x, (rows, *x.shape[1:])) for name, x in given.items()}
        times = []
        for _ in range(_REPEATS + 1):
            start = time.perf_counter()
            engine.run(batch)
            times.append(time.perf_counter() - start)
        # The first one makes room.
        latencies[rows] = 1e3 * statistics.median(times[1:])
    return Worth(deviation(engine.run, peer), latencies)
