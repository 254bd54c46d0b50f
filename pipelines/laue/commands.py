"""``grainwatch index``: crystals of images and peak lists, one JSON line a frame."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from grainwatch.config import ConfigError
from grainwatch.messages import ModelInfo, to_builtins
from pipelines.files import expand, read_images, reason
from pipelines.frame import BadFrame
from pipelines.laue.analysis import FrameAnalysis, LaueAnalysis
from pipelines.laue.lauetools_files import read_cor, read_dat
from pipelines.laue.pipeline import Config, model_of, open_analysis
from pipelines.telling import failure, picture_path

_PEAK_LISTS = {".cor": read_cor, ".dat": read_dat}
_OPTIONS = {
    "materials": "--material",
    "geometry": "--geometry",
    "mask": "--mask",
    "bundle": "--bundle",
    "energy_keV": "--energy",
    "sample_frame": "--sample-frame",
    "threshold_sigma": "--threshold",
    "match_radius_px": "--match-radius",
    "max_false_probability": "--max-false-probability",
}
_NOT_IN_LINES = ("spot_indices", "hkl", "grain_id", "strain_crystal")


def index(
    files: Annotated[
        list[str], typer.Argument(help="Images (.gz too), HDF5 stacks, .cor or .dat peak lists.")
    ],
    material: Annotated[
        list[str],
        typer.Option("--material", "-m", help="Built-in name or CIF file; give it again for more phases."),
    ],
    geometry: Annotated[str, typer.Option("--geometry", "-g", help="Calibration: a LaueTools .det file.")],
    json_out: Annotated[
        str, typer.Option("--json", help="Where the JSON lines go; - is the terminal.")
    ] = "-",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG of the frame; with several frames a number is added.")
    ] = None,
    mask: Annotated[str, typer.Option(help="Image whose non-zero pixels are dead.")] = "",
    energy: Annotated[
        tuple[float, float],
        typer.Option(help="Energy band of the beam: two numbers in keV, the lower first (--energy 5 22)."),
    ] = (5.0, 22.0),
    bundle: Annotated[
        list[str] | None,
        typer.Option("--bundle", "-b", help="Folder or name (Cu) of a model bundle; again for more phases."),
    ] = None,
    sample_frame: Annotated[str, typer.Option(help='Sample frame: "tilt40" or "lab".')] = "tilt40",
    threshold: Annotated[float, typer.Option(help="Peak threshold in sigmas.")] = 5.3,
    match_radius: Annotated[float, typer.Option(help="Match radius, px.")] = 2.0,
    max_false_probability: Annotated[
        float, typer.Option(help="Report a crystal when chance makes one as good more rarely than this.")
    ] = 1e-5,
    spots: Annotated[
        bool, typer.Option("--spots", help="Add the peak table and each crystal's hkl.")
    ] = False,
) -> None:
    """Index Laue frames: orientation, strain and score of every crystal."""
    config = Config(
        materials=tuple(material),
        geometry=geometry,
        mask=mask,
        energy_keV=energy,
        bundle=tuple(bundle or ()),
        sample_frame=sample_frame,
        threshold_sigma=threshold,
        match_radius_px=match_radius,
        max_false_probability=max_false_probability,
    )
    analysis = open_analysis(config, "index", _OPTIONS)
    if plot is not None:
        _check_plot(plot)
    for remark in analysis.remarks:
        print(f"index: {remark}", file=sys.stderr)
    model = model_of(analysis)
    try:
        paths = expand(files)
    except (OSError, ValueError) as error:
        raise ConfigError(f"index: {error}") from error
    try:
        out = sys.stdout if json_out == "-" else open(json_out, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"index: --json {json_out}: {error.strerror}") from error
    frames = failed = 0
    try:
        for path in paths:
            for label, image, outcome, seconds in _analyse_file(analysis, path):
                frames += 1
                if isinstance(outcome, FrameAnalysis):
                    _say(label, outcome, seconds)
                    line = _line(label, outcome, spots, model)
                else:
                    failed += 1
                    print(failure(label, str(outcome)), file=sys.stderr)
                    line = {"path": label, "error": str(outcome)}
                print(json.dumps(line, allow_nan=False), file=out, flush=True)
                if plot is not None and isinstance(outcome, FrameAnalysis):
                    target = picture_path(plot, frames - failed, only=len(paths) == frames == 1)
                    _plot(analysis, outcome, image, label, target)
                    print(f"{target}: picture of {label}", file=sys.stderr)
    finally:
        if out is not sys.stdout:
            out.close()
    if failed:
        print(f"{failed} of {frames} frames failed", file=sys.stderr)
        raise typer.Exit(1)


_Outcome = FrameAnalysis | Exception


def _analyse_file(
    analysis: LaueAnalysis, path: str
) -> Iterator[tuple[str, npt.NDArray[Any] | None, _Outcome, float]]:
    # One item a frame; an unreadable file or frame is an item too, and the rest goes on.
    reader = _PEAK_LISTS.get(Path(path).suffix.lower())
    if reader is not None:
        try:
            peaks = reader(path)
            start = time.perf_counter()
            order = np.argsort(-peaks.intensity, kind="stable")
            found = analysis.analyse_peaks(peaks.xy_px[order], source=path)
            yield path, None, found, time.perf_counter() - start
        except (OSError, ValueError) as error:
            yield path, None, BadFrame(reason(error)), 0.0
        return
    try:
        for label, image in read_images(path):
            start = time.perf_counter()
            try:
                outcome: _Outcome = analysis.analyse_image(image, source=label)
            except BadFrame as error:
                outcome = error
            yield label, image, outcome, time.perf_counter() - start
    except (OSError, ValueError) as error:
        yield path, None, error, 0.0


def _line(label: str, found: FrameAnalysis, spots: bool, model: ModelInfo) -> dict[str, Any]:
    crystals = []
    for crystal in found.crystals:
        fields = _finite(to_builtins(crystal))
        fields["strain"] = fields["strain_crystal"]
        kept = {
            k: v
            for k, v in fields.items()
            if (spots and k in ("spot_indices", "hkl")) or k not in _NOT_IN_LINES
        }
        crystals.append(kept)
    line: dict[str, Any] = {
        "path": label,
        "peaks": len(found.xy_px),
        "crystals": crystals,
        "flags": list(found.flags),
        "model": to_builtins(model),
    }
    if spots:
        line["peak_xy_px"] = found.xy_px.tolist()
    return line


def _finite(value: Any) -> Any:
    # JSON knows no NaN: what was not determined is null.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return value


def _say(label: str, found: FrameAnalysis, seconds: float) -> None:
    if not found.crystals:
        summary = "no crystal found"
    else:
        summary = ", ".join(
            f"{c.material} ({c.spots_matched} of {c.spots_expected} spots, {c.residual_px:.2f} px"
            f"{''.join(f', {flag}' for flag in c.flags)})"
            for c in found.crystals
        )
    print(f"{label}: {len(found.xy_px)} peaks, {summary}; {seconds * 1e3:.0f} ms", file=sys.stderr)


def _check_plot(path: Path) -> None:
    # Before the work, not after it.
    if path.suffix.lower() != ".png":
        raise ConfigError(f"index: --plot {path}: expected a name that ends in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"index: --plot {path}: {path.parent} is no folder")


def _plot(
    analysis: LaueAnalysis,
    found: FrameAnalysis,
    image: npt.NDArray[Any] | None,
    label: str,
    target: Path,
) -> None:
    from pipelines.laue.plot import plot_frame

    try:
        plot_frame(analysis, found, image, Path(label).name, target)
    except OSError as error:
        raise ConfigError(f"index: --plot {target}: {error.strerror or error}") from error
