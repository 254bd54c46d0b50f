"""Sessions of ONNX Runtime, all with the same options."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, Literal, cast

from pipelines.engines.flavours import EngineError
from pipelines.engines.wording import one_line

CUDA_PROVIDER = "CUDAExecutionProvider"


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime and have it report to nobody: its builds send usage to their maker otherwise.

    What it does on import (an identity of the device, a queue of reports in ~/.cache/Microsoft) only the
    environment can forbid; ``ORT_DISABLE_TELEMETRY=0`` there allows it.

    Raises
    ------
    EngineError
        If it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX Runtime does not load ({error}): pip install 'grainwatch[daemon]'"
        ) from error
    onnxruntime.disable_telemetry_events()
    return cast(ModuleType, onnxruntime)


def has_cuda() -> bool:
    """Whether the ONNX Runtime that is installed was built for GPUs."""
    return CUDA_PROVIDER in import_onnxruntime().get_available_providers()


def open_session(model: bytes, device: Literal["cpu", "cuda"] = "cpu") -> Any:
    """Return an inference session.

    Raises
    ------
    EngineError
        If ONNX Runtime refuses the network, or does not get hold of the device.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    # Workers share the cores: a thread that spins while it waits takes a neighbour's.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4 if device == "cuda" else 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        # Answers that are compared with single precision must be made in it.
        providers.insert(0, (CUDA_PROVIDER, {"use_tf32": "0"}))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime has no common base of its errors
        raise EngineError(f"ONNX Runtime refuses it: {one_line(error)}") from error
    if device == "cuda" and CUDA_PROVIDER not in session.get_providers():
        raise EngineError("ONNX Runtime does not get hold of the GPU (its log says why)")
    # It would go over to the CPU by itself, and nobody would know.
    session.disable_fallback()
    return session
