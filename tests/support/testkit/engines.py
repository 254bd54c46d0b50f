"""Bundles of small networks of any kind, and engines that break down."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.engines.bundle import MODEL, SCHEMA, SELF_TEST, Bundle, Description, load_bundle, write_bundle
from pipelines.engines.engine import Arrays, Engine, EngineFailure, EngineInfo
from pipelines.engines.onnxruntime_session import import_onnxruntime
from pipelines.engines.tensors import Tensor

Described = Mapping[str, tuple[str, list[int | str]]]


def bundle_of(
    folder: Path,
    model: bytes,
    inputs: Described,
    outputs: Described,
    given: Mapping[str, npt.NDArray[Any]],
    tolerance: float = 1e-4,
    **more: Any,
) -> Bundle:
    """Write a bundle whose self-test holds what ONNX Runtime answers to `given`; return it as it is read."""
    session = import_onnxruntime().InferenceSession(model, providers=["CPUExecutionProvider"])
    answers = dict(zip(outputs, session.run(list(outputs), dict(given)), strict=True))
    stored = io.BytesIO()
    np.savez(stored, **given, **answers)  # type: ignore[arg-type]
    description = Description(
        schema=SCHEMA,
        kind="stand-in",
        name="stand-in",
        version="1",
        about="A network for tests",
        inputs={name: {"type": kind, "shape": shape} for name, (kind, shape) in inputs.items()},
        outputs={name: {"type": kind, "shape": shape} for name, (kind, shape) in outputs.items()},
        preparation={},
        domain={},
        decision={},
        training={},
        metrics={},
        tolerances={"self_test": tolerance},
        git_revision="",
        command="",
        **more,
    )
    write_bundle(folder, description, {MODEL: model, SELF_TEST: stored.getvalue()})
    return load_bundle(folder)


class BreakingEngine:
    """Answers as another engine does for a while, then breaks down."""

    def __init__(self, sound: Engine, runs: int, words: str) -> None:
        self._sound, self._left, self._words = sound, runs, words
        self.about = EngineInfo("tensorrt", "fp32", "a card", "0")
        self.inputs: Mapping[str, Tensor] = sound.inputs
        self.outputs: Mapping[str, Tensor] = sound.outputs

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        if self._left == 0:
            raise EngineFailure(self._words)
        self._left -= 1
        return self._sound.run(inputs)
