"""Cooling rates that a model was never shown: are they taken for their neighbours?

For each rate but the first and the last a VQ-VAE and a PixelCNN are trained, as a user would, on images of
all others. Takes half an hour; needs torch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from bench.micrograph_models import ONE_THREAD, TAKEN
from bench.report import Report
from pipelines.micrograph.analysis import MicrographAnalysis
from pipelines.micrograph.networks import MicrographModel
from pipelines.micrograph.synthetic import Condition, MicrographSimulator

RATES = (0.0, 0.85, 1.7, 2.55, 3.4)
"""Natural logarithms of the cooling rate."""


def rows(report: Report) -> None:
    """Add the rows."""
    if find_spec("torch") is None:
        report.add("left-out conditions", "not measured", conditions="torch is not installed")
        return
    each = report.scale(full=60, quick=8)
    for number in range(1, len(RATES) - 1) if not report.quick else [2]:
        with tempfile.TemporaryDirectory(prefix="grainwatch-bench-") as scratch:
            _one(report, Path(scratch), number, each)


def _one(report: Report, place: Path, left_out: int, each: int) -> None:
    simulator = MicrographSimulator(seed=report.seed + 2)
    shown = [rate for number, rate in enumerate(RATES) if number != left_out]
    lines = ["file,group,ln_cooling_rate"]
    (place / "images").mkdir()
    for number in range(each * len(shown)):
        rate = shown[number % len(shown)]
        name = f"{number:04d}.png"
        image = simulator.sample(number, Condition(rate, "islands")).image
        Image.fromarray(image).save(place / "images" / name)
        lines.append(f"{name},{name},{rate}")
    (place / "labels.csv").write_text("\n".join(lines) + "\n")
    codes, prior = report.scale(full=1500, quick=2), report.scale(full=1500, quick=2)
    given = ["--images", str(place / "images"), "--labels", str(place / "labels.csv")]
    _train("vqvae", *given, "--pixel-size-um", "0.25", "--out", str(place / "vq"), "--steps", str(codes))
    _train(
        "pixelcnn",
        *given,
        *("--pixel-size-um", "0.25", "--vqvae", str(place / "vq"), "--drawn", "16"),
        *("--out", str(place / "px"), "--steps", str(prior)),
    )
    analysis = MicrographAnalysis([MicrographModel(place / "px", ONE_THREAD)])
    asked = report.scale(full=100, quick=4)
    table = []
    for number in range(10**6, 10**6 + asked):
        sample = simulator.sample(number, Condition(RATES[left_out], "islands"))
        found = analysis.analyse(sample.image, TAKEN).posterior
        if found is None:
            raise RuntimeError("the model that was trained gives no posterior")
        table.append(found.probability)
    probability = np.array(table)
    best = probability.argmax(axis=1)
    beside = (best == left_out - 1) | (best == left_out)
    report.add(
        f"images of ln(cooling rate) {RATES[left_out]:g}, never shown, taken for a neighbour",
        100 * float(beside.mean()),
        "%",
        at_least=90.0,
        peer=f"by chance: {100 * 2 / len(shown):.0f} %",
        conditions=f"{asked} images; candidates {', '.join(f'{rate:g}' for rate in shown)}: mean probability"
        f" {', '.join(f'{p:.2f}' for p in probability.mean(axis=0))}; trained on {each} images of each,"
        f" VQ-VAE {codes} and PixelCNN {prior} batches of 32",
        data={"probability": probability},
    )


def _train(*arguments: str) -> None:
    command: Sequence[str] = [sys.executable, "-m", "grainwatch", "train", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"grainwatch train {arguments[0]} failed:\n{answer.stderr[-2000:]}")
