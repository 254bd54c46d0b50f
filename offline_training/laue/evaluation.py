"""Probabilities of a trained network, calibrated on spots that training never used."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offline_training.laue.networks import reject_only

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


def logits_of(network: nn.Module, features: npt.NDArray[np.float32], batch: int = 2048) -> torch.Tensor:
    """Return logits (n, classes), float32."""
    with torch.no_grad():
        parts = [network(torch.from_numpy(features[i : i + batch])) for i in range(0, len(features), batch)]
    return torch.cat(parts).float()


def fit_calibration(logits: torch.Tensor, labels: IntArray) -> tuple[float, float]:
    """Return the temperature, and the shift of the reject class, that make the labels most likely.

    Temperature scaling (Guo et al., ICML 2017); one temperature alone cannot mend that a network
    takes too many or too few spots for spurious, so the reject class has a shift of its own.
    """
    y = torch.from_numpy(labels.astype(np.int64))
    parameters = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], lr=0.5, max_iter=60)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        scaled = logits / parameters[0].exp() + parameters[1] * reject_only(logits.shape[1])
        loss = nn.functional.cross_entropy(scaled, y)
        loss.backward()
        return loss

    optimiser.step(closure)
    log_temperature, shift = parameters.detach().tolist()
    return math.exp(log_temperature), shift


def probabilities_of(logits: torch.Tensor, temperature: float, shift: float) -> FloatArray:
    """Return calibrated probabilities (n, classes)."""
    scaled = logits / temperature + shift * reject_only(logits.shape[1])
    return np.asarray(torch.softmax(scaled, dim=1).numpy(), dtype=np.float64)
