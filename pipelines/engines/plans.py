"""From ONNX to a TensorRT plan.

Networks are strongly typed: the precision of every layer is what the ONNX says, so a plan for half
precision begins with ONNX in half precision (`pipelines.engines.precision`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.engines.flavours import EngineError, Flavour

Shape = tuple[int, ...]
_WORDS = 400
"""TensorRT's own words are cut after so many characters."""


@dataclass(frozen=True)
class Batch:
    """How many rows a network is given at once: at least, mostly and at most."""

    low: int = 1
    typical: int = 32
    high: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.typical <= self.high:
            raise ValueError(
                f"batch {self.low}, {self.typical}, {self.high}: expected 1 <= low <= typical <= high"
            )


@dataclass(frozen=True, eq=False)
class Plan:
    """A network compiled.

    Attributes
    ----------
    content : bytes
        What the runtime of the flavour loads.
    layers : int
        Of the network as it was read.
    seconds : float
        That the building took.
    inputs, outputs : mapping of str to (type, shape)
        -1 is the batch.
    """

    content: bytes
    layers: int
    seconds: float
    inputs: Mapping[str, tuple[str, Shape]]
    outputs: Mapping[str, tuple[str, Shape]]


def build_plan(
    onnx: bytes,
    flavour: Flavour,
    batch: Batch,
    expected: Mapping[str, Mapping[str, Shape]] | None = None,
) -> Plan:
    """Compile a network.

    Parameters
    ----------
    onnx : bytes
        The file; its first axis of every input may be free.
    flavour : Flavour
    batch : Batch
        What the free axis is optimised for.
    expected : mapping, optional
        "inputs" and "outputs": name to shape, -1 for the batch, that the network must have.

    Raises
    ------
    EngineError
        If the flavour is not installed, refuses the network, or the network has other inputs or outputs.
    """
    trt = flavour.load()
    said = Listener.attach(trt)
    try:
        builder = trt.Builder(said.logger)
    except Exception as error:  # the bindings raise TypeError, RuntimeError and others
        raise EngineError(f"{flavour.name}: the builder does not start: {said.words() or error}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, said.logger)
    if not parser.parse(onnx) or network.num_outputs == 0:
        raise EngineError(
            f"{flavour.name} {flavour.version} does not take the network: {_parse_error(parser, said)}"
        )
    inputs = {t.name: t for t in map(network.get_input, range(network.num_inputs))}
    outputs = {t.name: t for t in map(network.get_output, range(network.num_outputs))}
    found = {"inputs": _shapes(inputs), "outputs": _shapes(outputs)}
    for kind, wanted in (expected or {}).items():
        if found[kind] != dict(wanted):
            raise EngineError(f"the network has {kind} {_show(found[kind])}, the bundle says {_show(wanted)}")
    config = builder.create_builder_config()
    # Answers that are compared with single precision must be made in it.
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for name, shape in found["inputs"].items():
        if any(n == -1 for n in shape[1:]):
            raise EngineError(f"input {name} {shape}: only its first axis may be free")
        low, typical, high = ((n, *shape[1:]) for n in (batch.low, batch.typical, batch.high))
        if shape[:1] == (-1,):
            profile.set_shape(name, low, typical, high)
    config.add_optimization_profile(profile)
    began = time.perf_counter()
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise EngineError(f"{flavour.name} {flavour.version} cannot build the plan: {said.words()}")
    return Plan(
        bytes(built),
        int(network.num_layers),
        time.perf_counter() - began,
        {
            name: (str(t.dtype).rpartition(".")[2].lower(), found["inputs"][name])
            for name, t in inputs.items()
        },
        {
            name: (str(t.dtype).rpartition(".")[2].lower(), found["outputs"][name])
            for name, t in outputs.items()
        },
    )


class Listener:
    """Keeps what TensorRT says of errors, for messages of our own; prints nothing.

    Attributes
    ----------
    errors : list of str
    logger : object
        What TensorRT is given as its logger.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.logger: Any = None

    @classmethod
    def attach(cls, trt: Any, *, to_run: bool = False) -> Listener:
        """Return one for a flavour: to build with it, or to run what was built."""
        listener = cls()

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                # That there is no driver is no error where nothing is to run.
                if severity <= trt.Logger.Severity.ERROR and (to_run or "cudaError 35" not in message):
                    listener.errors.append(message)

        listener.logger = Logger()
        return listener

    def words(self) -> str:
        """Return what it said, on one line."""
        return " ".join(" ".join(self.errors).split())[:_WORDS]


def _parse_error(parser: Any, said: Listener) -> str:
    if parser.num_errors == 0:
        return "it is empty, or no ONNX"
    first = parser.get_error(0)
    operator, node = first.node_operator(), first.node_name()
    what = " ".join(str(first.desc()).split())[:_WORDS]
    if str(first.code()).endswith("UNSUPPORTED_NODE"):
        what = "it knows no such operator"
    return f"operator {operator} (node {node!r}): {what}" if operator else what or said.words()


def _shapes(tensors: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: tuple(int(n) for n in t.shape) for name, t in tensors.items()}


def _show(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(
        f"{name} [{', '.join('batch' if n == -1 else str(n) for n in shape)}]"
        for name, shape in shapes.items()
    )
