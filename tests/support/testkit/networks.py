"""Small networks of the kinds that bundles hold, as ONNX, made without a training library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper

OPSET = 20


class Graph:
    """Collects nodes and weights; every weight is small and random."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self._rng = np.random.default_rng(seed)
        self._count = 0

    def weight(self, *shape: int) -> str:
        fan_in = max(1, int(np.prod(shape[1:])))
        return self.constant((self._rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32))

    def constant(self, value: np.ndarray) -> str:
        self._count += 1
        name = f"w{self._count}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: object) -> str:
        self._count += 1
        out = f"{kind}{self._count}"
        self.nodes.append(
            helper.make_node(kind, list(inputs), [out], name=f"node{self._count}", **attributes)
        )
        return out

    def model(
        self,
        inputs: dict[str, tuple[int, Sequence[int | str]]],
        outputs: dict[str, tuple[str, int, Sequence[int | str]]],
    ) -> bytes:
        """`inputs`: name to (type, shape); `outputs`: name to (inner name, type, shape)."""
        for name, (inner, _, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [inner], [name]))
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info(n, t, list(s)) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info(n, t, list(s)) for n, (_, t, s) in outputs.items()],
            self.weights,
        )
        made: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        made.ir_version = 10
        checker.check_model(made, full_check=True)
        return made.SerializeToString()


def _convolution(g: Graph, x: str, channels: tuple[int, int], dimensions: int, stride: int) -> str:
    kernel = [3] * dimensions
    out = g.add(
        "Conv",
        x,
        g.weight(channels[1], channels[0], *kernel),
        g.weight(channels[1]),
        kernel_shape=kernel,
        pads=[1] * (2 * dimensions),
        strides=[stride] * dimensions,
    )
    return g.add("Relu", out)


def vae() -> bytes:
    """An encoder of 128 x 128 micrographs to a mean of 32 numbers."""
    g = Graph()
    x = "image"
    for before, after in ((1, 8), (8, 16), (16, 32)):
        x = _convolution(g, x, (before, after), 2, 2)
    x = g.add("ReduceMean", x, g.constant(np.array([2, 3], np.int64)), keepdims=0)
    mean = g.add("Gemm", x, g.weight(32, 32), g.weight(32))
    return g.model(
        {"image": (TensorProto.FLOAT, ["batch", 1, 128, 128])},
        {"mean": (mean, TensorProto.FLOAT, ["batch", 32])},
    )


def vq_encoder() -> bytes:
    """An encoder to a 16 x 16 map of the nearest of 64 codes."""
    g = Graph(1)
    x = "image"
    for before, after in ((1, 8), (8, 16), (16, 16)):
        x = _convolution(g, x, (before, after), 2, 2)
    flat = g.add("Transpose", x, perm=[0, 2, 3, 1])
    codes = np.random.default_rng(2).standard_normal((16, 64)).astype(np.float32)
    # |x - c|^2 without |x|^2, which is the same for all codes.
    inner = g.add("MatMul", flat, g.constant(codes))
    distance = g.add("Sub", g.constant((codes**2).sum(axis=0, keepdims=True)), g.add("Add", inner, inner))
    code = g.add("Cast", g.add("ArgMin", distance, axis=-1, keepdims=0), to=TensorProto.INT32)
    return g.model(
        {"image": (TensorProto.FLOAT, ["batch", 1, 128, 128])},
        {"codes": (code, TensorProto.INT32, ["batch", 16, 16])},
    )


def pixelcnn() -> bytes:
    """A gated block over a map of codes: embedding, convolution, tanh times sigmoid, log-softmax."""
    g = Graph(3)
    x = g.add("Gather", g.weight(64, 16), "codes", axis=0)
    x = g.add("Transpose", x, perm=[0, 3, 1, 2])
    gates = [
        g.add(
            kind,
            g.add("Conv", x, g.weight(16, 16, 3, 3), g.weight(16), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        )
        for kind in ("Tanh", "Sigmoid")
    ]
    x = g.add("Mul", *gates)
    x = g.add("Conv", x, g.weight(64, 16, 1, 1), g.weight(64), kernel_shape=[1, 1])
    logs = g.add("LogSoftmax", x, axis=1)
    return g.model(
        {"codes": (TensorProto.INT32, ["batch", 16, 16])},
        {"log_probability": (logs, TensorProto.FLOAT, ["batch", 64, 16, 16])},
    )


def vae_3d() -> bytes:
    """An encoder of volumes of 32 x 32 x 32 voxels with three channels."""
    g = Graph(4)
    x = "volume"
    for before, after in ((3, 8), (8, 16), (16, 32)):
        x = _convolution(g, x, (before, after), 3, 2)
    x = g.add("ReduceMean", x, g.constant(np.array([2, 3, 4], np.int64)), keepdims=0)
    mean = g.add("Gemm", x, g.weight(32, 16), g.weight(16))
    return g.model(
        {"volume": (TensorProto.FLOAT, ["batch", 3, 32, 32, 32])},
        {"mean": (mean, TensorProto.FLOAT, ["batch", 16])},
    )


def surrogate() -> bytes:
    """From 64 latent numbers to 40 points of a stress curve."""
    g = Graph(5)
    x = g.add("Relu", g.add("Gemm", "latent", g.weight(64, 256), g.weight(256)))
    stress = g.add("Gemm", x, g.weight(256, 40), g.weight(40))
    return g.model(
        {"latent": (TensorProto.FLOAT, ["batch", 64])},
        {"stress_MPa": (stress, TensorProto.FLOAT, ["batch", 40])},
    )


def unknown_operator() -> bytes:
    """A network that TensorRT does not know how to run: it takes determinants."""
    g = Graph(6)
    return g.model(
        {"matrix": (TensorProto.FLOAT, ["batch", 3, 3])},
        {"determinant": (g.add("Det", "matrix"), TensorProto.FLOAT, ["batch"])},
    )


STAND_INS = {
    "VAE": vae,
    "VQ encoder": vq_encoder,
    "PixelCNN": pixelcnn,
    "3-D VAE": vae_3d,
    "surrogate": surrogate,
}
