"""Gated PixelCNN: how likely a map of codes is under a process condition.

A map is read row by row, and each code gets a distribution given all earlier ones and the condition
(van den Oord et al., Conditional image generation with PixelCNN decoders, NeurIPS 2016). Two stacks of
convolutions see to that without a blind spot: one sees the rows above, to both sides; the other the codes
to the left and, at each layer, what the first has seen. Kernels are as large as what they may see, so that
there is nothing to mask. Sizes are those of Noguchi & Inoue's published program (15 layers of 64).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class PixelSizes:
    """Of a PixelCNN; the defaults are those of Noguchi & Inoue.

    Attributes
    ----------
    codes : int
        Of the codebook.
    width : int
        Channels of each stack.
    layers : int
    first_kernel, kernel : int
        Sides of the squares that the first layer and the others would see of a whole neighbourhood; odd.
    head : int
        Channels before the last layer.
    scalars : int
        Numbers that a condition consists of; 0 without condition or for classes.
    classes : int
        Classes that a condition is one of; 0 without condition or for numbers.
    """

    codes: int = 512
    width: int = 64
    layers: int = 15
    first_kernel: int = 7
    kernel: int = 3
    head: int = 512
    scalars: int = 1
    classes: int = 0

    def __post_init__(self) -> None:
        if self.codes < 2 or min(self.width, self.layers, self.head) < 1:
            raise ValueError(f"{self}: expected 2 codes or more and widths of 1 or more")
        for kernel in (self.first_kernel, self.kernel):
            if kernel < 3 or kernel % 2 == 0:
                raise ValueError(f"kernel {kernel}: expected an odd number of 3 or more")
        if self.scalars < 0 or self.classes < 0 or (self.scalars and self.classes):
            raise ValueError("condition: expected scalars or classes, not both")

    @property
    def reach(self) -> int:
        """Codes that one sees above, and to either side."""
        return self.first_kernel // 2 + (self.layers - 1) * (self.kernel // 2)


class GatedLayer(nn.Module):
    """One layer of both stacks.

    The condition adds the same to all places, once for each stack, before the gate: tanh(a) σ(b).
    """

    def __init__(self, sizes: PixelSizes, *, first: bool) -> None:
        """Begin with random weights; the first layer does not see the code that it speaks about."""
        super().__init__()
        width = sizes.width
        self.first = first
        self.side = (sizes.first_kernel if first else sizes.kernel) // 2
        long = self.side if first else self.side + 1
        self.vertical = nn.Conv2d(width, 2 * width, (long, 2 * self.side + 1))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, long))
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        self.condition: nn.Module | None = None
        if sizes.scalars:
            self.condition = nn.Linear(sizes.scalars, 2 * width)
        elif sizes.classes:
            self.condition = nn.Embedding(sizes.classes, 2 * width)

    def forward(
        self, v: torch.Tensor, h: torch.Tensor, condition: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both stacks, (n, width, rows, columns) each."""
        rows, columns = v.shape[-2:]
        pad = nn.functional.pad
        # In the first layer the kernel ends before the place that it speaks about: one row, one column more
        # comes out than there are places.
        above = self.vertical(pad(v, (self.side, self.side, self.side, 0)))[:, :, :rows]
        left = self.horizontal(pad(h, (self.side, 0)))[..., :columns] + self.across(above)
        if self.condition is not None:
            bias = self.condition(condition)[:, :, None, None]
            above, left = above + bias, left + bias
        onward = self.out(_gate(left))
        return _gate(above), onward if self.first else h + onward


