"""Inputs and outputs of networks: what a bundle says, what is there, what is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.engines.bundle import DESCRIPTION, Bundle, BundleError
from pipelines.engines.flavours import EngineError

_TYPES = ("float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool")


class Tensor(NamedTuple):
    """An input or output.

    Attributes
    ----------
    dtype : numpy.dtype
    shape : tuple of int
        -1 is the batch.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """Return type and shape as messages show them."""
        return f"{self.dtype} [{', '.join('batch' if n == -1 else str(n) for n in self.shape)}]"


class Ports(NamedTuple):
    """All of them, by name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def compare(self, stated: Ports) -> None:
        """Check that they are what a bundle says.

        Raises
        ------
        ValueError
            Naming the first one that is not.
        """
        for kind, found, said in (
            ("input", self.inputs, stated.inputs),
            ("output", self.outputs, stated.outputs),
        ):
            if found.keys() != said.keys():
                raise ValueError(
                    f"its {kind}s are {', '.join(found) or 'none'}, {DESCRIPTION} says {', '.join(said)};"
                    " make the bundle again"
                )
            for name, tensor in found.items():
                if tensor != said[name]:
                    raise ValueError(
                        f"its {kind} {name} is {tensor}, {DESCRIPTION} says {said[name]};"
                        " make the bundle again"
                    )


def ports_of(bundle: Bundle) -> Ports:
    """Return what a bundle says that its network takes and gives.

    Raises
    ------
    BundleError
        If it does not say so in full.
    """

    def tensors(kind: str, described: Mapping[str, Any]) -> dict[str, Tensor]:
        where = f"{bundle.folder / DESCRIPTION}: {kind}"
        if not described:
            raise BundleError(f"{where} are none, expected at least one; make the bundle again")
        return {name: _tensor(about, f"{where} {name}") for name, about in described.items()}

    return Ports(tensors("inputs", bundle.description.inputs), tensors("outputs", bundle.description.outputs))


def _tensor(about: Any, where: str) -> Tensor:
    about = about if isinstance(about, dict) else {}
    kind, shape = about.get("type"), about.get("shape")
    first, *rest = shape if isinstance(shape, list) and shape else ("",)
    if kind not in _TYPES or first != "batch" or not all(type(n) is int and n > 0 for n in rest):
        raise BundleError(
            f"{where} is {kind} of shape {shape}, expected a type ({', '.join(_TYPES)}) and a shape of"
            ' "batch" and numbers; make the bundle again'
        )
    return Tensor(np.dtype(kind), (-1, *rest))


def rows_of(given: Mapping[str, npt.NDArray[Any]], wanted: Mapping[str, Tensor]) -> int:
    """Return how many rows a batch has.

    Raises
    ------
    EngineError
        If it is not what the network takes. Nothing is converted: a caller makes what is wanted.
    """
    if given.keys() != wanted.keys():
        raise EngineError(f"given {', '.join(given) or 'nothing'}; the network takes {', '.join(wanted)}")
    rows = -1
    for name, tensor in wanted.items():
        array = given[name]
        if array.dtype != tensor.dtype or array.ndim == 0 or array.shape[1:] != tensor.shape[1:]:
            raise EngineError(
                f"{name} is {array.dtype} of shape {list(array.shape)}; the network takes {tensor}"
            )
        if rows not in (-1, len(array)):
            raise EngineError(
                "inputs of unequal length: " + ", ".join(f"{n} {len(given[n])}" for n in wanted)
            )
        rows = len(array)
    return rows


def nothing(outputs: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Return the answer to a batch without rows."""
    return {name: np.empty((0, *t.shape[1:]), t.dtype) for name, t in outputs.items()}
