"""``grainwatch train laue``: a bundle from a material and a calibration."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated

import typer

from offline_training.commands.common import (
    Cores,
    Coverage,
    Energy,
    Geometry,
    Material,
    ProgressLine,
    Recipe,
    Seed,
    Set,
    duration,
    need_torch,
    plainly,
)


def laue(
    material: Material,
    geometry: Geometry,
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle; the checkpoint lies there too.")],
    recipe: Recipe = "residual",
    steps: Annotated[int, typer.Option(help="Batches of 1024 spots.")] = 800,
    spots_each: Annotated[int, typer.Option(help="Spots taken from each pattern; 1 to 1024.")] = 32,
    coverage: Coverage = 0.86,
    energy: Energy = (5.0, 22.0),
    set_: Set = None,
    seed: Seed = 0,
    budget_s: Annotated[
        float, typer.Option("--budget-s", help="End training early after so many seconds; 0: never.")
    ] = 0.0,
    cores: Cores = 2,
) -> None:
    """Train a network that names the spots of a material; go on where an interrupted run stopped."""
    need_torch()
    with plainly():
        from offline_training.laue.bundles import BundleRequest, make_bundle
        from offline_training.laue.networks import parse_tuning

        request = BundleRequest(
            material=material,
            geometry=geometry,
            recipe=recipe,
            steps=steps,
            spots_each=spots_each,
            coverage=coverage,
            energy_keV=energy,
            seed=seed,
            tuning=parse_tuning(set_ or ()),
        )
        low, high = energy
        command = f"grainwatch train laue --material {shlex.quote(material)}"
        command += f" --geometry {shlex.quote(geometry)}"
        command += f" --out {shlex.quote(str(out))} --recipe {recipe} --steps {steps}"
        command += f" --spots-each {spots_each} --coverage {coverage:g}"
        command += f" --energy {low:g} {high:g} --seed {seed}"
        command += "".join(f" --set {name}={value}" for name, value in request.tuning.given().items())
        line = ProgressLine()
        metrics = make_bundle(request, out, command, budget_s or math.inf, cores, line.show)
        line.end()
    held_out, time = metrics["held_out"], metrics["time"]
    print(f"{out}: written")
    print(f"  confident (>= {held_out['threshold']:.2f}) and right: {held_out['confident_right']:.4f}")
    print(f"  listed spots that are: {held_out['confident_share']:.4f}")
    print(f"  spurious or unlisted, yet confident: {held_out['rejects_confident']:.4f}")
    print(f"  expected calibration error: {held_out['ece']:.4f}")
    print(f"  all spots right: {held_out['accuracy']:.4f} (baseline {held_out['majority_accuracy']:.4f})")
    print(
        f"  time to this accuracy: {duration(time['total_s'])}, {duration(time['training_s'])} of it training"
        f" ({time['patterns_per_s']:.0f} patterns/s, {cores} core{'s' if cores > 1 else ''})"
    )
