"""Run the network of a bundle with ONNX Runtime on one core."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from pipelines.engines.bundle import DESCRIPTION, Bundle, BundleError

Array = npt.NDArray[np.float32]

MODEL = "model.onnx"
SELF_TEST = "selftest.npz"

_LONGEST = 300


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime and have it report to nobody: its builds send usage to their maker otherwise."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return cast(ModuleType, onnxruntime)


class OnnxEngine:
    """One network, ready: loaded, tested with the batch of its bundle.

    Attributes
    ----------
    width, outputs : int
        Numbers that it takes and gives for each row of a batch.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Load the network and run its self-test.

        Raises
        ------
        BundleError
            If ONNX Runtime is not installed or refuses the file, the network takes or gives something
            else than the bundle says, or its answers are not those that the bundle was made with.
        """
        try:
            onnxruntime = import_onnxruntime()
        except ImportError as error:
            raise BundleError(
                f"{bundle.folder}: a bundle needs ONNX Runtime: pip install 'grainwatch[daemon]'"
            ) from error
        options = onnxruntime.SessionOptions()
        # Workers share the cores: a thread that spins while it waits takes a neighbour's.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        where, content = bundle.folder / MODEL, bundle.file(MODEL)
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no common base of its errors
            raise BundleError(f"{where}: ONNX Runtime refuses it: {one_line(error)}") from error
        described = bundle.description
        try:
            self._input, self.width = _port("input", self._session.get_inputs(), described.inputs)
            _, self.outputs = _port("output", self._session.get_outputs(), described.outputs)
        except ValueError as error:
            raise BundleError(f"{where}: {error}") from error
        self._test(bundle)

    def run(self, x: Array) -> Array:
        """Return the output (n, m) for inputs (n, width)."""
        (out,) = self._session.run(None, {self._input: x})
        return np.asarray(out, dtype=np.float32)

    def _test(self, bundle: Bundle) -> None:
        where = bundle.folder / SELF_TEST
        x, expected = read_self_test(bundle.file(SELF_TEST), where)
        if x.ndim != 2 or x.shape[1] != self.width or expected.shape != (len(x), self.outputs):
            raise BundleError(
                f"{where}: inputs of shape {x.shape} and outputs of shape {expected.shape}; the network takes"
                f" {self.width} numbers and gives {self.outputs}"
            )
        tolerance = bundle.description.tolerances.get("self_test")
        if tolerance is None:
            raise BundleError(f"{bundle.folder / DESCRIPTION}: tolerances has no self_test")
        try:
            got = self.run(x)
        except Exception as error:
            raise BundleError(f"{where}: the network fails on it: {one_line(error)}") from error
        worst = float(np.abs(got - expected).max(initial=0.0)) if len(x) else math.inf
        if not worst <= tolerance:
            raise BundleError(
                f"{where}: the network's answers are off by {worst:.2g}, allowed {tolerance:.2g}:"
                " the bundle, or ONNX Runtime on this machine, is not what it was made with"
            )


def _port(kind: str, ports: Sequence[Any], described: Mapping[str, Any]) -> tuple[str, int]:
    """Return name and width of the only input or output, (any number, width) of float32.

    Raises
    ------
    ValueError
        If it is anything else, or not what the bundle says of it.
    """
    names = [port.name for port in ports]
    if len(names) != 1 or names != list(described):
        raise ValueError(
            f"its {kind}s are {', '.join(names) or 'none'}, {DESCRIPTION} says"
            f" {', '.join(described) or 'none'}; make the bundle again"
        )
    (port,) = ports
    # A number in the first place would be a fixed count of spots.
    batch, *width = port.shape if port.shape else (0,)
    if port.type != "tensor(float)" or isinstance(batch, int) or len(width) != 1 or not _is_count(width[0]):
        raise ValueError(
            f"its {kind} {port.name} is {port.type} of shape {port.shape}, expected float32 of shape"
            " (any number, width)"
        )
    stated = described[port.name]
    shape = stated.get("shape") if isinstance(stated, dict) else None
    if shape != ["batch", width[0]]:
        raise ValueError(
            f"its {kind} {port.name} has the shape {port.shape}, {DESCRIPTION} says {shape}; make the bundle"
            " again"
        )
    return port.name, int(width[0])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


def read_self_test(content: bytes, where: Path) -> tuple[Array, Array]:
    """Return inputs and answers of a bundle's self-test; BundleError if they are not there."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            return stored["input"].astype(np.float32), stored["output"].astype(np.float32)
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
        raise BundleError(f"{where}: expected arrays input and output; make the bundle again") from error


def one_line(error: Exception) -> str:
    """Return what an error says, without line breaks, and cut where it has no end."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
