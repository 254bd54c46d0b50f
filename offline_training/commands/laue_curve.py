"""``grainwatch train laue-curve``: the orientations that a network must have seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from offline_training.commands.common import (
    Cores,
    Energy,
    Geometry,
    Material,
    ProgressLine,
    Recipe,
    Seed,
    Set,
    need_torch,
    plainly,
    table,
    whole_numbers,
)


def laue_curve(
    material: Material,
    geometry: Geometry,
    out: Annotated[Path, typer.Option("--out", help="Folder for curve.json and curve.png.")],
    recipe: Recipe = "lauenn-2022",
    orientations: Annotated[
        str, typer.Option(help="How many to learn from, one training each.")
    ] = "10,20,50,100,200,500,1000,2000",
    seeds: Annotated[int, typer.Option(help="Trainings of each; more than one shows the spread.")] = 1,
    steps: Annotated[int, typer.Option(help="Batches of each training, whatever the orientations.")] = 1500,
    max_index: Annotated[
        int, typer.Option(help="Classes are the families with indices up to this; 0: as --coverage says.")
    ] = 5,
    coverage: Annotated[
        float, typer.Option(help="Share of the spots that has a class, with --max-index 0.")
    ] = 0.5,
    unlisted: Annotated[
        bool, typer.Option("--unlisted", help="Learn and judge the spots without a class, too.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="N patterns of orientations that occur once, not N orientations.")
    ] = False,
    whole_domain: Annotated[
        bool, typer.Option("--whole-domain", help="Detector anywhere in the range of a bundle.")
    ] = False,
    energy: Energy = (5.0, 22.0),
    set_: Set = None,
    seed: Seed = 0,
    cores: Cores = 2,
) -> None:
    """Accuracy against the number of training orientations (section 5 of LaueNN's supporting information).

    A run that was interrupted goes on; more --orientations or --seeds are added to what is there.
    """
    need_torch()
    line = ProgressLine()
    with plainly():
        from offline_training.laue.curve import CurveSettings, Doing, run_curve
        from offline_training.laue.domain import GeometryRange
        from offline_training.laue.networks import parse_tuning
        from offline_training.laue.plots import plot_curve
        from offline_training.laue.preparation import prepare
        from offline_training.loop import use_cores

        settings = CurveSettings(
            orientations=whole_numbers(orientations, "--orientations"),
            seeds=seeds,
            recipe=recipe,
            tuning=parse_tuning(set_ or ()),
            steps=steps,
            unlisted=unlisted,
            reuse=not fresh,
            first_seed=seed,
        )
        use_cores(cores)
        prepared = prepare(
            material,
            geometry,
            energy,
            coverage=coverage,
            max_index=max_index or None,
            over=GeometryRange() if whole_domain else GeometryRange(0.0, 0.0, 0.0, 0.0),
            seed=seed,
        )

        def show(doing: Doing) -> None:
            line.show(
                doing.training,
                f"{doing.number}/{doing.trainings}, {doing.orientations} orientations, seed {doing.seed}: ",
            )
            if doing.training.step == doing.training.steps:
                line.end()

        result = run_curve(prepared, settings, out, show)
        title = f"{prepared.reflections.material.name}, {recipe}, {len(prepared.classes) - 1} classes"
        plot_curve(result, title, out / "curve.png")
    print(_told(result))
    print(f"{out / 'curve.json'}, {out / 'curve.png'}: written", file=sys.stderr)


def _told(result: dict[str, Any]) -> str:
    def shown(row: dict[str, Any], figure: str) -> str:
        spread = row[f"{figure}_spread"]
        return f"{row[figure]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")

    rows = [
        [
            str(row["orientations"]),
            str(row["seeds"]),
            f"{row['spots']:.0f}",
            f"{row['epochs']:.2g}",
            shown(row, "training_accuracy"),
            shown(row, "validation_accuracy"),
            shown(row, "five_crystals_accuracy"),
            shown(row, "five_crystals_recall"),
        ]
        for row in result["curve"]
    ]
    baseline = result["baseline"]
    return (
        table(
            ["orientations", "seeds", "spots", "epochs", "training", "validation", "5 crystals", "recall"],
            rows,
        )
        + f"\nbaselines: most frequent class {baseline['most_frequent_class']:.4f},"
        f" chance {baseline['chance']:.4f};"
        " recall: true class at 0.5 or more, 5 crystals"
    )
