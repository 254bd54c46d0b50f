"""Crops of images, drawn at random and the same for the same seed and step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offline_training.micrograph.splits import GroupedFolds

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CropDraw:
    """Images to train on.

    Attributes
    ----------
    images : tuple of (rows, columns) uint8 arrays
        Of any sizes from `side_px` on.
    side_px : int
        Of a crop.
    seed : int
    turned : bool
        Whether crops are mirrored, and turned by 90 degrees. Not where a direction means something: rolled
        sheets, streaks of charge.

    Raises
    ------
    ValueError
        If there are no images, or one is smaller than a crop.
    """

    images: tuple[ByteImage, ...]
    side_px: int = 128
    seed: int = 0
    turned: bool = True

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("no images to train on")
        for number, image in enumerate(self.images):
            if image.ndim != 2 or image.dtype != np.uint8 or min(image.shape) < self.side_px:
                raise ValueError(
                    f"image {number}: {image.dtype} of shape {image.shape}; expected uint8 of at least"
                    f" {self.side_px} x {self.side_px} px"
                )

    def batch(self, step: int, count: int) -> tuple[ByteImage, IntArray]:
        """Return crops (count, side, side) of a step and the numbers of their images (count,)."""
        rng = np.random.default_rng((self.seed, step))
        chosen = rng.integers(0, len(self.images), count)
        place, turn = rng.random((count, 2)), rng.integers(0, 8, count)
        crops = np.empty((count, self.side_px, self.side_px), dtype=np.uint8)
        for i, number in enumerate(chosen):
            image = self.images[number]
            top, left = (int(u * (n - self.side_px + 1)) for u, n in zip(place[i], image.shape, strict=True))
            crop = image[top : top + self.side_px, left : left + self.side_px]
            if self.turned:
                crop = crop[:: 1 - 2 * (turn[i] & 1), :: 1 - (turn[i] & 2)]
                crop = crop.T if turn[i] & 4 else crop
            crops[i] = crop
        return crops, chosen

    @property
    def variance(self) -> float:
        """Of the pixels within an image, mean of all images; greys from −1 to 1."""
        return float(np.mean([image.var(dtype=np.float64) for image in self.images])) / 127.5**2

    @property
    def fingerprint(self) -> str:
        """Sha256 of the images and of how crops are drawn."""
        digest = hashlib.sha256(repr((self.side_px, self.seed, self.turned)).encode())
        for image in self.images:
            digest.update(repr(image.shape).encode())
            digest.update(np.ascontiguousarray(image).tobytes())
        return digest.hexdigest()


def side_by_side(images: Sequence[ByteImage], side_px: int = 128) -> tuple[ByteImage, IntArray]:
    """Return all patches that fit side by side, (n, side, side), and the numbers of their images, (n,)."""
    patches, numbers = [], []
    for number, image in enumerate(images):
        down, across = (n // side_px for n in image.shape)
        cut = image[: down * side_px, : across * side_px].reshape(down, side_px, across, side_px)
        patches.append(cut.swapaxes(1, 2).reshape(-1, side_px, side_px))
        numbers.append(np.full(down * across, number))
    if not patches:
        raise ValueError("no images to cut patches from")
    return np.concatenate(patches), np.concatenate(numbers).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Fold:
    """What is trained on and what is held out; no source is in both.

    Attributes
    ----------
    crops : CropDraw
        Of the images that are trained on.
    trained_on : (m,) int64
        Their numbers among all images, in the order of `crops.images`.
    patches : (n, side, side) uint8
        Of the held-out images, side by side.
    image_of : (n,) int64
        The number of each patch's image among all images.
    """

    crops: CropDraw
    trained_on: IntArray
    patches: ByteImage
    image_of: IntArray


def fold_of(
    images: Sequence[ByteImage],
    split: GroupedFolds,
    fold: int,
    side_px: int = 128,
    seed: int = 0,
    turned: bool = True,
) -> Fold:
    """Part images as a split says, one item of the split an image.

    Raises
    ------
    ValueError
        If the split is of another number of images, or an image is too small.
    """
    if len(images) != len(split.sources):
        raise ValueError(
            f"images: expected {len(split.sources)}, one an item of the split, got {len(images)}"
        )
    inside, outside = split.trained_on(fold), split.held_out(fold)
    crops = CropDraw(tuple(images[i] for i in inside), side_px, seed, turned)
    patches, of = side_by_side([images[i] for i in outside], side_px)
    return Fold(crops, inside, patches, outside[of])
