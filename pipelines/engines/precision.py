"""The same network in fewer bits: half precision, or 8-bit integers with their scales.

TensorRT takes the precision from the ONNX, so this is where it is decided. Needs the package onnx.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipelines.engines.flavours import EngineError
from pipelines.engines.onnxruntime_session import import_onnxruntime
from pipelines.engines.wording import one_line

PRECISIONS: Final = ("fp32", "fp16", "int8")
_CALIBRATION_ROWS: Final = 32

Inputs = Mapping[str, npt.NDArray[Any]]


def in_precision(
    model: bytes, precision: str, calibration: Inputs | None = None, *, for_cpu: bool = False
) -> bytes:
    """Return ONNX in the asked precision; inputs and outputs stay float32.

    Parameters
    ----------
    model : bytes
        In float32.
    precision : str
        "fp32" returns it as it is.
    calibration : mapping of str to array, optional
        Typical inputs, needed for "int8": the range of every activation is taken from them.
    for_cpu : bool
        Of integers, those that a CPU multiplies fastest (unsigned by signed) instead of those that TensorRT
        takes (signed, zero in the middle, biases not in integers).

    Raises
    ------
    EngineError
        If the precision is unknown, the package onnx is not installed, or the model is no ONNX or cannot
        be converted.
    """
    if precision == "fp32":
        return model
    if precision not in PRECISIONS:
        raise EngineError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    import_onnxruntime()
    try:
        import onnx
    except ImportError as error:
        raise EngineError(f"precision {precision} needs the package onnx: pip install onnx") from error
    try:
        parsed = onnx.load_from_string(model)
    except Exception as error:  # protobuf has errors of its own
        raise EngineError(f"the network is no ONNX: {one_line(error)}") from error
    if precision == "int8" and not calibration:
        raise EngineError("precision int8 needs typical inputs, and the bundle holds none")
    try:
        if calibration and precision == "int8":
            return _integer(parsed, calibration, for_cpu)
        return _half(parsed)
    except Exception as error:  # the converters raise whatever they stumble over
        raise EngineError(f"the network cannot be put into {precision}: {one_line(error)}") from error


def _half(parsed: Any) -> bytes:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        # It warns of every weight that is rounded to zero; the check of the answers judges that.
        warnings.simplefilter("ignore")
        return bytes(convert_float_to_float16(parsed, keep_io_types=True).SerializeToString())


def _integer(parsed: Any, calibration: Inputs, for_cpu: bool) -> bytes:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    batches = _batches(calibration)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as folder, _without_advice():
        out = Path(folder) / "integer.onnx"
        quantize_static(
            parsed,
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if for_cpu else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={}
            if for_cpu
            else {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        return out.read_bytes()


@contextmanager
def _without_advice() -> Iterator[None]:
    """Leave out the advice that the quantiser logs; what comes out is judged by its answers."""

    def serious(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root = logging.getLogger()
    root.addFilter(serious)
    try:
        yield
    finally:
        root.removeFilter(serious)


def _batches(calibration: Inputs) -> Iterator[dict[str, npt.NDArray[Any]]]:
    rows = min(len(values) for values in calibration.values())
    for start in range(0, rows, _CALIBRATION_ROWS):
        yield {
            name: np.ascontiguousarray(values[start : start + _CALIBRATION_ROWS])
            for name, values in calibration.items()
        }
