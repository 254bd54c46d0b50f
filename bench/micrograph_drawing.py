"""Micrographs that a model draws, beside held-out ones: fraction and free path as distributions."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from bench.micrograph_models import ONE_THREAD, codes_of, patches_of, shown, synthetic_bundle
from bench.report import Report, repetitions_s
from offline_training.micrograph.evaluation import BINS, bins_of, compare_distributions, measure_patches
from offline_training.micrograph.labels import Conditions
from pipelines.engines.bundle import Bundle
from pipelines.micrograph.networks import MicrographModel
from pipelines.micrograph.synthetic import MicrographSimulator

if TYPE_CHECKING:
    from offline_training.micrograph.generator import Generator


def rows(report: Report) -> None:
    """Add the rows."""
    bundle = synthetic_bundle(report)
    name = bundle.description.name
    if find_spec("torch") is None:
        report.add(f"{name}: drawing", "not measured", conditions="torch is absent")
        return
    import torch

    from offline_training.micrograph.generator import Generator

    torch.set_num_threads(1)
    generator = Generator.open(bundle)
    condition = torch.zeros(1, len(generator.names))
    rng = report.rng("drawing")
    times = repetitions_s(
        lambda: generator.sampler.sample(1, generator.shape, condition, rng), report.scale(full=20, quick=3)
    )
    report.add(
        f"{name}: a map of 16 x 16 codes drawn",
        1e3 * float(np.median(times)),
        "ms",
        at_most=200.0,
        peer="published program: 256 passes of the whole network for each map",
        conditions=f"one at a time, one core, median of {len(times)}",
        data={"times_s": times},
    )
    _generated(report, bundle, generator)


def _generated(report: Report, bundle: Bundle, generator: Generator) -> None:
    count, drawn = report.scale(full=400, quick=8), report.scale(full=400, quick=8)
    simulator = MicrographSimulator(seed=report.seed + 3)
    samples = list(simulator.samples(0, count))
    patches = patches_of(bundle, [s.image for s in samples])
    seen = shown(bundle, codes_of(bundle, patches))
    of = np.repeat(np.arange(count), len(patches) // count)
    rates = np.array([[s.condition.ln_cooling_rate] for s in samples], dtype=np.float32)
    conditions = Conditions(("ln_cooling_rate",), rates)
    rng = report.rng("generated")
    phase = MicrographModel(bundle, ONE_THREAD).parts.preparation.phase
    own, by_codes = measure_patches(patches, phase), measure_patches(seen, phase)
    for text, members in bins_of(conditions, of, BINS if not report.quick else 1):
        # As many patches of each image as held out, so that a bin is the same mixture on both sides.
        given = rates[of[rng.choice(members, drawn)]]
        found = measure_patches(generator.draw(drawn, given, rng), phase)
        for row in compare_distributions(text, own[members], by_codes[members], found, of[members]):
            fraction = row.quantity == "fraction"
            (mean, spread), (mean_g, spread_g), (mean_c, spread_c) = row.held_out, row.generated, row.shown
            scale, unit = (100.0, "%") if fraction else (1.0, "px")
            where = (
                f"{row.drawn} patches drawn, {row.patches} held out; W1 {scale * row.w1:.3g} {unit}, of the"
                f" held-out ones as their codes show them {scale * row.w1_shown:.3g}, of one half of them"
                f" from the other {scale * row.w1_halves:.3g}"
            )
            what = f"{bundle.description.name}, drawn, {text}: {'fraction' if fraction else 'free path'}"
            report.add(
                f"{what}, mean off by",
                100 * abs(mean_g / mean - 1.0),
                "%",
                at_most=2.0 if fraction else 5.0,
                peer=f"by codes alone: {100 * abs(mean_c / mean - 1.0):.2f} %",
                conditions=f"{scale * mean_g:.2f} drawn, {scale * mean:.2f} {unit} held out; {where}",
            )
            report.add(
                f"{what}, spread off by",
                100 * abs(spread_g / spread - 1.0),
                "%",
                at_most=20.0,
                peer=f"by codes alone: {100 * abs(spread_c / spread - 1.0):.1f} %",
                conditions=f"{scale * spread_g:.2f} drawn, {scale * spread:.2f} {unit} held out",
            )
