"""From a bundle to a stored plan, with what can be said of it on this machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from pipelines.engines.bundle import MODEL, Bundle
from pipelines.engines.cuda import Cuda
from pipelines.engines.engine import Arrays
from pipelines.engines.flavours import EngineError, Flavour
from pipelines.engines.onnxruntime_session import open_session
from pipelines.engines.plan_cache import ANY_GPU, PlanKey, engines_dir, locked, read_plan, write_plan
from pipelines.engines.plans import Batch, Plan, build_plan
from pipelines.engines.precision import in_precision
from pipelines.engines.selftest import deviation, read_self_test, tolerance_of
from pipelines.engines.tensors import ports_of
from pipelines.engines.wording import one_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class BuiltEngine:
    """A plan in the cache.

    Attributes
    ----------
    path : Path
    content : bytes
        What the runtime of the flavour loads.
    plan : Plan or None
        What the building told; None for a plan that was there already.
    key : PlanKey
    deviation : float
        Largest difference of the answers to the self-test of the network in this precision, run by ONNX
        Runtime, from those of the bundle.
    tolerance : float
        What the bundle allows.
    """

    path: Path
    content: bytes
    plan: Plan | None
    key: PlanKey
    deviation: float
    tolerance: float


def build_engine(
    bundle: Bundle,
    flavour: Flavour,
    cuda: Cuda,
    precision: str = "fp32",
    batch: Batch | None = None,
    folder: Path | None = None,
    *,
    again: bool = False,
) -> BuiltEngine:
    """Return the plan of a bundle's network: the one that is stored, else compile and store it.

    Of several processes that want the same plan one builds it, the others wait for it.

    Parameters
    ----------
    bundle : Bundle
    flavour : Flavour
    cuda : Cuda
        What `pipelines.engines.cuda.probe` found.
    precision : str
        "fp32", "fp16" or "int8".
    batch : Batch, optional
        What the bundle says by default.
    folder : Path, optional
        Instead of the cache.
    again : bool
        Compile it also where one is stored.

    Raises
    ------
    EngineError
        If the flavour needs a GPU that is not there or refuses the network, the network is not what the
        bundle says, or its answers in this precision are further off than the bundle allows.
    BundleError
        If the bundle lacks what is needed, or does not describe its network.
    """
    if flavour.needs_gpu and (lack := cuda.lacks(flavour.needs_cuda)):
        raise EngineError(f"{flavour.name} builds on the GPU that will run the plan: {lack}")
    if not flavour.version:
        flavour.load()  # says what is missing
    ports = ports_of(bundle)
    test = read_self_test(bundle, ports)
    model = in_precision(bundle.file(MODEL), precision, test.inputs)
    tolerance = tolerance_of(bundle, precision)
    off = deviation(_by_onnxruntime(model, list(ports.outputs)), test)
    if not off <= tolerance:
        raise EngineError(
            f"{bundle.folder}: in {precision} the answers are off by {off:.2g}, allowed"
            f" {tolerance:.2g}: this precision is not for this network"
        )
    batch = batch or Batch(*bundle.description.batch)
    major, minor = cuda.capability
    key = PlanKey(
        hashlib.sha256(model).hexdigest(),
        flavour.name,
        flavour.version,
        f"sm{major}{minor}" if flavour.needs_gpu else ANY_GPU,
        precision,
        batch,
    )
    folder = folder or engines_dir()
    path = folder / key.file_name
    with locked(path):
        stored = None if again else _stored(key, folder)
        if stored is not None:
            return BuiltEngine(path, stored, None, key, off, tolerance)
        stated = {
            kind: {name: t.shape for name, t in tensors.items()} for kind, tensors in ports._asdict().items()
        }
        plan = build_plan(model, flavour, batch, stated)
        write_plan(key, plan.content, folder)
    return BuiltEngine(path, plan.content, plan, key, off, tolerance)


def _stored(key: PlanKey, folder: Path) -> bytes | None:
    try:
        return read_plan(key, folder)
    except EngineError as error:
        _log.warning("%s: it is built again", error)
        return None


def _by_onnxruntime(model: bytes, outputs: Sequence[str]) -> Callable[[Arrays], dict[str, npt.NDArray[Any]]]:
    """Return what runs a network that is known by its bytes alone."""
    session = open_session(model)

    def run(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        try:
            answers = session.run(list(outputs), dict(inputs))
        except Exception as error:  # ONNX Runtime has no common base of its errors
            raise EngineError(f"the network fails on the bundle's self-test: {one_line(error)}") from error
        return dict(zip(outputs, answers, strict=True))

    return run
