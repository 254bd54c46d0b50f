"""Which earlier images look like this one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grainwatch.messages import FrameKey, Neighbour

FloatArray = npt.NDArray[np.float32]

REMEMBERED = 10_000
_FIRST = 256


class Neighbours:
    """The fingerprints of the last images, in bounded memory.

    Parameters
    ----------
    count : int
        Neighbours that are returned.
    remembered : int
        Images that are kept; the oldest go first.
    """

    def __init__(self, count: int, remembered: int = REMEMBERED) -> None:
        self._count = count
        self._remembered = remembered
        self._vectors: FloatArray = np.empty((0, 0), dtype=np.float32)
        self._keys: list[FrameKey] = []
        self._seen = 0

    def of(self, key: FrameKey, vector: FloatArray) -> tuple[Neighbour, ...]:
        """Return the images that are nearest to this one, and remember it.

        A vector of another length than those before begins anew; one that is not finite has no neighbours
        and is forgotten. An image that comes again is not its own neighbour.
        """
        if self._count == 0 or not np.isfinite(vector).all():
            return ()
        if self._keys and self._vectors.shape[1] != len(vector):
            self._keys, self._seen = [], 0
        found = self._nearest(key, vector) if self._keys else ()
        self._keep(key, vector)
        return found

    def _nearest(self, key: FrameKey, vector: FloatArray) -> tuple[Neighbour, ...]:
        off = self._vectors[: len(self._keys)] - vector
        square = np.einsum("nk,nk->n", off, off)
        # One more, because the image itself may be among them.
        some = min(self._count + 1, len(square))
        near = np.argpartition(square, some - 1)[:some]
        near = near[np.argsort(square[near], kind="stable")]
        found = [Neighbour(self._keys[n], float(np.sqrt(square[n]))) for n in near if self._keys[n] != key]
        return tuple(found[: self._count])

    def _keep(self, key: FrameKey, vector: FloatArray) -> None:
        place = self._seen % self._remembered
        self._seen += 1
        if place == len(self._keys):
            self._keys.append(key)
            if place >= len(self._vectors) or place == 0:
                self._grow(len(vector), place)
        else:
            self._keys[place] = key
        self._vectors[place] = vector

    def _grow(self, width: int, used: int) -> None:
        rows = min(max(_FIRST, 2 * used), self._remembered)
        larger = np.empty((rows, width), dtype=np.float32)
        larger[:used] = self._vectors[:used] if used else 0.0
        self._vectors = larger
