"""Rows of a frame less its background, their response to the filter, and statistics of tiles.

The response of the search is the frame less its background, smoothed by the separable binomial
kernel k = (1, 4, 6, 4, 1)/16, a Gaussian of standard deviation 1 px. A Gaussian filter of width
s_k keeps 2 s_k s/(s_k² + s²) of the signal-to-noise ratio that the matched filter reaches on a
spot of width s: at least 0.8 between 1.2 and 4.6 px full width at half maximum.

"One sigma" is the standard deviation of the response where there is no spot, measured in the
response itself: detectors with a fibre taper or a corrected image have noise that is correlated
between neighbours, and propagating the noise of single pixels would be wrong by a factor.

Nothing here keeps a float copy of the frame: rows pass through small rolling buffers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel

_TAPS = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
KERNEL_2D: npt.NDArray[np.float64] = np.outer(_TAPS, _TAPS)
KERNEL_NORM = float(np.sum(_TAPS**2))
"""sqrt(sum of k²) in two dimensions: response sigma = KERNEL_NORM times pixel sigma for white noise."""

KERNEL_SKEW = float((np.sum(_TAPS**3) / np.sum(_TAPS**2)) ** 2)
"""sum k³ / sum k² in two dimensions; see `poisson_excess`."""

PIXEL_TYPES = ("uint16", "uint32", "int32", "float32", "float64")
"""Each has kernels of its own, whose compilation a first start waits for; others are converted."""
LARGEST = 3.0e38
"""Pixels beyond it count as infinite in float32."""

MASK = "Array(uint8, 2, 'C', readonly=True)"
ROW_ARGUMENTS = f"{MASK}, boolean, float32, float32, float32[:, ::1], float64, float64"
"""Signature of (usable, masked, lowest, largest, nodes, height, width)."""

_NOISE_ROWS = 16  # one response row in so many is sampled for the noise
_FIRST_LOOK = 32  # samples of a tile whose median and MAD start its statistics
_LEAST_SAMPLES = 24
_CLIP = 2.5
_CLIPPED_SIGMA = 0.9545  # standard deviation of a normal distribution cut at 2.5 sigma


def image_signatures(returns: str, rest: str) -> list[str]:
    """Return kernel signatures whose first argument is a C-ordered frame of any pixel type."""
    # Read-only arrays are the general case: decompressors hand out views of immutable bytes.
    return [f"{returns}(Array({t}, 2, 'C', readonly=True), {rest})" for t in PIXEL_TYPES]


def poisson_excess(threshold_sigma: float, gain: float) -> float:
    """Return how much farther than Gaussian the response of Poisson noise reaches, counts.

    First Cornish-Fisher term, (z² − 1)/6 · κ3/κ2, with κ3/κ2 = gain · Σk³/Σk² for a weighted
    sum of Poisson counts: independent of the background. It keeps the false alarm rate at low
    counts at that of z Gaussian sigmas.
    """
    return gain * KERNEL_SKEW * (threshold_sigma**2 - 1.0) / 6.0


@kernel("float32(float32[::1], int64, int64)")
def select(values: Any, n: int, k: int) -> Any:
    """Return the k-th smallest of the first n values (Hoare's selection); reorders them."""
    low, high = 0, n - 1
    while low < high:
        pivot = values[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return values[k]


@kernel(image_signatures("void", f"{MASK}, boolean, float32, float32, float32[:, ::1], int64[::1]"))
def sample_tiles(
    image: Any, usable: Any, masked: bool, lowest: Any, ceiling: Any, samples: Any, counts: Any
) -> None:
    """Collect pixels of each tile: every fourth row, every second column.

    Pixels count when usable, above `lowest` and below `ceiling`; NaN is neither. `samples` is
    (tiles along y * tiles along x, capacity), with the tile grid in `counts` = (n_y, n_x, n...).
    """
    rows, columns = image.shape
    n_y, n_x = counts[0], counts[1]
    capacity = samples.shape[1]
    for i in range(n_y):
        r0, r1 = i * rows // n_y, (i + 1) * rows // n_y
        for j in range(n_x):
            c0, c1 = j * columns // n_x, (j + 1) * columns // n_x
            tile = i * n_x + j
            n = 0
            for r in range(r0, r1, 4):
                for c in range(c0 + ((r >> 2) & 1), c1, 2):
                    v = np.float32(image[r, c])
                    if v > lowest and v < ceiling and n < capacity and not (masked and usable[r, c] == 0):
                        samples[tile, n] = v
                        n += 1
            counts[2 + tile] = n


@kernel("void(float32[::1], float32, float32, float64[::1])", fastmath=True)
def _clipped_sums(values: Any, level: Any, reach: Any, out: Any) -> None:
    """Write sum and sum of squares of v − level, and the number, of values within reach of level."""
    total, square, inside = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for k in range(values.size):
        d = values[k] - level
        w = np.float32(1.0) if abs(d) <= reach else np.float32(0.0)
        total += w * d
        square += w * d * d
        inside += w
    out[0], out[1], out[2] = total, square, inside


@kernel("void(float32[:, ::1], int64[::1], float64, float64[:, ::1])")
def tile_statistics(samples: Any, counts: Any, finest: float, out: Any) -> None:
    """Write level and standard deviation of each tile's samples, (tiles, 2).

    Median and MAD of some of the samples, then mean and standard deviation of all that lie
    within 2.5 sigma, three times: as robust as the median, as precise as the mean, and right
    where counts are so low that the median is zero. `finest` is the smallest sigma to clip
    with. NaN where fewer than 24 samples count.
    """
    part, sums = np.empty(_FIRST_LOOK, np.float32), np.empty(3)
    for tile in range(out.shape[0]):
        n = counts[tile]
        if n < _LEAST_SAMPLES:
            out[tile, 0] = np.nan
            out[tile, 1] = np.nan
            continue
        m = min(n, _FIRST_LOOK)
        for k in range(m):
            part[k] = samples[tile, k * n // m]
        level = float(select(part, m, m >> 1))
        for k in range(m):
            part[k] = abs(part[k] - np.float32(level))
        spread = 1.4826 * float(select(part, m, m >> 1))
        sigma = max(spread, finest)
        for _ in range(3):
            _clipped_sums(samples[tile, :n], np.float32(level), np.float32(_CLIP * sigma), sums)
            if sums[2] < 2.0:
                break
            mean = sums[0] / sums[2]
            spread = np.sqrt(max(sums[1] / sums[2] - mean * mean, 0.0)) / _CLIPPED_SIGMA
            sigma = max(spread, finest)
            level += mean
        out[tile, 0] = level
        out[tile, 1] = spread


@kernel("void(float32[:, ::1], int64, float64, float32[::1])", inline=True)
def node_row_at(nodes: Any, row: int, height: float, out: Any) -> None:
    """Interpolate the nodes at a row."""
    u = (row + 0.5) / height + 0.5
    i = min(int(u), nodes.shape[0] - 2)
    f = np.float32(u - i)
    for k in range(nodes.shape[1]):
        out[k] = nodes[i, k] + f * (nodes[i + 1, k] - nodes[i, k])


@kernel(
    image_signatures(
        "void",
        f"{MASK}, boolean, float32, float32, int64, float32[:, ::1], float64, float64, "
        "float32[::1], float32[::1]",
    ),
    inline=True,
)
def load_line(
    image: Any,
    usable: Any,
    masked: bool,
    lowest: Any,
    largest: Any,
    row: int,
    nodes: Any,
    height: float,
    width: float,
    node_row: Any,
    out: Any,
) -> None:
    """Write a row less its background into out[2:-2]; 0 where a pixel does not count."""
    rows, columns = image.shape
    if row < 0 or row >= rows:
        out[:] = np.float32(0.0)
        return
    node_row_at(nodes, row, height, node_row)
    zero = np.float32(0.0)
    for k in range(node_row.size - 1):
        # Columns whose (c + 0.5)/width + 0.5 lies in [k, k + 1).
        c0 = min(max(int(np.ceil((k - 0.5) * width - 0.5)), 0), columns)
        c1 = min(max(int(np.ceil((k + 0.5) * width - 0.5)), 0), columns)
        step = node_row[k + 1] - node_row[k]
        slope = np.float32(step / width)
        start = np.float32(node_row[k] + ((c0 + 0.5) / width + 0.5 - k) * step)
        # Views without offsets let the compiler see that the loops can be vectorised.
        pixels, line = image[row, c0:c1], out[c0 + 2 : c1 + 2]
        if masked:
            good = usable[row, c0:c1]
            for c in range(pixels.size):
                v = np.float32(pixels[c])
                counts = (v > lowest) & (v < largest) & (good[c] != 0)
                line[c] = v - (start + slope * np.float32(c)) if counts else zero
        else:
            for c in range(pixels.size):
                v = np.float32(pixels[c])
                line[c] = v - (start + slope * np.float32(c)) if (v > lowest) & (v < largest) else zero


@kernel("void(float32[:, ::1], int64, float32[::1], float32[::1])", inline=True)
def respond(lines: Any, row: int, column_sum: Any, out: Any) -> None:
    """Write the response of a row into out[1:-1], from the five lines around it (slot = row % 5)."""
    a, b, c = lines[(row + 3) % 5], lines[(row + 4) % 5], lines[row % 5]
    d, e = lines[(row + 1) % 5], lines[(row + 2) % 5]
    four, six, scale = np.float32(4.0), np.float32(6.0), np.float32(1.0 / 256.0)
    for k in range(column_sum.size):
        column_sum[k] = a[k] + e[k] + four * (b[k] + d[k]) + six * c[k]
    n = out.size - 2
    s0, s1, s2 = column_sum[:n], column_sum[1 : n + 1], column_sum[2 : n + 2]
    s3, s4, line = column_sum[3 : n + 3], column_sum[4 : n + 4], out[1 : n + 1]
    for k in range(n):
        line[k] = scale * (s0[k] + s4[k] + four * (s1[k] + s3[k]) + six * s2[k])


@kernel(image_signatures("void", f"{ROW_ARGUMENTS}, float32[:, ::1], int64[::1]"))
def sample_responses(
    image: Any,
    usable: Any,
    masked: bool,
    lowest: Any,
    largest: Any,
    nodes: Any,
    height: float,
    width: float,
    samples: Any,
    counts: Any,
) -> None:
    """Collect responses of each tile, one row in sixteen, on pixels that count.

    `samples` and `counts` as in `sample_tiles`.
    """
    rows, columns = image.shape
    n_y, n_x = counts[0], counts[1]
    capacity = samples.shape[1]
    lines = np.zeros((5, columns + 4), np.float32)
    column_sum, response = np.empty(columns + 4, np.float32), np.zeros(columns + 2, np.float32)
    node_row = np.empty(nodes.shape[1], np.float32)
    counts[2:] = 0
    for i in range(n_y):
        r0, r1 = i * rows // n_y, (i + 1) * rows // n_y
        for row in range(min(r0 + _NOISE_ROWS // 2, r1 - 1), r1, _NOISE_ROWS):
            for r in range(row - 2, row + 3):
                line = lines[(r + 5) % 5]
                load_line(image, usable, masked, lowest, largest, r, nodes, height, width, node_row, line)
            respond(lines, row, column_sum, response)
            centre = lines[row % 5]
            for j in range(n_x):
                tile = i * n_x + j
                n = counts[2 + tile]
                for c in range(j * columns // n_x, (j + 1) * columns // n_x):
                    if centre[c + 2] != 0.0 and n < capacity:
                        samples[tile, n] = response[c + 1]
                        n += 1
                counts[2 + tile] = n
