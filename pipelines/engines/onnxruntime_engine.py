"""Run the network of a bundle with ONNX Runtime: on one core, or on a GPU where its build can."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipelines.engines.bundle import MODEL, SELF_TEST, Bundle, BundleError
from pipelines.engines.engine import Arrays, EngineFailure, EngineInfo
from pipelines.engines.flavours import EngineError
from pipelines.engines.onnxruntime_session import import_onnxruntime, open_session
from pipelines.engines.precision import in_precision
from pipelines.engines.selftest import prove, read_self_test
from pipelines.engines.tensors import Ports, Tensor, nothing, ports_of, rows_of
from pipelines.engines.wording import one_line

_NUMPY = {"float": "float32", "double": "float64"}
"""ONNX Runtime's names of types where they are not NumPy's."""


class OnnxEngine:
    """One network, ready: loaded, compared with what its bundle says, tested with the bundle's batch."""

    def __init__(
        self,
        bundle: Bundle,
        precision: str = "fp32",
        device: Literal["cpu", "cuda"] = "cpu",
        card: str = "the GPU",
    ) -> None:
        """Load the network and run its self-test.

        Parameters
        ----------
        bundle : Bundle
        precision : str
            "fp32", "fp16" or "int8".
        device : str
        card : str
            How the GPU is called.

        Raises
        ------
        BundleError
            If the network takes or gives something else than the bundle says; and of float32 on the CPU,
            which bundles are made with: if it cannot be loaded, or answers otherwise than when the
            bundle was made.
        EngineError
            If any other combination does not work or is off by more than the bundle allows.
        """
        ports, where = ports_of(bundle), bundle.path(MODEL)
        self.inputs, self.outputs = ports
        self._names = list(self.outputs)
        model, plain = bundle.file(MODEL), precision == "fp32" and device == "cpu"
        try:
            if not plain:
                model = in_precision(
                    model, precision, read_self_test(bundle, ports).inputs, for_cpu=device == "cpu"
                )
            self._session = open_session(model, device)
        except EngineError as error:
            if plain:
                raise BundleError(f"{where}: {error}") from error
            raise
        try:
            found = Ports(_tensors(self._session.get_inputs()), _tensors(self._session.get_outputs()))
            found.compare(ports)
        except ValueError as error:
            raise BundleError(f"{where}: {error}") from error
        self.about = EngineInfo(
            "onnxruntime-cuda" if device == "cuda" else "onnxruntime",
            precision,
            card if device == "cuda" else "the CPU",
            import_onnxruntime().__version__,
        )
        try:
            prove(self, bundle)
        except EngineError as error:
            if not plain:
                raise
            where = bundle.path(SELF_TEST)
            if isinstance(error, EngineFailure):
                raise BundleError(f"{where}: the network fails on it: {error}") from error
            raise BundleError(
                f"{where}: {error}: the bundle, or ONNX Runtime on this machine, is not what it was made with"
            ) from error

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs of a batch; see `pipelines.engines.engine.Engine`."""
        if rows_of(inputs, self.inputs) == 0:
            return nothing(self.outputs)
        try:
            answers = self._session.run(self._names, dict(inputs))
        except Exception as error:  # ONNX Runtime has no common base of its errors
            raise EngineFailure(f"ONNX Runtime: {one_line(error)}") from error
        return dict(zip(self._names, answers, strict=True))


def _tensors(ports: Sequence[Any]) -> dict[str, Tensor]:
    """Return what a session takes or gives.

    Raises
    ------
    ValueError
        If it is of a type that bundles have not, or of free size in more than the first dimension.
    """
    found = {}
    for port in ports:
        # What is free has a name, or none: only numbers are sizes.
        first, *rest = (n if isinstance(n, int) else -1 for n in port.shape or (0,))
        kind = re.fullmatch(r"tensor\((\w+)\)", port.type)
        try:
            dtype = np.dtype(_NUMPY.get(kind[1], kind[1]) if kind else "")
        except TypeError as error:
            raise ValueError(f"{port.name} is {port.type}, which no bundle has") from error
        if -1 in rest:
            raise ValueError(f"{port.name} is of shape {port.shape}: only the first dimension may be free")
        found[port.name] = Tensor(dtype, (first, *rest))
    return found
