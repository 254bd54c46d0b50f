"""``grainwatch generate``: micrographs under a condition, and the condition behind what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from offline_training.commands.common import Seed, need_torch, plainly

app = typer.Typer(
    help="Micrographs that a model draws, and what they answer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

BundleName = Annotated[
    str, typer.Option("--bundle", "-b", help="Name or folder of a bundle with a PixelCNN.")
]
Given = Annotated[
    list[str] | None,
    typer.Option("--condition", "-c", metavar="NAME=VALUE", help="As the labels had it. Again for more."),
]
FRACTION, FREE_PATH = "fraction", "free_path_px"
TABLE = "generated.csv"
_AT_ONCE = 64


@app.callback()
def generate() -> None:
    """Micrographs that a model draws, and what they answer."""


@app.command()
def micrographs(
    bundle: BundleName,
    out: Annotated[Path, typer.Option("--out", help="Folder for the images and generated.csv.")],
    condition: Given = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Images.")] = 16,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Below 1: more likely images, which differ less.")
    ] = 1.0,
    seed: Seed = 0,
) -> None:
    """Draw patches under a condition, and measure them: PNG files, and a table of fraction and free path."""
    need_torch("generate")
    with plainly("nothing more was written", "generate"):
        import numpy as np
        from PIL import Image

        from offline_training.micrograph.evaluation import measure_patches
        from offline_training.micrograph.generator import Generator
        from pipelines.engines.bundle import load_bundle
        from pipelines.engines.shipped import find_bundle

        loaded = load_bundle(find_bundle(bundle))
        generator = Generator.open(loaded)
        given = generator.condition_of(_pairs(condition or ()))
        rng = np.random.default_rng(seed)
        out.mkdir(parents=True, exist_ok=True)
        phase = loaded.description.preparation["phase"]
        size = generator.pixel_size_um
        lines = [f"file,{FRACTION},{FREE_PATH}{',free_path_um' if size else ''}"]
        measured = []
        for first in range(0, count, _AT_ONCE):
            drawn = generator.draw(min(_AT_ONCE, count - first), given, rng, temperature)
            found = measure_patches(drawn, phase)
            measured.append(found)
            for number, (image, (fraction, path)) in enumerate(zip(drawn, found, strict=True), start=first):
                name = f"{number:05d}.png"
                Image.fromarray(image).save(out / name)
                um = f",{path * size:.4f}" if size else ""
                lines.append(f"{name},{fraction:.5f},{path:.4f}{um}")
        (out / TABLE).write_text("\n".join(lines) + "\n", encoding="ascii")
    table = np.concatenate(measured)
    side = "x".join(str(8 * n) for n in generator.shape)
    print(f"{out}: {count} images of {side} px by {loaded.model.name} {loaded.model.version}, and {TABLE}")
    fractions = table[np.isfinite(table[:, 0]), 0]
    if len(fractions):
        print(
            f"  fraction of the {phase} phase: {100 * fractions.mean():.2f} ± {100 * fractions.std():.2f} %"
        )
    if len(fractions) < count:
        print(f"  of one grey, so neither phase: {count - len(fractions)} of {count}")
    paths = table[np.isfinite(table[:, 1]), 1]
    if len(paths):
        print(f"  mean free path: {paths.mean():.2f} ± {paths.std():.2f} px", end="")
        print(f" ({paths.mean() * size:.3f} um)" if size else " (pixel size unknown)")


@app.command()
def condition(
    bundle: BundleName,
    fraction: Annotated[float | None, typer.Option("--fraction", help="Of the phase, 0 to 1.")] = None,
    free_path_um: Annotated[float | None, typer.Option("--free-path-um", help="Mean free path.")] = None,
    free_path_px: Annotated[float | None, typer.Option("--free-path-px", help="The same in px.")] = None,
    patches: Annotated[int, typer.Option("--patches", min=1, help="Patches that were averaged over.")] = 1,
    of: Annotated[str, typer.Option("--of", help="Number that is asked for, where there are several.")] = "",
    fixed: Given = None,
    count: Annotated[int, typer.Option("-n", "--count", min=60, help="Images drawn to learn from.")] = 400,
    seed: Seed = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the answer here; - : terminal.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Picture of the probability density.")] = None,
) -> None:
    """Say which condition gives this fraction and mean free path, by what the model draws.

    Exit status 1 where none does.
    """
    need_torch("generate")
    with plainly("nothing was written", "generate"):
        import numpy as np

        from offline_training.micrograph.evaluation import measure_patches
        from offline_training.micrograph.generator import Generator
        from offline_training.micrograph.inverse import UNLIKELY, ConditionLaw, check_measured
        from offline_training.micrograph.plots import plot_answer
        from pipelines.engines.bundle import load_bundle
        from pipelines.engines.shipped import find_bundle

        loaded = load_bundle(find_bundle(bundle))
        generator = Generator.open(loaded)
        if generator.classes or not generator.names:
            had = f"the classes {', '.join(generator.classes)}" if generator.classes else "nothing"
            raise ValueError(f"{bundle}: was trained under {had}; a number can be asked for only")
        asked = of or generator.names[0]
        if asked not in generator.names:
            raise ValueError(f"--of {of}: expected one of {', '.join(generator.names)}")
        if free_path_um is not None:
            if free_path_px is not None:
                raise ValueError("--free-path-um and --free-path-px: give one of them")
            if generator.pixel_size_um is None:
                raise ValueError("--free-path-um: the bundle does not know one pixel size; --free-path-px?")
            free_path_px = free_path_um / generator.pixel_size_um
        check_measured(fraction, free_path_px, patches)
        place = generator.names.index(asked)
        low, high = generator.least[place], generator.greatest[place]
        rng = np.random.default_rng(seed)
        values = np.linspace(low, high, count)
        others = _pairs(fixed or ())
        if asked in others:
            raise ValueError(f"--condition {asked}: is what is asked for; leave it out, or choose --of")
        rows = generator.condition_of({**others, asked: repr(low)})
        table = np.repeat(np.asarray(rows, dtype=np.float32)[None], count, axis=0)
        table[:, place] = values
        preparation = loaded.description.preparation
        if preparation["parameters"].get("reference") is not None:
            raise ValueError(
                f"{bundle}: matches histograms, which sets the fraction of all that it draws; take a bundle"
                " that was trained without --match"
            )
        phase = preparation["phase"]
        found = measure_patches(generator.draw(count, table, rng), phase)
        law = ConditionLaw.fit(values, found)
        judged = loaded.description.metrics.get("prior", {}).get("inverse") or {}
        off = np.array(judged["off"]) if "off" in judged else None
        answer = law.ask(fraction, free_path_px, patches, off)
        told = {
            "bundle": {"name": loaded.model.name, "version": loaded.model.version, "sha256": loaded.sha256},
            "quantity": asked,
            "range": [low, high],
            "best": answer.best,
            "interval_90": [answer.low, answer.high],
            "chance": answer.chance,
            FRACTION: fraction,
            FREE_PATH: free_path_px,
            "patches": patches,
            "drawn": count,
            "held_out": judged or None,
        }
        if plot is not None:
            plot_answer(answer, asked, f"{loaded.model.name}: {_words(fraction, free_path_px)}", plot)
        if json_ is not None:
            text = json.dumps(told, indent=1) + "\n"
            if str(json_) == "-":
                print(text, end="")
            else:
                json_.write_text(text, encoding="utf-8")
    if answer.chance < UNLIKELY:
        print(
            f"grainwatch: generate: no {asked} from {low:g} to {high:g} gives"
            f" {_words(fraction, free_path_px)}: the nearest is {answer.best:.3g},"
            f" with a chance of {answer.chance:.1e}",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    if str(json_) != "-":
        print(f"{asked}: {answer.best:.3g}, 90 % from {answer.low:.3g} to {answer.high:.3g}")
        print(f"  {_judged(judged)}")


def _judged(law: Mapping[str, Any]) -> str:
    if "off" not in law:
        return (
            "how often such intervals hold was not measured with this bundle: they are those of what it draws"
        )
    held = [f"{100 * found['holds_the_true_one']:.0f} %" for found in (law, law["images"])]
    return f"on held-out images such intervals held {held[0]} asked by a patch, {held[1]} by a whole image"


def _words(fraction: float | None, free_path_px: float | None) -> str:
    parts = [] if fraction is None else [f"fraction {fraction:g}"]
    return " and ".join(parts + ([] if free_path_px is None else [f"free path {free_path_px:.4g} px"]))


def _pairs(given: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"--condition {text!r}: expected NAME=VALUE")
        if name in pairs:
            raise ValueError(f"--condition {name}: is given twice")
        pairs[name] = value
    return pairs
