"""``grainwatch fingerprint``: what micrographs in files show, one JSON line an image."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from grainwatch.config import ConfigError
from grainwatch.messages import FrameKey, Neighbour, to_builtins
from grainwatch.words import micrograph_words
from pipelines.files import FileImage, expand, open_images, reason
from pipelines.frame import BadFrame, Frame, PlainImage
from pipelines.micrograph.acquisition import differ, is_silence
from pipelines.micrograph.analysis import ImageAnalysis, MicrographAnalysis
from pipelines.micrograph.frame_acquisition import CONFIGURED, AcquisitionTable, acquisition_of, file_metadata
from pipelines.micrograph.morphology import Phase
from pipelines.micrograph.neighbours import Neighbours
from pipelines.micrograph.pipeline import Config, model_of, open_analysis
from pipelines.telling import failure, picture_path

_NEIGHBOURS = 5


@dataclass(frozen=True, slots=True)
class _Outcome:
    """An image, or what was wrong with it."""

    label: str
    found: ImageAnalysis | None
    of_stack: bool = False
    neighbours: tuple[Neighbour, ...] = ()
    problem: str = ""
    seconds: float = 0.0


def fingerprint(
    files: Annotated[list[str], typer.Argument(help="Images, folders or patterns; TIFF, PNG, JPEG, BMP ...")],
    bundle: Annotated[
        list[str] | None,
        typer.Option("--bundle", "-b", help="Folder or name of a model bundle; again for further ones."),
    ] = None,
    json_out: Annotated[
        str, typer.Option("--json", help="Where the JSON lines go; - is the terminal.")
    ] = "-",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG of the image; with several images a number is added.")
    ] = None,
    pixel_size_um: Annotated[
        float | None, typer.Option("--pixel-size-um", help="Width of a pixel, for files that do not say it.")
    ] = None,
    phase: Annotated[
        str, typer.Option("--phase", help="Phase that is measured, bright or dark; the bundle's by default.")
    ] = "",
    paper_compat: Annotated[
        bool, typer.Option("--paper-compat", help="Count grains as Noguchi & Inoue (2021) do.")
    ] = False,
    max_patches: Annotated[
        int, typer.Option(help="Patches of an image that networks look at, at most.")
    ] = 64,
    posterior_patches: Annotated[
        int, typer.Option(help="Of these, those that the process condition rests on.")
    ] = 16,
    codes: Annotated[bool, typer.Option("--codes", help="Add the code maps of a VQ-VAE.")] = False,
) -> None:
    """Fingerprint micrographs: phase fraction, mean free path, process condition, novelty."""
    if phase not in ("", "bright", "dark"):
        raise ConfigError(f"fingerprint: --phase {phase}: expected bright or dark")
    measured: Phase | str = phase
    try:
        table = AcquisitionTable(pixel_size_um=pixel_size_um)
    except ValueError as error:
        raise ConfigError(f"fingerprint: --pixel-size-um: {str(error).partition(': ')[2]}") from error
    try:
        config = Config(
            bundle=tuple(bundle or ()),
            phase=measured,  # type: ignore[arg-type]
            paper_compat=paper_compat,
            max_patches=max_patches,
            posterior_patches=posterior_patches,
            acquisition=table,
        )
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        raise ConfigError(f"fingerprint: --{name.replace('_', '-')}: {rest}") from error
    analysis = open_analysis(config, "fingerprint", named="--bundle")
    if plot is not None:
        _check_plot(plot)
    try:
        paths = expand(files)
    except (OSError, ValueError) as error:
        raise ConfigError(f"fingerprint: {error}") from error
    try:
        out = sys.stdout if json_out == "-" else open(json_out, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"fingerprint: --json {json_out}: {error.strerror}") from error
    known = Neighbours(_NEIGHBOURS)
    silent: list[str] = []
    images = failed = 0
    try:
        for path in paths:
            for outcome in _analyse_file(analysis, path, table, known):
                images += 1
                if outcome.found is None:
                    failed += 1
                    print(failure(outcome.label, outcome.problem), file=sys.stderr)
                else:
                    silent += _say(outcome, outcome.found)
                line = _line(outcome, analysis, codes=codes)
                print(json.dumps(_finite(line), allow_nan=False), file=out, flush=True)
                if plot is not None and outcome.found is not None:
                    only = len(paths) == 1 and not outcome.of_stack
                    target = picture_path(plot, images - failed, only=only)
                    _plot(outcome, outcome.found, target)
                    print(f"{target}: picture of {outcome.label}", file=sys.stderr)
    finally:
        if out is not sys.stdout:
            out.close()
    if len(silent) == 1:
        print(silent[0], file=sys.stderr)
    elif silent:
        print(
            f"{len(silent)} images: nothing says how they were taken, and neither NAME.txt (Hitachi, JEOL)"
            " nor NAME-png.hdr (Tescan; png as the image's suffix) lies beside them",
            file=sys.stderr,
        )
    if failed:
        print(f"{failed} of {images} images failed", file=sys.stderr)
        raise typer.Exit(1)


def _analyse_file(
    analysis: MicrographAnalysis, path: str, table: AcquisitionTable, known: Neighbours
) -> Iterator[_Outcome]:
    # One item an image; an unreadable file or image is an item too, and the rest goes on.
    try:
        said: dict[str, Any] | None = None
        for image in open_images(path, colour=True):
            said = file_metadata(image.metadata["file"]) if said is None else said
            start = time.perf_counter()
            try:
                found = _analyse(analysis, image, said, table)
            except BadFrame as error:
                yield _Outcome(image.label, None, image.of_stack, problem=str(error))
                continue
            near: tuple[Neighbour, ...] = ()
            if found.fingerprints:
                first = found.fingerprints[0]
                vector = (first.vector if first.whitened is None else first.whitened).numpy()
                near = known.of(FrameKey(image.label, "", image.index), vector)
            yield _Outcome(image.label, found, image.of_stack, near, seconds=time.perf_counter() - start)
    except (OSError, ValueError) as error:
        yield _Outcome(path, None, problem=reason(error))


def _analyse(
    analysis: MicrographAnalysis, image: FileImage, said: dict[str, Any], table: AcquisitionTable
) -> ImageAnalysis:
    frame = Frame(
        FrameKey(image.label, "", image.index), PlainImage(image.pixels), metadata={**image.metadata, **said}
    )
    taken, asked = acquisition_of(frame, table), table.pixel_size_um
    remarks = taken.remarks
    if taken.source == CONFIGURED:  # from --pixel-size-um: that the file is silent is known
        remarks = tuple(remark for remark in remarks if not is_silence(remark))
    elif asked is not None and taken.pixel_size_um is not None and differ(asked, taken.pixel_size_um):
        used = f"{taken.source} says that a pixel is {taken.pixel_size_um:g} um wide"
        unused = f"--pixel-size-um {asked:g} is of files that do not say it, and is not used"
        remarks = (*remarks, f"{image.metadata['file']}: {used}; {unused}")
    taken = replace(taken, remarks=remarks)
    return analysis.analyse(image.pixels, taken)


def _line(outcome: _Outcome, analysis: MicrographAnalysis, *, codes: bool) -> dict[str, Any]:
    found = outcome.found
    if found is None:
        return {"file": outcome.label, "error": outcome.problem}
    prints = []
    for each in found.fingerprints:
        entry: dict[str, Any] = {
            "model": each.model.name,
            "kind": each.kind,
            "vector": each.vector.numpy().tolist(),
            "spread": each.spread.numpy().tolist(),
        }
        if codes and each.codes is not None:
            entry["codes"] = each.codes.numpy().tolist()
        prints.append(entry)
    phase = found.morphology
    path = None
    if phase is not None:
        um = phase.free_path_um is not None
        path = {
            "value": phase.free_path_um if um else phase.free_path_px,
            "spread": phase.free_path_spread_um if um else phase.free_path_spread_px,
            "unit": "um" if um else "px",
            "rows_px": phase.free_path_rows_px,
            "columns_px": phase.free_path_columns_px,
        }
    return {
        "file": outcome.label,
        "shape_px": list(found.shape_px),
        "data_bar_px": found.prepared.data_bar_px,
        "pixel_size_um": found.acquisition.pixel_size_um,
        "fingerprint": prints,
        "phase": None if phase is None else phase.phase,
        "fraction": None if phase is None else phase.fraction,
        "fraction_spread": None if phase is None else phase.fraction_spread,
        "mean_free_path": path,
        "statistics": to_builtins(found.statistics) if found.statistics is not None else None,
        "posterior": to_builtins(found.posterior) if found.posterior is not None else None,
        "novelty": to_builtins(found.novelty) if found.novelty is not None else None,
        "neighbours": [{"file": n.key.source, "distance": n.distance} for n in outcome.neighbours],
        "model": to_builtins(model_of(analysis)),
        "flags": list(found.flags),
        "remarks": list(found.remarks),
    }


def _finite(value: Any) -> Any:
    # JSON knows no NaN: what was not determined is null.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return value


def _say(outcome: _Outcome, found: ImageAnalysis) -> list[str]:
    """Tell of an image all but that its file is silent; return that: a folder of such images is told once."""
    said = micrograph_words(found.morphology, found.posterior)
    if found.novelty is not None:
        said.append(f"typicality {found.novelty.typicality:.2g}")
    said += found.flags
    print(f"{outcome.label}: {', '.join(said)}; {outcome.seconds * 1e3:.0f} ms", file=sys.stderr)
    silent = [remark for remark in found.remarks if is_silence(remark)]
    for remark in found.remarks:
        if remark in silent:
            continue
        named = remark.startswith(outcome.label.partition("#")[0])
        print(remark if named else f"{outcome.label}: {remark}", file=sys.stderr)
    return silent


def _check_plot(path: Path) -> None:
    # Before the work, not after it.
    if path.suffix.lower() != ".png":
        raise ConfigError(f"fingerprint: --plot {path}: expected a name that ends in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"fingerprint: --plot {path}: {path.parent} is no folder")


def _plot(outcome: _Outcome, found: ImageAnalysis, target: Path) -> None:
    from pipelines.micrograph.plot import plot_micrograph

    try:
        plot_micrograph(found, outcome.neighbours, Path(outcome.label).name, target)
    except OSError as error:
        raise ConfigError(f"fingerprint: --plot {target}: {error.strerror or error}") from error
