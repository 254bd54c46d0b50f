"""``grainwatch engine``: compile the networks of bundles, and say what could run them here."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from grainwatch.config import ConfigError
from pipelines.engines.builder import BuiltEngine, build_engine
from pipelines.engines.bundle import BundleError, load_bundle
from pipelines.engines.cuda import Cuda, probe
from pipelines.engines.flavours import FLAVOURS, EngineError, Flavour, flavour_of
from pipelines.engines.plans import Batch
from pipelines.engines.shipped import find_bundle

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Compile networks with TensorRT, and see what could run them here.",
)


@app.callback()
def engine() -> None:
    """Compile networks with TensorRT, and see what could run them here."""


@app.command()
def build(
    bundles: Annotated[list[str], typer.Argument(metavar="BUNDLE...", help="Folders or names of bundles.")],
    flavour: Annotated[
        str, typer.Option(help="tensorrt, tensorrt_rtx, or auto for what is installed.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    batch: Annotated[tuple[int, int, int], typer.Option(help="Fewest, typical and most rows at once.")] = (
        1,
        32,
        1024,
    ),
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the plans instead of the cache.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line a plan.")] = False,
) -> None:
    """Compile the network of each bundle and store the plan; tensorrt_rtx needs no GPU for it."""
    cuda = probe()
    try:
        chosen = flavour_of(flavour)
        rows = Batch(*batch)
    except ValueError as error:
        raise ConfigError(f"engine build: {error}") from error
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"engine build: --out {out}: is no folder")
    for name in bundles:
        try:
            bundle = load_bundle(find_bundle(name))
            built = build_engine(bundle, chosen, cuda, precision, rows, out)
        except BundleError as error:  # names the folder itself
            raise ConfigError(f"engine build: {error}") from error
        except EngineError as error:
            raise ConfigError(f"engine build: {name}: {error}") from error
        print(json.dumps(_facts(name, built)) if as_json else _line(name, built), flush=True)
    if not as_json and (lack := cuda.lacks(chosen.needs_cuda)):
        print(f"not run: {lack}")


@app.command()
def backends(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say which backends are installed, and whether a GPU is there for them."""
    cuda = probe()
    found = [{"backend": "onnxruntime", "version": version("onnxruntime"), "state": "runs on the CPU"}]
    found += [{"backend": f.name, "version": f.version, "state": _state(f, cuda)} for f in FLAVOURS]
    gpu = cuda.problem or f"{cuda.device}, driver for CUDA {cuda.driver[0]}.{cuda.driver[1]}"
    if as_json:
        print(json.dumps({"gpu": gpu, "backends": found}))
        return
    print(f"GPU: {gpu}")
    for row in found:
        print(f"{row['backend']:<13}{row['version'] or '-':<12}{row['state']}")


def _state(flavour: Flavour, cuda: Cuda) -> str:
    if not flavour.version:
        return f"not installed: pip install 'grainwatch[{flavour.extra}]'"
    lack = cuda.lacks(flavour.needs_cuda)
    if not lack:
        return "builds plans"
    return f"cannot be used: {lack}" if flavour.needs_gpu else f"builds plans, cannot run them: {lack}"


def _facts(name: str, built: BuiltEngine) -> dict[str, Any]:
    plan, key = built.plan, built.key
    return {
        "bundle": name,
        "path": str(built.path),
        "flavour": key.flavour,
        "version": key.version,
        "architecture": key.architecture,
        "precision": key.precision,
        "bytes": len(plan.content),
        "layers": plan.layers,
        "seconds": round(plan.seconds, 3),
        "deviation": built.deviation,
        "tolerance": built.tolerance,
    }


def _line(name: str, built: BuiltEngine) -> str:
    plan = built.plan
    return (
        f"{name}: {built.key.precision} plan of {plan.layers} layers, {len(plan.content) / 1e6:.1f} MB,"
        f" built in {plan.seconds:.1f} s; answers off by {built.deviation:.1g} (allowed"
        f" {built.tolerance:.1g}, by ONNX Runtime)\n  {built.path}"
    )
