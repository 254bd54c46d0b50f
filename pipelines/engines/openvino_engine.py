"""Run the network of a bundle with OpenVINO on one core, in bfloat16 where the processor has it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from pipelines.engines.bundle import MODEL, Bundle, BundleError
from pipelines.engines.engine import Arrays, EngineFailure, EngineInfo
from pipelines.engines.flavours import EngineError
from pipelines.engines.precision import in_precision
from pipelines.engines.selftest import prove, read_self_test
from pipelines.engines.tensors import Ports, Tensor, nothing, ports_of, rows_of
from pipelines.engines.wording import one_line

#: What it computes in where the network does not say otherwise. It would choose by itself, by the processor.
_HINTS: Final = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


class OpenVinoEngine:
    """One network, ready: loaded, compared with what its bundle says, tested with the bundle's batch."""

    def __init__(self, bundle: Bundle, precision: str = "fp32") -> None:
        """Load the network and run its self-test.

        Parameters
        ----------
        bundle : Bundle
        precision : str
            "fp32", "bf16" or "int8".

        Raises
        ------
        EngineError
            If OpenVINO is not installed or refuses the network, the processor does not have the precision,
            or the answers are off by more than the bundle allows.
        BundleError
            If the network takes or gives something else than the bundle says.
        """
        openvino = _import_openvino()
        if precision not in _HINTS:
            raise EngineError(f"OpenVINO on the CPU has no {precision}, only {', '.join(_HINTS)}")
        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError("this processor has no bf16")
        ports = ports_of(bundle)
        self.inputs, self.outputs = ports
        model = bundle.file(MODEL)
        if precision == "int8":
            model = in_precision(model, precision, read_self_test(bundle, ports).inputs, for_cpu=True)
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            # Workers share the cores.
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
        }
        try:
            compiled = core.compile_model(core.read_model(model), "CPU", options)
            self._request = compiled.create_infer_request()
            found = Ports(_tensors(compiled.inputs, self.inputs), _tensors(compiled.outputs, self.outputs))
        except Exception as error:  # it raises RuntimeError for whatever it stumbles over
            raise EngineError(f"OpenVINO refuses the network: {one_line(error)}") from error
        try:
            found.compare(ports)
        except ValueError as error:
            raise BundleError(f"{bundle.path(MODEL)}: {error}") from error
        self.about = EngineInfo("openvino", precision, "the CPU", openvino.__version__.partition("-")[0])
        prove(self, bundle)

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs of a batch; see `pipelines.engines.engine.Engine`."""
        if rows_of(inputs, self.inputs) == 0:
            return nothing(self.outputs)
        try:
            answers = self._request.infer(dict(inputs), share_inputs=True)
            # Arrays of their own: the next batch writes over the request's.
            return {name: answers[name] for name in self.outputs}
        except Exception as error:  # it raises RuntimeError for whatever it stumbles over
            raise EngineFailure(f"OpenVINO: {one_line(error)}") from error


def _import_openvino() -> ModuleType:
    # Its package for usage statistics leaves an identifier in the user's home as soon as it is loaded; as if
    # it were not installed, OpenVINO does without.
    cast(dict[str, ModuleType | None], sys.modules).setdefault("openvino_telemetry", None)
    try:
        import openvino
    except ImportError as error:
        raise EngineError(
            f"OpenVINO is not installed or does not load ({error}): pip install 'grainwatch[openvino]'"
        ) from error
    return cast(ModuleType, openvino)


def _tensors(ports: Iterable[Any], stated: Collection[str]) -> dict[str, Tensor]:
    found = {}
    for port in ports:
        # It calls an output by the names of all that it passes on unchanged.
        name = next((n for n in port.get_names() if n in stated), None) or port.get_any_name()
        shape = tuple(-1 if d.is_dynamic else d.get_length() for d in port.get_partial_shape())
        found[name] = Tensor(np.dtype(port.get_element_type().to_dtype()), shape)
    return found
