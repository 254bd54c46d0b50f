"""``grainwatch engine``: compile the networks of bundles, and say what runs them here."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from grainwatch.config import ConfigError, EnginesTable, convert
from pipelines.engines.builder import BuiltEngine, build_engine
from pipelines.engines.bundle import Bundle, BundleError, load_bundle
from pipelines.engines.choice import open_engine, prospect
from pipelines.engines.cuda import Cuda, probe
from pipelines.engines.flavours import FLAVOURS, EngineError, Flavour, flavour_of
from pipelines.engines.measure import Worth, worth
from pipelines.engines.plans import Batch
from pipelines.engines.shipped import find_bundle
from pipelines.engines.tensorrt_engine import TensorrtEngine

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Compile networks with TensorRT, and see what runs them here.",
)


@app.callback()
def engine() -> None:
    """Compile networks with TensorRT, and see what runs them here."""


@app.command()
def build(
    bundles: Annotated[list[str], typer.Argument(metavar="BUNDLE...", help="Folders or names of bundles.")],
    flavour: Annotated[
        str, typer.Option(help="tensorrt, tensorrt_rtx, or auto for what is installed.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    batch: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Fewest, typical and most rows at once.", show_default="what the bundle says"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the plans instead of the cache.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Compile also what is in the cache.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line a plan.")] = False,
) -> None:
    """Compile the networks of each bundle and store the plans; on a GPU, compare and time them.

    tensorrt_rtx needs no GPU to compile.
    """
    cuda = probe()
    try:
        chosen = flavour_of(flavour)
        rows = Batch(*batch) if batch else None
    except ValueError as error:
        raise ConfigError(f"engine build: {error}") from error
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"engine build: --out {out}: is no folder")
    lack = cuda.lacks(chosen.needs_cuda)
    for name in bundles:
        try:
            for network in load_bundle(find_bundle(name)).networks():
                built = build_engine(network, chosen, cuda, precision, rows, out, again=again)
                figures = None
                if not lack:
                    ready = TensorrtEngine(network, chosen, cuda, precision, rows, out)
                    figures = worth(ready, network)
                shown = _shown(name, network)
                facts = _facts(shown, built, figures)
                print(json.dumps(facts) if as_json else _line(shown, built, figures), flush=True)
        except BundleError as error:  # names the folder itself
            raise ConfigError(f"engine build: {error}") from error
        except EngineError as error:
            raise ConfigError(f"engine build: {name}: {error}") from error
    if not as_json and lack:
        print(f"not run: {lack}")


@app.command()
def backends(
    bundles: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BUNDLE...]",
            help="Folders or names of bundles: which one each is run by.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="As [engines] backend.")] = "auto",
    precision: Annotated[str, typer.Option(help="As [engines] precision.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say which backends are installed, whether a GPU is there for them, and which one is taken."""
    choice = convert({"backend": backend, "precision": precision}, EnginesTable, "engine backends")
    cuda = probe()
    found = [{"backend": "onnxruntime", "version": version("onnxruntime"), "state": "runs on the CPU"}]
    found += [{"backend": f.name, "version": f.version, "state": _state(f, cuda)} for f in FLAVOURS]
    found.append({"backend": "openvino", "version": _version("openvino"), "state": _openvino()})
    gpu = cuda.problem or f"{cuda.device}, driver for CUDA {cuda.driver[0]}.{cuda.driver[1]}"
    taken = {shown: line for name in bundles or () for shown, line in _taken(name, choice, cuda)}
    ahead = prospect(choice, cuda)
    because = f", because {'; '.join(ahead.lacking)}" if ahead.lacking else ""
    first = f"{ahead.backends[0]}{because}"
    if as_json:
        print(json.dumps({"gpu": gpu, "backends": found, "tried_first": first, "taken": taken}))
        return
    print(f"GPU: {gpu}")
    for row in found:
        print(f"{row['backend']:<13}{row['version'] or '-':<12}{row['state']}")
    print(f"tried first: {first}")
    for name, line in taken.items():
        print(f"{name}: {line}")


def _shown(name: str, network: Bundle) -> str:
    return f"{name} {network.part}" if network.part else name


def _taken(name: str, choice: EnginesTable, cuda: Cuda) -> list[tuple[str, str]]:
    try:
        return [
            (_shown(name, network), str(open_engine(network, choice, cuda).about))
            for network in load_bundle(find_bundle(name)).networks()
        ]
    except BundleError as error:  # names the folder itself
        raise ConfigError(f"engine backends: {error}") from error
    except EngineError as error:
        raise ConfigError(f"engine backends: {name}: {error}") from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _openvino() -> str:
    if not _version("openvino"):
        return "not installed: pip install 'grainwatch[openvino]'"
    return "runs on the CPU where it is asked for"


def _state(flavour: Flavour, cuda: Cuda) -> str:
    if not flavour.version:
        return f"not installed: pip install 'grainwatch[{flavour.extra}]'"
    lack = cuda.lacks(flavour.needs_cuda)
    if not lack:
        return "builds plans and runs them"
    return f"cannot be used: {lack}" if flavour.needs_gpu else f"builds plans, cannot run them: {lack}"


def _facts(name: str, built: BuiltEngine, figures: Worth | None) -> dict[str, Any]:
    key, plan = built.key, built.plan
    facts = {
        "bundle": name,
        "path": str(built.path),
        "flavour": key.flavour,
        "version": key.version,
        "architecture": key.architecture,
        "precision": key.precision,
        "batch": [key.batch.low, key.batch.typical, key.batch.high],
        "bytes": len(built.content),
        "built": plan is not None,
        "layers": plan.layers if plan else None,
        "seconds": round(plan.seconds, 3) if plan else None,
        "deviation": built.deviation,
        "tolerance": built.tolerance,
    }
    if figures:
        facts |= {"parity": figures.off, "latency_ms": figures.latency_ms}
    return facts


def _line(name: str, built: BuiltEngine, figures: Worth | None) -> str:
    plan, size = built.plan, f"{len(built.content) / 1e6:.1f} MB"
    what = f"{built.key.precision} plan"
    lines = [
        f"{name}: {what} of {plan.layers} layers, {size}, built in {plan.seconds:.1f} s"
        if plan
        else f"{name}: {what}, {size}, found in the cache (--again builds it)",
    ]
    lines[0] += f"; answers off by {built.deviation:.1g} (allowed {built.tolerance:.1g}, by ONNX Runtime)"
    if figures:
        times = ", ".join(f"{rows}: {ms:.3g} ms" for rows, ms in figures.latency_ms.items())
        lines.append(
            f"  on the GPU off by {figures.off:.1g} from float32 of ONNX Runtime; batches of {times}"
        )
    lines.append(f"  {built.path}")
    return "\n".join(lines)
