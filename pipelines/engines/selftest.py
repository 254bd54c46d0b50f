"""The batch that comes with a bundle, and the answers that whatever runs it must give."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from pipelines.engines.bundle import DESCRIPTION, SELF_TEST, Bundle, BundleError
from pipelines.engines.engine import Arrays, Engine
from pipelines.engines.flavours import EngineError
from pipelines.engines.tensors import Ports, Tensor, ports_of

#: How far the answers of a precision may be off where a bundle does not say.
TOLERANCES: Final[Mapping[str, float]] = {"fp16": 0.02, "bf16": 0.05, "int8": 0.1}


class SelfTest(NamedTuple):
    """Inputs, and the outputs that belong to them, in the types of the network."""

    inputs: dict[str, npt.NDArray[Any]]
    outputs: dict[str, npt.NDArray[Any]]


def read_self_test(bundle: Bundle, ports: Ports | None = None) -> SelfTest:
    """Read the arrays of a bundle's self-test.

    They are named as the inputs and outputs are; "input" and "output" stand for the only ones.

    Raises
    ------
    BundleError
        If they are not there, or not what the network takes and gives.
    """
    ports = ports or ports_of(bundle)
    where = bundle.path(SELF_TEST)
    content = bundle.file(SELF_TEST)
    plain = {next(iter(t)): word for t, word in zip(ports, ("input", "output"), strict=True) if len(t) == 1}
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:

            def read(name: str, tensor: Tensor) -> npt.NDArray[Any]:
                short = plain.get(name, name)
                array = stored[name if name in stored or short not in stored else short]
                return np.ascontiguousarray(array.astype(tensor.dtype, casting="same_kind"))

            test = SelfTest(
                {name: read(name, t) for name, t in ports.inputs.items()},
                {name: read(name, t) for name, t in ports.outputs.items()},
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        BadZipFile,
        zlib.error,
    ) as error:
        # Not in NumPy's words, which advise to unpickle.
        names = [plain.get(name, name) for name in (*ports.inputs, *ports.outputs)]
        expected = f"{', '.join(names[:-1])} and {names[-1]}"
        raise BundleError(f"{where}: expected arrays {expected}; make the bundle again") from error
    lengths = set()
    for kind, arrays, tensors in (
        ("takes", test.inputs, ports.inputs),
        ("gives", test.outputs, ports.outputs),
    ):
        for name, array in arrays.items():
            if array.ndim == 0 or array.shape[1:] != tensors[name].shape[1:]:
                raise BundleError(
                    f"{where}: {name} has the shape {list(array.shape)}, the network {kind} {tensors[name]}"
                )
            lengths.add(len(array))
    if len(lengths) != 1:
        raise BundleError(f"{where}: holds arrays of unequal length; make the bundle again")
    if lengths == {0}:
        raise BundleError(f"{where}: holds no row to test with; make the bundle again")
    return test


def tolerance_of(bundle: Bundle, precision: str) -> float:
    """Return how far the answers to the self-test may be off.

    Raises
    ------
    BundleError
        If the bundle does not say it for what it was made with.
    """
    stated = bundle.description.tolerances
    if "self_test" not in stated:
        raise BundleError(f"{bundle.folder / DESCRIPTION}: tolerances has no self_test")
    default = stated["self_test"] if precision == "fp32" else TOLERANCES[precision]
    return stated.get(precision, default)


def deviation(run: Callable[[Arrays], Mapping[str, npt.NDArray[Any]]], test: SelfTest) -> float:
    """Return the largest difference of answers from those of the self-test; not a number counts as it is."""
    got = run(test.inputs)
    worst = 0.0
    for name, expected in test.outputs.items():
        answer = got[name]
        if answer.shape != expected.shape:
            return math.inf
        off = np.abs(answer.astype(np.float64) - expected).max(initial=0.0)
        worst = float(np.maximum(worst, off))  # keeps NaN, which `max` may lose
    return worst


def prove(engine: Engine, bundle: Bundle) -> float:
    """Check an engine with the self-test of its bundle; return how far its answers are off.

    Raises
    ------
    EngineError
        If they are off by more than the bundle allows for the precision of the engine.
    BundleError
        If there is nothing to check it with.
    """
    precision = engine.about.precision
    tolerance = tolerance_of(bundle, precision)
    off = deviation(engine.run, read_self_test(bundle))
    if not off <= tolerance:
        raise EngineError(f"its {precision} answers are off by {off:.2g}, allowed {tolerance:.2g}")
    return off
