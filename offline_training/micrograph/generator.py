"""Draw micrographs with a bundle that has a PixelCNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from offline_training.micrograph.export import Coder, unpack_prior
from offline_training.micrograph.labels import Values
from offline_training.micrograph.sampling import CodeSampler
from pipelines.engines.bundle import MODEL, Bundle, BundleError
from pipelines.micrograph.model_bundle import PRIOR

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

WEIGHTS: Final = "prior.weights.npz"
_AT_ONCE: Final = 32


def draw_codes(
    sampler: CodeSampler,
    count: int,
    shape: tuple[int, ...],
    conditions: Values | None,
    rng: np.random.Generator,
    temperature: float = 1.0,
) -> IntArray:
    """Draw maps of codes (n, rows, columns), one for each condition."""
    parts = []
    for i in range(0, count, _AT_ONCE):
        n = min(_AT_ONCE, count - i)
        given = None if conditions is None else torch.from_numpy(np.ascontiguousarray(conditions[i : i + n]))
        parts.append(sampler.sample(n, (shape[0], shape[1]), given, rng, temperature)[0])
    return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Generator:
    """Draws images with a bundle that has a prior.

    Attributes
    ----------
    sampler : CodeSampler
    coder : Coder
    shape : (int, int)
        Rows and columns of a map that it has learned.
    names, classes : tuple of str
        Of the condition.
    least, greatest : tuple of float
        Of the numbers that it was trained on.
    pixel_size_um : float or None
        None where it was not known, or not one.
    """

    sampler: CodeSampler
    coder: Coder
    shape: tuple[int, int]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    least: tuple[float, ...]
    greatest: tuple[float, ...]
    pixel_size_um: float | None

    @classmethod
    def open(cls, bundle: Bundle) -> Generator:
        """Open the networks of a bundle.

        Raises
        ------
        BundleError
            If it has no prior, or that of other codes.
        """
        told = bundle.description.training.get("prior")
        if told is None or PRIOR not in bundle.description.networks or WEIGHTS not in bundle.files:
            raise BundleError(
                f"{bundle.folder}: has no PixelCNN to draw with; make one: grainwatch train pixelcnn"
                f" --vqvae {bundle.folder}"
            )
        coder = Coder(bundle)
        if told["encoder_sha256"] != coder.sha256:
            raise BundleError(
                f"{bundle.folder / MODEL}: is not the encoder whose codes the PixelCNN has learned; make the"
                " bundle again"
            )
        condition = told["condition"]
        rows, columns = bundle.network(PRIOR).description.inputs["codes"]["shape"][1:]
        size = bundle.description.domain.get("pixel_size_um")
        one = size is not None and size[1] <= 1.01 * size[0]
        return cls(
            CodeSampler(unpack_prior(bundle.file(WEIGHTS), str(bundle.path(WEIGHTS)))),
            coder,
            (rows, columns),
            tuple(condition["names"]),
            tuple(condition["classes"]),
            tuple(condition.get("least", ())),
            tuple(condition.get("greatest", ())),
            float(size[0]) if one and size is not None else None,
        )

    def condition_of(self, given: dict[str, str]) -> npt.NDArray[np.float32] | np.int64 | None:
        """Return a condition as the network takes it, of what a command line says, NAME to value.

        Raises
        ------
        ValueError
            If something is missing, unknown, or outside of what was trained on.
        """
        wanted = ", ".join(self.names) or "none"
        if unknown := sorted(set(given) - set(self.names)):
            raise ValueError(f"--condition {unknown[0]}: the bundle has no such condition; it has: {wanted}")
        if missing := [name for name in self.names if name not in given]:
            raise ValueError(f"--condition {missing[0]}=...: is missing; the bundle was trained on {wanted}")
        if not self.names:
            return None
        if self.classes:
            value = given[self.names[0]]
            if value not in self.classes:
                known = ", ".join(self.classes)
                raise ValueError(f"--condition {self.names[0]}={value}: expected one of {known}")
            return np.int64(self.classes.index(value))
        numbers = []
        for name, low, high in zip(self.names, self.least, self.greatest, strict=True):
            try:
                number = float(given[name])
            except ValueError:
                raise ValueError(f"--condition {name}={given[name]}: expected a number") from None
            if not low - 1e-6 * abs(low) <= number <= high + 1e-6 * abs(high):
                raise ValueError(
                    f"--condition {name}={number:g}: outside of {low:g} to {high:g}, which it was trained on"
                )
            numbers.append(number)
        return np.array(numbers, dtype=np.float32)

    def draw(
        self,
        count: int,
        condition: npt.NDArray[Any] | np.int64 | None,
        rng: np.random.Generator,
        temperature: float = 1.0,
    ) -> ByteImage:
        """Draw images (n, side, side) under one condition, or under one each where it has n rows."""
        given = None
        if condition is not None:
            array = np.asarray(condition)
            alike = array.ndim == (0 if self.classes else 1)
            given = np.broadcast_to(array, (count, *array.shape)) if alike else array
        return self.coder.shown(draw_codes(self.sampler, count, self.shape, given, rng, temperature))