def _gate(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class PixelCnn(nn.Module):
    """Distributions of codes, given the earlier ones and a condition."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, sizes: PixelSizes | None = None) -> None:
        super().__init__()
        self.sizes = sizes or PixelSizes()
        s = self.sizes
        self.embedding = nn.Embedding(s.codes, s.width)
        self.layers = nn.ModuleList(GatedLayer(s, first=i == 0) for i in range(s.layers))
        self.head = nn.Sequential(nn.Conv2d(s.width, s.head, 1), nn.ReLU(), nn.Conv2d(s.head, s.codes, 1))
        self.register_buffer("mean", torch.zeros(s.scalars))
        self.register_buffer("scale", torch.ones(s.scalars))

    def standardise(self, conditions: torch.Tensor) -> None:
        """Take the mean and the spread of conditions (m, scalars) as 0 and 1 from now on.

        Raises
        ------
        ValueError
            If conditions are no numbers, or not of the shape that the network was made for.
        """
        self._check(conditions, len(conditions))
        if not self.sizes.scalars:
            raise ValueError("standardise: this network has no conditions that are numbers")
        spread = conditions.float().std(0, correction=0)
        self.mean.copy_(conditions.float().mean(0))
        # One condition only is none: it stays 0.
        self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Return (n, width, rows, columns) of codes (n, rows, columns)."""
        return self.embedding(codes).movedim(-1, 1)

    def condition_of(self, condition: torch.Tensor | None, n: int) -> torch.Tensor | None:
        """Return a condition as the layers take it.

        Raises
        ------
        ValueError
            If it is not what the network was made for.
        """
        self._check(condition, n)
        if condition is None or self.sizes.classes:
            return condition
        return (condition.float() - self.mean) / self.scale

    def logits_of(self, embedded: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (n, codes, rows, columns) of what `embed` gives."""
        return self.stacks(embedded, self.condition_of(condition, len(embedded)))

    def stacks(self, embedded: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        """Return logits as `logits_of` does, of a condition as `condition_of` gives it."""
        v = h = embedded
        for layer in self.layers:
            v, h = layer(v, h, given)
        out: torch.Tensor = self.head(h)
        return out

    def forward(self, codes: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (n, codes, rows, columns), each given the earlier codes.

        Parameters
        ----------
        codes : (n, rows, columns) int64 tensor
            Of any shape.
        condition : (n, scalars) float or (n,) int64 tensor, optional
            Numbers as they are, or classes.
        """
        return self.logits_of(self.embed(codes), condition)

    def log_likelihood(self, codes: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-likelihood of each map in nats, (n,) float32."""
        return _log_likelihood(self(codes, condition), codes)

    def bits_per_code(self, codes: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return what each map costs, in bits for each code, (n,) float32."""
        return -self.log_likelihood(codes, condition) / (math.log(2.0) * codes[0].numel())

    def _check(self, condition: torch.Tensor | None, n: int) -> None:
        s = self.sizes
        wanted = (n, s.scalars) if s.scalars else (n,) if s.classes else None
        given = None if condition is None else tuple(condition.shape)
        if given != wanted:
            raise ValueError(f"condition: expected shape {wanted}, got {given}")
        if condition is None:
            return
        if s.classes and (
            condition.is_floating_point() or not 0 <= int(condition.min()) <= int(condition.max()) < s.classes
        ):
            raise ValueError(f"condition: expected classes from 0 to {s.classes - 1}")
        if not bool(torch.isfinite(condition).all()):
            raise ValueError("condition: expected numbers")


class LikelihoodReader(nn.Module):
    """What a bundle exports: maps of codes and candidate conditions in, log-likelihoods out.

    Nothing is checked here: an exported network cannot ask what its inputs are.
    """

    def __init__(self, network: PixelCnn) -> None:
        super().__init__()
        self.network = network

    def forward(self, codes: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return log-likelihoods in nats, (n,), of codes (n, rows, columns) int32 under one condition each.

        Conditions are (n, scalars) float32 as they are, or classes (n,) int64.
        """
        network = self.network
        given = condition
        if condition is not None and network.sizes.scalars:
            given = (condition - network.mean) / network.scale
        whole = codes.long()
        return _log_likelihood(network.stacks(network.embed(whole), given), whole)


def _log_likelihood(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(logits.float(), 1)
    return torch.gather(log_p, 1, codes[:, None]).sum((1, 2, 3))
