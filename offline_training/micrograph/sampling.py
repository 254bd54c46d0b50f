"""Draw maps of codes from a PixelCNN, one code after another, without computing anything twice.

A plain sampler runs the whole network once for each code. Here the upper stack advances by rows and the
left one by codes, and each layer keeps the last few rows and codes that it still needs: the work of one
pass for the whole map, in NumPy, whose calls cost less than torch's for so few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offline_training.micrograph.pixelcnn import GatedLayer, PixelCnn

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Weights:
    """Of one layer, input first. What is passed to the sigmoid is halved: σ(b) = (1 + tanh(b/2))/2."""

    side: int
    vertical: FloatArray  # (rows · columns · width, 2 width)
    horizontal: FloatArray  # (columns · width, 2 width)
    across: FloatArray
    out: FloatArray
    above_bias: FloatArray  # (n, 1, 2 width), the condition included
    left_bias: FloatArray
    out_bias: FloatArray


class CodeSampler:
    """Draws from a trained network; later changes of the network are not seen."""

    def __init__(self, network: PixelCnn) -> None:
        """Take the weights."""
        self._network = network.float().eval()
        self.codes = network.sizes.codes
        self._embedding = _numpy(network.embedding.weight)
        first, last = network.head[0], network.head[2]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(last, nn.Conv2d)
        self._head = (*_flat(first), *_flat(last))

    def sample(
        self,
        n: int,
        shape: tuple[int, int],
        condition: torch.Tensor | None,
        rng: np.random.Generator,
        temperature: float = 1.0,
    ) -> tuple[IntArray, npt.NDArray[np.float64]]:
        """Draw maps.

        Parameters
        ----------
        n : int
        shape : (int, int)
            Rows and columns of a map.
        condition : (n, scalars) float or (n,) int64 tensor, or None
            As `PixelCnn.forward` takes it.
        rng : numpy.random.Generator
        temperature : float
            What logits are divided by; 1 draws from the distribution that was learned.

        Returns
        -------
        codes : (n, rows, columns) int64
        log_likelihood : (n,) float64
            In nats, at that temperature.
        """
        rows, columns = shape
        if n < 1 or rows < 1 or columns < 1:
            raise ValueError(f"{n} maps of {rows} x {columns}: expected 1 or more of each")
        if not 0.0 < temperature < np.inf:
            raise ValueError(f"temperature {temperature:g}: expected a number greater than 0")
        layers = self._layers(condition, n)
        width = self._embedding.shape[1]
        # Each layer's view of the rows above, zeros where there are none: (n, rows, columns + edges, width).
        above = [
            np.zeros(
                (n, len(w.vertical) // (2 * w.side + 1) // width, columns + 2 * w.side, width), np.float32
            )
            for w in layers
        ]
        codes = np.zeros((n, rows, columns), dtype=np.int64)
        log_likelihood = np.zeros(n)
        everyone = np.arange(n)
        for row in range(rows):
            sums = self._advance(layers, above, columns)
            # Codes to the left: what each layer puts in, with zeros before the first column.
            left = [np.zeros((n, columns + w.side, width), np.float32) for w in layers]
            for column in range(columns):
                log_p = self._log_p(layers, left, sums, column) / temperature
                log_p -= log_p.max(1, keepdims=True)
                cumulated = np.cumsum(np.exp(log_p, dtype=np.float64), axis=1)
                drawn = rng.random(n) * cumulated[:, -1]
                code = np.minimum((cumulated <= drawn[:, None]).sum(1), self.codes - 1)
                codes[:, row, column] = code
                log_likelihood += log_p[everyone, code] - np.log(cumulated[:, -1])
                left[0][:, column + layers[0].side] = self._embedding[code]
            above[0][:, :-1] = above[0][:, 1:]
            above[0][:, -1, layers[0].side : layers[0].side + columns] = left[0][:, layers[0].side :]
        return codes, log_likelihood

    def _advance(self, layers: list[_Weights], above: list[FloatArray], columns: int) -> list[FloatArray]:
        # One row of the upper stack through all layers; returned is what it gives to the left stack,
        # (n, columns, 2 width) a layer.
        sums: list[FloatArray] = []
        for i, w in enumerate(layers):
            n, tall = above[i].shape[:2]
            windows = np.lib.stride_tricks.sliding_window_view(above[i], (tall, 2 * w.side + 1), (1, 2))
            inputs = np.moveaxis(windows[:, 0], 2, -1).reshape(n * columns, -1)
            seen: FloatArray = (inputs @ w.vertical).reshape(n, columns, -1)
            given: FloatArray = seen @ w.across + w.left_bias
            sums.append(given)
            if i + 1 < len(layers):
                below, side = above[i + 1], layers[i + 1].side
                below[:, :-1] = below[:, 1:]
                below[:, -1, side : side + columns] = _gate(seen + w.above_bias)
        return sums

    def _log_p(
        self, layers: list[_Weights], left: list[FloatArray], sums: list[FloatArray], column: int
    ) -> FloatArray:
        n = len(left[0])
        h = np.zeros(0, np.float32)
        for i, w in enumerate(layers):
            if i:
                left[i][:, column + w.side] = h
                window = left[i][:, column : column + w.side + 1]
            else:
                window = left[0][:, column : column + w.side]
            onward = _gate(window.reshape(n, -1) @ w.horizontal + sums[i][:, column]) @ w.out + w.out_bias
            h = h + onward if i else onward
        a, a_bias, b, b_bias = self._head
        return np.maximum(h @ a + a_bias, 0.0) @ b + b_bias

    def _layers(self, condition: torch.Tensor | None, n: int) -> list[_Weights]:
        with torch.no_grad():
            given = self._network.condition_of(condition, n)
            made = []
            for layer in self._network.layers:
                assert isinstance(layer, GatedLayer)
                bias = np.zeros((1, 2 * layer.out.in_channels), np.float32)
                if layer.condition is not None:
                    bias = _numpy(layer.condition(given))
                made.append(_weights(layer, bias))
        return made


def _weights(layer: GatedLayer, condition: FloatArray) -> _Weights:
    vertical, vertical_bias = _flat(layer.vertical)
    horizontal, horizontal_bias = _flat(layer.horizontal)
    across, across_bias = _flat(layer.across)
    out, out_bias = _flat(layer.out)
    half = np.ones(across.shape[1], np.float32)
    half[len(half) // 2 :] = 0.5
    # `across` takes what the vertical stack has, bias but no condition, before anything is halved.
    left_bias = (vertical_bias @ across + across_bias + horizontal_bias + condition) * half
    return _Weights(
        side=layer.side,
        vertical=vertical * half,
        horizontal=horizontal * half,
        across=across / half[:, None] * half,
        out=out,
        above_bias=((vertical_bias + condition) * half)[:, None],
        left_bias=left_bias[:, None],
        out_bias=out_bias,
    )


def _gate(x: FloatArray) -> FloatArray:
    bent = np.tanh(x)
    width = x.shape[-1] // 2
    opened: FloatArray = bent[..., :width] * (np.float32(0.5) + np.float32(0.5) * bent[..., width:])
    return opened


def _flat(layer: nn.Conv2d) -> tuple[FloatArray, FloatArray]:
    # Weights (rows · columns · inputs, outputs) and biases (outputs,).
    assert layer.bias is not None
    weight = _numpy(layer.weight).transpose(2, 3, 1, 0)
    return np.ascontiguousarray(weight.reshape(-1, weight.shape[-1])), _numpy(layer.bias)


def _numpy(tensor: torch.Tensor) -> FloatArray:
    return tensor.detach().cpu().float().numpy()
