"""``grainwatch train``: networks from simulations, ready for the daemon."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grainwatch.config import ConfigError

if TYPE_CHECKING:
    from offline_training.laue.training import Progress

app = typer.Typer(help="Train the models that the daemon runs.", no_args_is_help=True)

_NEEDS = ("torch", "onnx", "onnxscript", "onnxruntime")


@app.callback()
def train() -> None:
    """Train the models that the daemon runs."""


@app.command()
def laue(
    material: Annotated[str, typer.Option("--material", "-m", help="Built-in name or CIF file.")],
    geometry: Annotated[
        str, typer.Option("--geometry", "-g", help="Calibration that the bundle is made around: a .det file.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the bundle; the checkpoint lies there too.")],
    recipe: Annotated[str, typer.Option(help="residual, lauenn-2022 or lauenn-2022-cnn.")] = "residual",
    steps: Annotated[int, typer.Option(help="Batches of 1024 spots.")] = 800,
    spots_each: Annotated[int, typer.Option(help="Spots taken from each pattern; 1 to 1024.")] = 32,
    coverage: Annotated[
        float, typer.Option(help="Share of the spots on the detector that are to have a class.")
    ] = 0.86,
    energy: Annotated[tuple[float, float], typer.Option(help="Energy band of the beam, keV.")] = (5.0, 22.0),
    seed: Annotated[int, typer.Option(help="Start of all random numbers.")] = 0,
    budget_s: Annotated[
        float, typer.Option("--budget-s", help="End training early after so many seconds; 0: never.")
    ] = 0.0,
    cores: Annotated[int, typer.Option(help="Threads of the network.")] = 2,
) -> None:
    """Train a network that names the spots of a material; go on where an interrupted run stopped."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"train: {', '.join(missing)} not installed: pip install -e '.[daemon,training]'")
    from offline_training.laue.bundles import BundleRequest, make_bundle
    from offline_training.laue.training import TrainingError

    request = BundleRequest(
        material=material,
        geometry=geometry,
        recipe=recipe,
        steps=steps,
        spots_each=spots_each,
        coverage=coverage,
        energy_keV=energy,
        seed=seed,
    )
    low, high = energy
    command = f"grainwatch train laue --material {shlex.quote(material)} --geometry {shlex.quote(geometry)}"
    command += f" --out {shlex.quote(str(out))} --recipe {recipe} --steps {steps}"
    command += f" --spots-each {spots_each} --coverage {coverage:g}"
    command += f" --energy {low:g} {high:g} --seed {seed}"
    try:
        metrics = make_bundle(request, out, command, budget_s or float("inf"), cores, _show)
    except (OSError, ValueError, TrainingError) as error:
        raise ConfigError(f"train: {error}") from error
    print(file=sys.stderr)
    held_out = metrics["held_out"]
    print(f"{out}: written")
    print(f"  confident (>= {held_out['threshold']:.2f}) and right: {held_out['confident_right']:.4f}")
    print(f"  listed spots that are: {held_out['confident_share']:.4f}")
    print(f"  spurious or unlisted, yet confident: {held_out['rejects_confident']:.4f}")
    print(f"  expected calibration error: {held_out['ece']:.4f}")
    print(f"  all spots right: {held_out['accuracy']:.4f} (baseline {held_out['majority_accuracy']:.4f})")


def _show(progress: Progress) -> None:
    if progress.step % 10 and progress.step != progress.steps:
        return
    left = progress.seconds / max(progress.step, 1) * (progress.steps - progress.step)
    print(
        f"\rstep {progress.step}/{progress.steps}  loss {progress.loss:.3f}  right {progress.accuracy:.3f}"
        f"  {progress.patterns_per_s:.0f} patterns/s  {progress.seconds:.0f} s, {left:.0f} s left ",
        end="" if sys.stderr.isatty() else "\n",
        file=sys.stderr,
        flush=True,
    )
