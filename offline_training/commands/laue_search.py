"""``grainwatch train laue-search``: good numbers for a recipe."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

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
    need_torch,
    plainly,
    table,
)


def laue_search(
    material: Material,
    geometry: Geometry,
    out: Annotated[Path, typer.Option("--out", help="Folder for search.json and search.png.")],
    recipe: Recipe = "residual",
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="NAME[=V1,V2...]",
            help="A number of the recipe to vary, within usual values or among those given; again for more."
            " All by default; names as in train laue --set.",
        ),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="All combinations of the values given.")] = False,
    trials: Annotated[int, typer.Option(help="Random combinations.")] = 18,
    steps: Annotated[int, typer.Option(help="Batches of 1024 spots of a full training.")] = 800,
    coverage: Coverage = 0.86,
    energy: Energy = (5.0, 22.0),
    seed: Seed = 0,
    budget_s: Annotated[
        float,
        typer.Option("--budget-s", help="Stop after so many seconds; the same command goes on. 0: never."),
    ] = 0.0,
    cores: Cores = 2,
) -> None:
    """Search for a better learning rate, batch, width, dropout, histogram ... of a recipe.

    All trials learn a ninth of the spots, the best third of them a third, the best of those all.
    """
    need_torch()
    line = ProgressLine()
    with plainly():
        from offline_training.laue.plots import plot_search
        from offline_training.laue.preparation import prepare
        from offline_training.laue.search import SearchSettings, Trying, run_search
        from offline_training.loop import use_cores

        settings = SearchSettings(recipe, _varied(vary or ()), grid, trials, steps, seed)
        use_cores(cores)
        prepared = prepare(material, geometry, energy, coverage=coverage, seed=seed)

        def show(trying: Trying) -> None:
            line.show(trying.training, f"{trying.number}/{trying.trainings}, trial {trying.trial}: ")
            if trying.training.step == trying.training.steps:
                line.end()

        result = run_search(prepared, settings, out, budget_s or math.inf, show)
        line.end()
        if result["best"] is None:
            raise ValueError("the time was over before the first training was; the same command goes on")
        name = prepared.reflections.material.name
        plot_search(result, f"{name}, {recipe}, {len(prepared.classes) - 1} classes", out / "search.png")
    print(_told(result))
    best = result["best"]
    print("best, as train laue takes it:")
    print(
        f"  grainwatch train laue --material {shlex.quote(material)} --geometry {shlex.quote(geometry)}"
        f" --out FOLDER --recipe {recipe} --steps {best['steps']} --coverage {coverage:g}"
        f" --energy {energy[0]:g} {energy[1]:g}"
        + "".join(f" --set {key}={value}" for key, value in best["set"].items())
    )
    print(f"{out / 'search.json'}, {out / 'search.png'}: written", file=sys.stderr)
    if not result["finished"]:
        print(
            f"{result['trainings_done']} of {result['trainings']} trainings done: the same command goes on",
            file=sys.stderr,
        )


def _varied(given: tuple[str, ...] | list[str]) -> dict[str, tuple[float, ...]]:
    varied = {}
    for text in given:
        name, _, values = text.partition("=")
        try:
            varied[name] = tuple(float(v) for v in values.split(",")) if values else ()
        except ValueError:
            raise ValueError(f"--vary {text!r}: expected NAME or NAME=0.1,0.2") from None
    return varied


def _told(result: dict[str, Any]) -> str:
    last = max(len(trial["rungs"]) for trial in result["trials"])
    shown = [trial for trial in result["trials"] if len(trial["rungs"]) == last or trial["trial"] == 0]
    shown.sort(key=lambda trial: (-len(trial["rungs"]), trial["rungs"][-1]["log_loss"]))
    rows = []
    for trial in shown:
        rung = trial["rungs"][-1]
        rows.append(
            [
                "recipe" if trial["trial"] == 0 else f"trial {trial['trial']}",
                f"{rung['log_loss']:.4f}",
                f"{rung['fresh_log_loss']:.4f}",
                f"{rung['accuracy']:.4f}",
                f"{rung['fresh_accuracy']:.4f}",
                f"{rung['steps']} x {rung['batch']}",
                f"{rung['seconds']:.0f} s",
                " ".join(f"{name}={value:g}" for name, value in trial["values"].items()),
            ]
        )
    majority = next(t["rungs"][-1]["majority"] for t in shown if t["rungs"][-1]["majority"])
    head = ["", "log loss", "fresh", "right", "fresh", "batches", "time", "values"]
    return (
        table(head, rows)
        + f"\nbaseline, most frequent class: {majority:.4f} right; fresh: patterns that chose nothing"
    )
