"""A pipeline whose results say which models answered, and models that answer by their version."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from grainwatch.config import Table
from grainwatch.messages import AnyMessage, ArrayData, LaueResult, ModelInfo, Provenance
from pipelines.engines.bundle import SCHEMA, Description, load_bundle, write_bundle
from pipelines.engines.choice import open_engine
from pipelines.engines.engine import Engine
from pipelines.engines.shipped import find_bundle
from pipelines.frame import Failure, Frame, ModelRef, StreamContext


class Config(Table, frozen=True, kw_only=True):
    bundle: tuple[str, ...] = ()
    sleep_s: float = 0.0


class ModelPipeline:
    """Asks each of its networks for the sum of its version and 100; the flags are the answers."""

    def __init__(self, config: Config, context: StreamContext) -> None:
        self.config = config
        self.config_hash = context.config_hash
        self.engines_: list[Engine] = []
        self.behaviour: list[dict[str, Any]] = []
        models: list[ModelInfo] = []
        for name in config.bundle:
            ref = context.models.get(name) or ModelRef(str(find_bundle(name)))
            bundle = load_bundle(Path(ref.folder))
            if ref.sha256 and bundle.sha256 != ref.sha256:
                raise ValueError(f"{ref.folder}: is another bundle than the daemon took")
            self.engines_.append(open_engine(bundle, context.engines))
            self.behaviour.append(bundle.description.preparation)
            time.sleep(self.behaviour[-1].get("warm_s", 0.0))
            models.append(bundle.model)
        joined = "+".join(m.sha256 for m in models)
        self.model = ModelInfo("+".join(m.name for m in models), "+".join(m.version for m in models), joined)
        self.seen = 0

    def engines(self) -> list[str]:
        versions = self.model.version.split("+")
        return [f"{version}: {e.about}" for version, e in zip(versions, self.engines_, strict=True)]

    def warm(self) -> None:
        pass

    def process(self, frames: Sequence[Frame]) -> list[AnyMessage | Failure]:
        return [self.one(frame) for frame in frames]

    def one(self, frame: Frame) -> AnyMessage | Failure:
        answers = []
        self.seen += 1
        time.sleep(self.config.sleep_s)
        for engine, behaviour in zip(self.engines_, self.behaviour, strict=True):
            (answer,) = engine.run({"x": np.full((1, 1), 100, np.float32)}).values()
            answers.append(f"{answer[0, 0]:g}")
            if 0 < behaviour.get("raise_from", 0) <= self.seen:
                raise RuntimeError("this model raises")
            time.sleep(behaviour.get("sleep_s", 0.0))
        return LaueResult(
            key=frame.key,
            provenance=Provenance(self.model, config_hash=self.config_hash),
            n_peaks=0,
            peaks=ArrayData.of(np.zeros((0, 4)), "<f4"),
            flags=tuple(answers),
        )


def build(config: Config, context: StreamContext) -> ModelPipeline:
    return ModelPipeline(config, context)


def make_bundle(folder: Path, name: str, version: int, off: float = 0.0, **behaviour: Any) -> str:
    """Write a bundle whose network adds `version` to its input; return its sha256.

    `off` is how far its self-test is wrong. Behaviours: `raise_from` (number of a worker's frame), `sleep_s`,
    `warm_s` (how long it takes to get ready).
    """
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "version"], ["y"])],
        "adds",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor("version", TensorProto.FLOAT, [1], [float(version)])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    x = np.arange(4, dtype=np.float32)[:, None]
    test = io.BytesIO()
    np.savez(test, input=x, output=x + version + off)
    description = Description(
        schema=SCHEMA,
        kind="test",
        name=name,
        version=str(version),
        about="Adds its version.",
        inputs={"x": {"type": "float32", "shape": ["batch", 1]}},
        outputs={"y": {"type": "float32", "shape": ["batch", 1]}},
        preparation=behaviour,
        domain={},
        decision={},
        training={},
        metrics={},
        tolerances={"self_test": 1e-4},
        git_revision="",
        command="",
    )
    write_bundle(
        folder, description, {"model.onnx": model.SerializeToString(), "selftest.npz": test.getvalue()}
    )
    return hashlib.sha256((folder / "manifest.sha256").read_bytes()).hexdigest()
