"""From a bundle to a stored plan, with what can be said of it on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipelines.engines.bundle import DESCRIPTION, Bundle, BundleError
from pipelines.engines.cuda import Cuda
from pipelines.engines.flavours import EngineError, Flavour
from pipelines.engines.onnxruntime_engine import (
    MODEL,
    SELF_TEST,
    import_onnxruntime,
    one_line,
    read_self_test,
)
from pipelines.engines.plan_cache import ANY_GPU, PlanKey, write_plan
from pipelines.engines.plans import Batch, Plan, build_plan
from pipelines.engines.precision import in_precision

#: How far the answers of a precision may be from those of float32, unless the bundle says otherwise.
TOLERANCES: Final[Mapping[str, float]] = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.1}


@dataclass(frozen=True, eq=False)
class BuiltEngine:
    """A plan in the cache.

    Attributes
    ----------
    path : Path
    plan : Plan
    key : PlanKey
    deviation : float
        Largest difference of the answers to the self-test of the network in this precision, run by ONNX
        Runtime, from those of the bundle.
    tolerance : float
        What the bundle allows.
    """

    path: Path
    plan: Plan
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
) -> BuiltEngine:
    """Compile the network of a bundle and store the plan.

    Parameters
    ----------
    bundle : Bundle
    flavour : Flavour
    cuda : Cuda
        What `pipelines.engines.cuda.probe` found.
    precision : str
        "fp32", "fp16" or "int8".
    batch : Batch, optional
    folder : Path, optional
        Instead of the cache.

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
    stated = _stated(bundle)
    inputs, answers = _self_test(bundle, stated["inputs"])
    model = in_precision(bundle.file(MODEL), precision, inputs)
    tolerance = bundle.description.tolerances.get(precision, TOLERANCES[precision])
    deviation = _deviation(model, inputs, answers)
    if not deviation <= tolerance:
        raise EngineError(
            f"{bundle.folder}: in {precision} the answers are off by {deviation:.2g}, allowed"
            f" {tolerance:.2g}: this precision is not for this network"
        )
    batch = batch or Batch()
    plan = build_plan(model, flavour, batch, stated)
    major, minor = cuda.capability
    key = PlanKey(
        hashlib.sha256(model).hexdigest(),
        flavour.name,
        flavour.version,
        f"sm{major}{minor}" if flavour.needs_gpu else ANY_GPU,
        precision,
        batch,
    )
    return BuiltEngine(write_plan(key, plan.content, folder), plan, key, deviation, tolerance)


def _stated(bundle: Bundle) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes that the bundle says its network has."""

    def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(-1 if n == "batch" else int(n) for n in about["shape"])
            for name, about in tensors.items()
        }

    try:
        return {"inputs": shapes(bundle.description.inputs), "outputs": shapes(bundle.description.outputs)}
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{bundle.folder / DESCRIPTION}: inputs and outputs: expected a shape of each, of 'batch' and"
            " numbers; make the bundle again"
        ) from error


def _self_test(
    bundle: Bundle, names: Collection[str]
) -> tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    if len(names) != 1:
        raise BundleError(
            f"{bundle.folder / DESCRIPTION}: inputs are {', '.join(names) or 'none'}, expected one"
        )
    where = bundle.folder / SELF_TEST
    given, answers = read_self_test(bundle.file(SELF_TEST), where)
    if not given.size:
        raise BundleError(f"{where}: holds no row to test with; make the bundle again")
    return dict.fromkeys(names, given), answers


def _deviation(
    model: bytes, inputs: Mapping[str, npt.NDArray[Any]], answers: npt.NDArray[np.float32]
) -> float:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, dict(inputs))
    except Exception as error:  # ONNX Runtime has no common base of its errors
        raise EngineError(f"ONNX Runtime refuses the network: {one_line(error)}") from error
    return float(np.abs(got - answers).max()) if got.shape == answers.shape else float("inf")
