"""``grainwatch train laue-compare``: what a network is worth to the indexer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from offline_training.commands.common import Seed, plainly, table, whole_numbers


def laue_compare(
    bundle: Annotated[list[Path], typer.Option("--bundle", "-b", help="Folder of a bundle; again for more.")],
    geometry: Annotated[str, typer.Option("--geometry", "-g", help="Calibration: a .det file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for compare.json and compare.png.")],
    material: Annotated[
        list[str] | None,
        typer.Option("--material", "-m", help="CIF or name, one a bundle; as the bundle says by default."),
    ] = None,
    grains: Annotated[str, typer.Option(help="Crystals of a pattern; 0: random peaks only.")] = "0,1,2,5",
    patterns: Annotated[int, typer.Option(help="Patterns of each number of grains.")] = 20,
    noise_px: Annotated[float, typer.Option(help="Standard deviation of positions.")] = 0.2,
    missing: Annotated[float, typer.Option(help="Share of the spots that is lost.")] = 0.2,
    spurious: Annotated[float, typer.Option(help="Random peaks for each real one.")] = 0.1,
    seed: Seed = 0,
) -> None:
    """Crystals found, false crystals and time, with a network and without, on the same patterns."""
    with plainly("nothing was written"):
        from offline_training.laue.comparison import Conditions, Contest, Seen, compare
        from offline_training.laue.plots import plot_comparison
        from pipelines.laue.lauetools_files import read_det

        conditions = Conditions(
            whole_numbers(grains, "--grains"), patterns, noise_px, missing, spurious, seed=seed
        )
        if material and len(material) != len(bundle):
            raise ValueError(f"{len(material)} --material for {len(bundle)} --bundle: give one each, or none")
        calibration = read_det(geometry).calibration
        named: list[str | None] = [*material] if material else [None] * len(bundle)
        contests = [
            Contest.prepare(folder, calibration, name) for folder, name in zip(bundle, named, strict=True)
        ]

        def show(seen: Seen) -> None:
            if sys.stderr.isatty():
                print(f"\r{seen.done}/{seen.patterns} patterns, {seen.label}   ", end="", file=sys.stderr)

        result = compare(contests, conditions, show)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        out.mkdir(parents=True, exist_ok=True)
        text = msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
        (out / "compare.json").write_bytes(text)
        plot_comparison(result, str(conditions), out / "compare.png")
    print(_told(result))
    print(f"{out / 'compare.json'}, {out / 'compare.png'}: written", file=sys.stderr)


def _told(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        for way in ("with", "without"):
            f = row[way]
            low, middle, high = (1e3 * t for t in f["time_s_10_50_90"])
            found = "-"
            if f["truths"]:
                a, b = (100 * v for v in f["found_95"])
                found = f"{f['found']} of {f['truths']} ({a:.0f}-{b:.0f} %)"
            lines.append(
                [row["label"], way, found, str(f["false"]), f"{middle:.1f} ms ({low:.1f}-{high:.1f})"]
            )
        low, middle, high = row["time_ratio_10_50_90"]
        lines.append(["", "ratio of times", "", "", f"{middle:.2f} ({low:.2f}-{high:.2f})"])
    return table(["crystals", "network", "found (95 % interval)", "false", "time (10-90 %)"], lines)
