"""Where a frame rises above its background: tiles, matched filter, local maxima.

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

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel

FloatArray = npt.NDArray[np.float64]

_TAPS = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
KERNEL_2D: FloatArray = np.outer(_TAPS, _TAPS)
KERNEL_NORM = float(np.sum(_TAPS**2))
"""sqrt(sum of k²) in two dimensions: response sigma = KERNEL_NORM times pixel sigma for white noise."""

KERNEL_SKEW = float((np.sum(_TAPS**3) / np.sum(_TAPS**2)) ** 2)
"""sum k³ / sum k² in two dimensions; see `poisson_excess`."""

PIXEL_TYPES = ("uint8", "uint16", "uint32", "int16", "int32", "float32", "float64")
_NOISE_ROWS = 8  # one response row in so many is sampled for the noise
LARGEST = 3.0e38
"""Pixels beyond it count as infinite in float32."""


def image_signatures(returns: str, rest: str) -> list[str]:
    """Return kernel signatures whose first argument is a C-ordered frame of any pixel type."""
    # Read-only arrays are the general case: decompressors hand out views of immutable bytes.
    return [f"{returns}(Array({t}, 2, 'C', readonly=True), {rest})" for t in PIXEL_TYPES]


_MASK = "Array(uint8, 2, 'C', readonly=True)"


def poisson_excess(threshold_sigma: float, gain: float) -> float:
    """Return how much farther than Gaussian the response of Poisson noise reaches, counts.

    First Cornish-Fisher term, (z² − 1)/6 · κ3/κ2, with κ3/κ2 = gain · Σk³/Σk² for a weighted
    sum of Poisson counts: independent of the background. It keeps the false alarm rate at low
    counts at that of z Gaussian sigmas.
    """
    return gain * KERNEL_SKEW * (threshold_sigma**2 - 1.0) / 6.0


class Grid(NamedTuple):
    """Tiles of equal (fractional) size: their number and the size of one, px."""

    n_rows: int
    n_columns: int
    height_px: float
    width_px: float

    @classmethod
    def of(cls, shape: tuple[int, int], tile_px: int) -> Grid:
        """Divide a frame into tiles of about `tile_px`."""
        n_rows, n_columns = (max(1, round(n / tile_px)) for n in shape)
        return cls(n_rows, n_columns, shape[0] / n_rows, shape[1] / n_columns)

    def nodes(self, tiles: FloatArray, floor: float | None = None) -> npt.NDArray[np.float32]:
        """Return values at tile centres with one extrapolated node around, float32.

        Tiles that are NaN take the mean of their known neighbours, from near to far. The outer
        nodes continue the slope, because a constant would leave a residual along the border;
        `floor` bounds them from below.
        """
        values = _fill_unknown(tiles)
        for axis in (0, 1):
            v = np.moveaxis(values, axis, 0)
            second, last_but_one = v[min(1, len(v) - 1)], v[max(len(v) - 2, 0)]
            padded = np.concatenate([[2 * v[0] - second], v, [2 * v[-1] - last_but_one]])
            values = np.moveaxis(padded, 0, axis)
        if floor is not None:
            values = np.maximum(values, floor)
        return np.ascontiguousarray(values, dtype=np.float32)

    def at(self, nodes: npt.NDArray[np.float32], xy_px: FloatArray) -> FloatArray:
        """Return bilinearly interpolated node values at positions (n, 2), px from 0."""
        u = (xy_px[:, 1] + 0.5) / self.height_px + 0.5
        v = (xy_px[:, 0] + 0.5) / self.width_px + 0.5
        i = np.clip(u.astype(np.intp), 0, self.n_rows)
        j = np.clip(v.astype(np.intp), 0, self.n_columns)
        fu, fv = u - i, v - j
        top = nodes[i, j] * (1 - fv) + nodes[i, j + 1] * fv
        bottom = nodes[i + 1, j] * (1 - fv) + nodes[i + 1, j + 1] * fv
        return np.asarray(top * (1 - fu) + bottom * fu, dtype=np.float64)


def _neighbours(tiles: FloatArray) -> FloatArray:
    """Return the 3 x 3 neighbourhoods of tiles, (9, rows, columns), NaN outside."""
    padded = np.pad(tiles, 1, constant_values=np.nan)
    rows, columns = tiles.shape
    return np.stack([padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)])


def _fill_unknown(tiles: FloatArray) -> FloatArray:
    """Replace NaN by the mean of known neighbours, ring by ring."""
    values = tiles.copy()
    while np.isnan(values).any() and not np.isnan(values).all():
        around = _neighbours(values)
        known = ~np.isnan(around)
        count = known.sum(axis=0)
        mean = np.where(known, around, 0.0).sum(axis=0) / np.maximum(count, 1)
        fill = np.isnan(values) & (count > 0)
        values[fill] = mean[fill]
    return values


def smooth_noise(tiles: FloatArray) -> FloatArray:
    """Return the median of each tile's 3 x 3 neighbourhood; unknown tiles stay out of it."""
    around = np.sort(_neighbours(tiles), axis=0)  # NaN sorts last
    count = np.sum(~np.isnan(around), axis=0)
    low = np.take_along_axis(around, np.maximum((count - 1) // 2, 0)[None], axis=0)[0]
    high = np.take_along_axis(around, np.maximum(count // 2, 0).clip(max=8)[None], axis=0)[0]
    return np.where(count > 0, 0.5 * (low + high), np.nan)


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


@kernel(image_signatures("void", f"{_MASK}, boolean, float32, float32, float32[:, ::1], int64[::1]"))
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


@kernel("void(float32[:, ::1], int64[::1], float64, float64[:, ::1])")
def tile_statistics(samples: Any, counts: Any, finest: float, out: Any) -> None:
    """Write level and standard deviation of each tile's samples, (tiles, 2).

    Median and MAD of a part of the samples, then the mean and the standard deviation of all
    that lie within 2.5 sigma, twice: as robust as the median, as precise as the mean, and right
    where counts are so low that the median is zero. `finest` is the smallest sigma to clip with.
    NaN where fewer than 24 samples count.
    """
    part = np.empty(256, np.float32)
    for tile in range(out.shape[0]):
        n = counts[tile]
        if n < 24:
            out[tile, 0] = np.nan
            out[tile, 1] = np.nan
            continue
        step = (n + 255) // 256
        m = 0
        for k in range(0, n, step):
            part[m] = samples[tile, k]
            m += 1
        level = float(select(part, m, m >> 1))
        for k in range(m):
            part[k] = abs(part[k] - np.float32(level))
        sigma = max(1.4826 * float(select(part, m, m >> 1)), finest)
        for _ in range(2):
            low, high = np.float32(level - 2.5 * sigma), np.float32(level + 2.5 * sigma)
            total, square, inside = 0.0, 0.0, 0
            for k in range(n):
                v = samples[tile, k]
                if v >= low and v <= high:
                    d = float(v) - level
                    total += d
                    square += d * d
                    inside += 1
            if inside < 2:
                break
            mean = total / inside
            # A normal distribution cut at 2.5 sigma has standard deviation 0.9545 sigma.
            sigma = max(np.sqrt(max(square / inside - mean * mean, 0.0)) / 0.9545, finest)
            level += mean
        out[tile, 0] = level
        out[tile, 1] = sigma


@kernel("void(float32[:, ::1], int64, float64, float64, float32[::1])", inline=True)
def _node_row(nodes: Any, row: int, height: float, extra: float, out: Any) -> None:
    """Interpolate the nodes at a row."""
    u = (row + 0.5) / height + 0.5
    i = min(int(u), nodes.shape[0] - 2)
    f = np.float32(u - i)
    for k in range(nodes.shape[1]):
        out[k] = nodes[i, k] + f * (nodes[i + 1, k] - nodes[i, k]) + np.float32(extra)


@kernel(
    image_signatures(
        "void",
        f"{_MASK}, boolean, float32, float32, int64, float32[:, ::1], float64, float64, float32[::1], "
        "float32[::1], float32[::1]",
    ),
    inline=True,
)
def _load_line(
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
    level: Any,
    out: Any,
) -> None:
    """Write a row less its background into out[2:-2]; 0 where a pixel does not count."""
    rows, columns = image.shape
    if row < 0 or row >= rows:
        out[:] = np.float32(0.0)
        return
    _node_row(nodes, row, height, 0.0, node_row)
    for k in range(node_row.size - 1):
        # Columns whose (c + 0.5)/width + 0.5 lies in [k, k + 1).
        c0 = min(max(int(np.ceil((k - 0.5) * width - 0.5)), 0), columns)
        c1 = min(max(int(np.ceil((k + 0.5) * width - 0.5)), 0), columns)
        slope = np.float32((node_row[k + 1] - node_row[k]) / width)
        start = np.float32(node_row[k] + ((c0 + 0.5) / width + 0.5 - k) * (node_row[k + 1] - node_row[k]))
        for c in range(c1 - c0):
            level[c0 + c] = start + slope * np.float32(c)
    if masked:
        for c in range(columns):
            v = np.float32(image[row, c])
            counts = (v > lowest) & (v < largest) & (usable[row, c] != 0)
            out[c + 2] = v - level[c] if counts else np.float32(0.0)
    else:
        for c in range(columns):
            v = np.float32(image[row, c])
            out[c + 2] = v - level[c] if (v > lowest) & (v < largest) else np.float32(0.0)


@kernel("void(float32[:, ::1], int64, float32[::1], float32[::1])", inline=True)
def _respond(lines: Any, row: int, column_sum: Any, out: Any) -> None:
    """Write the response of a row into out[1:-1], from the five lines around it (slot = row % 5)."""
    a, b, c = lines[(row + 3) % 5], lines[(row + 4) % 5], lines[row % 5]
    d, e = lines[(row + 1) % 5], lines[(row + 2) % 5]
    for k in range(column_sum.size):
        column_sum[k] = a[k] + e[k] + np.float32(4.0) * (b[k] + d[k]) + np.float32(6.0) * c[k]
    scale = np.float32(1.0 / 256.0)
    for k in range(out.size - 2):
        out[k + 1] = scale * (
            column_sum[k]
            + column_sum[k + 4]
            + np.float32(4.0) * (column_sum[k + 1] + column_sum[k + 3])
            + np.float32(6.0) * column_sum[k + 2]
        )


_ROW_ARGUMENTS = f"{_MASK}, boolean, float32, float32, float32[:, ::1], float64, float64"


@kernel(image_signatures("void", f"{_ROW_ARGUMENTS}, float64[:, ::1]"))
def tile_noise(
    image: Any,
    usable: Any,
    masked: bool,
    lowest: Any,
    largest: Any,
    nodes: Any,
    height: float,
    width: float,
    out: Any,
) -> None:
    """Write the response's sigma (1.4826 MAD) of each tile, (tiles along y, along x).

    One row in eight, every second column: samples that hardly share pixels. NaN where fewer
    than 24 of them lie on pixels that count.
    """
    rows, columns = image.shape
    n_y, n_x = out.shape
    lines = np.zeros((5, columns + 4), np.float32)
    column_sum, response = np.empty(columns + 4, np.float32), np.zeros(columns + 2, np.float32)
    level, node_row = np.empty(columns, np.float32), np.empty(nodes.shape[1], np.float32)
    capacity = (int(height) // _NOISE_ROWS + 2) * (int(width) // 2 + 2)
    samples, counts = np.empty((n_x, capacity), np.float32), np.zeros(n_x, np.int64)
    for i in range(n_y):
        counts[:] = 0
        for row in range(i * rows // n_y + _NOISE_ROWS // 2, (i + 1) * rows // n_y, _NOISE_ROWS):
            for r in range(row - 2, row + 3):
                _load_line(
                    image, usable, masked, lowest, largest, r, nodes, height, width, node_row, level,
                    lines[(r + 5) % 5],
                )  # fmt: skip
            _respond(lines, row, column_sum, response)
            centre = lines[row % 5]
            for j in range(n_x):
                n = counts[j]
                for c in range(j * columns // n_x, (j + 1) * columns // n_x, 2):
                    if centre[c + 2] != 0.0 and n < capacity:
                        samples[j, n] = response[c + 1]
                        n += 1
                counts[j] = n
        for j in range(n_x):
            n = counts[j]
            if n < 24:
                out[i, j] = np.nan
                continue
            median = select(samples[j], n, n >> 1)
            for k in range(n):
                samples[j, k] = abs(samples[j, k] - median)
            out[i, j] = 1.4826 * float(select(samples[j], n, n >> 1))


@kernel(
    image_signatures(
        "int64", f"{_ROW_ARGUMENTS}, float32[:, ::1], float64, float64, int32[:, ::1], float32[::1]"
    )
)
def find_maxima(
    image: Any,
    usable: Any,
    masked: bool,
    lowest: Any,
    largest: Any,
    nodes: Any,
    height: float,
    width: float,
    noise_nodes: Any,
    threshold_sigma: float,
    excess: float,
    positions: Any,
    responses: Any,
) -> int:
    """Find local maxima (3 x 3) of the response above threshold_sigma times its noise plus excess.

    Writes (row, column) into `positions` and the response beside it, in reading order; returns
    their number. Of equal neighbours the last in reading order counts, so no two maxima touch
    and a quarter of the number of pixels is room enough.
    """
    rows, columns = image.shape
    lines = np.zeros((5, columns + 4), np.float32)
    response = np.zeros((3, columns + 2), np.float32)
    column_sum, level = np.empty(columns + 4, np.float32), np.empty(columns, np.float32)
    node_row, noise_row = np.empty(nodes.shape[1], np.float32), np.empty(nodes.shape[1], np.float32)
    chunk = 32
    n = 0
    for r in range(2):
        _load_line(
            image, usable, masked, lowest, largest, r, nodes, height, width, node_row, level, lines[r % 5]
        )
    for row in range(rows + 1):
        if row < rows:
            r = row + 2
            _load_line(
                image, usable, masked, lowest, largest, r, nodes, height, width, node_row, level, lines[r % 5]
            )
            _respond(lines, row, column_sum, response[row % 3])
        else:
            response[row % 3, :] = np.float32(0.0)
        if row == 0:
            continue
        above, here, below = response[(row + 1) % 3], response[(row + 2) % 3], response[row % 3]
        _node_row(noise_nodes, row - 1, height, 0.0, noise_row)
        for c0 in range(0, columns, chunk):
            c1 = min(c0 + chunk, columns)
            k0 = int((c0 + 0.5) / width + 0.5)
            k1 = int((c1 - 0.5) / width + 0.5)
            lowest_noise = noise_row[k0]
            for k in range(k0, min(k1 + 1, noise_row.size - 1) + 1):
                lowest_noise = min(lowest_noise, noise_row[k])
            bound = np.float32(threshold_sigma * lowest_noise + excess)
            above_bound = 0
            for c in range(c0, c1):
                above_bound += here[c + 1] > bound
            if above_bound == 0:
                continue
            for c in range(c0, c1):
                v = here[c + 1]
                if v <= bound:
                    continue
                if not (v >= here[c] and v > here[c + 2] and v > below[c] and v > below[c + 1]):
                    continue
                if not (v > below[c + 2] and v >= above[c] and v >= above[c + 1] and v >= above[c + 2]):
                    continue
                x = (c + 0.5) / width + 0.5
                k = min(int(x), noise_row.size - 2)
                noise = noise_row[k] + (x - k) * (noise_row[k + 1] - noise_row[k])
                if v > threshold_sigma * noise + excess:
                    positions[n, 0] = row - 1
                    positions[n, 1] = c
                    responses[n] = v
                    n += 1
    return n


@kernel(image_signatures("void", f"{_MASK}, boolean, float32, float32, int32[:, ::1], float32[:, :, ::1]"))
def gather_windows(
    image: Any, usable: Any, masked: bool, lowest: Any, largest: Any, centres: Any, out: Any
) -> None:
    """Copy the square windows around (row, column) centres into out, (n, 2h+1, 2h+1); NaN outside."""
    rows, columns = image.shape
    half = out.shape[1] // 2
    for i in range(centres.shape[0]):
        for a in range(out.shape[1]):
            r = centres[i, 0] + a - half
            for b in range(out.shape[2]):
                c = centres[i, 1] + b - half
                out[i, a, b] = np.nan
                if r < 0 or r >= rows or c < 0 or c >= columns or (masked and usable[r, c] == 0):
                    continue
                v = np.float32(image[r, c])
                if v > lowest and v < largest:
                    out[i, a, b] = v


@kernel(
    image_signatures("int64", f"{_MASK}, boolean, float32, int32[:, ::1], int64, int32[::1], float64[:, ::1]")
)
def label_plateaus(
    image: Any,
    usable: Any,
    masked: bool,
    saturation: Any,
    centres: Any,
    largest_px: int,
    label: Any,
    out: Any,
) -> int:
    """Find the connected saturated areas (8 neighbours) that touch the 3 x 3 around centres.

    Writes each centre's area number (−1: none) into `label` and per area (row, column of the
    centroid, pixels, half extent) into `out`; an area of more than `largest_px` pixels is no
    spot and gets 0 pixels. Returns the number of areas.
    """
    rows, columns = image.shape
    seen = np.zeros((rows, columns), np.int32)
    stack = np.empty((largest_px + 1, 2), np.int32)
    found = 0
    for i in range(centres.shape[0]):
        label[i] = -1
        for k in range(9):
            r, c = centres[i, 0] + k // 3 - 1, centres[i, 1] + k % 3 - 1
            if r < 0 or r >= rows or c < 0 or c >= columns or (masked and usable[r, c] == 0):
                continue
            if not np.float32(image[r, c]) >= saturation:
                continue
            if seen[r, c] > 0:
                label[i] = seen[r, c] - 1
                break
            label[i] = found
            out[found, 2] = 0.0
            seen[r, c] = found + 1
            stack[0, 0], stack[0, 1] = r, c
            depth, first, joined = 1, 0, False
            r_min, r_max, c_min, c_max = r, r, c, c
            sum_r, sum_c = 0.0, 0.0
            while first < depth and depth <= largest_px and not joined:
                r, c = stack[first, 0], stack[first, 1]
                first += 1
                sum_r += r
                sum_c += c
                r_min, r_max, c_min, c_max = min(r_min, r), max(r_max, r), min(c_min, c), max(c_max, c)
                for q in range(9):
                    a, b = r + q // 3 - 1, c + q % 3 - 1
                    if a < 0 or a >= rows or b < 0 or b >= columns or (masked and usable[a, b] == 0):
                        continue
                    if seen[a, b] == found + 1 or not np.float32(image[a, b]) >= saturation:
                        continue
                    if seen[a, b] > 0:
                        joined = True  # runs into an area that was given up as too large
                        break
                    if depth > largest_px:
                        break
                    seen[a, b] = found + 1
                    stack[depth, 0], stack[depth, 1] = a, b
                    depth += 1
            if depth <= largest_px and not joined:
                out[found, 0], out[found, 1], out[found, 2] = sum_r / depth, sum_c / depth, depth
                out[found, 3] = 0.5 * max(r_max - r_min, c_max - c_min)
            found += 1
            break
    return found


@kernel(
    "void(float32[:, :, ::1], int32[:, ::1], float64[:, ::1], int64[::1], float64, float64, float64, uint8[::1])"
)
def suppress(
    windows: Any,
    centres: Any,
    judged: Any,
    by_row: Any,
    separation_px: float,
    prominence_sigma: float,
    gain: float,
    keep: Any,
) -> None:
    """Clear `keep` of maxima that are bumps on a stronger one.

    A maximum goes when a stronger one lies within `separation_px`, or within the window and the
    valley between the two (means of 3 x 3 pixels along the line) is not deeper than
    `prominence_sigma` of its own noise, photon noise included, and 5 % of its height.

    Parameters
    ----------
    windows : (n, w, w) float32
    centres : (n, 2) int32
    judged : (n, 3)
        Local background, response above it, noise of a pixel.
    by_row : (n,)
        Order by row.
    """
    n = centres.shape[0]
    centre = windows.shape[1] // 2
    walk = centre - 1
    for at in range(n):
        i = by_row[at]
        if keep[i] == 0:
            continue
        for direction in (-1, 1):
            other = at + direction
            while 0 <= other < n and keep[i] != 0:
                j = by_row[other]
                dr, dc = centres[j, 0] - centres[i, 0], centres[j, 1] - centres[i, 1]
                if abs(dr) > walk:
                    break
                other += direction
                stronger = judged[j, 1] > judged[i, 1] or (judged[j, 1] == judged[i, 1] and j < i)
                if abs(dc) > walk or not stronger:
                    continue
                distance = np.sqrt(float(dr * dr + dc * dc))
                if distance < separation_px:
                    keep[i] = 0
                    break
                own, valley = np.nan, np.inf
                steps = 2 * max(abs(dr), abs(dc))
                for s in range(steps):
                    a = centre + int(np.rint(dr * s / steps))
                    b = centre + int(np.rint(dc * s / steps))
                    total, known = 0.0, 0
                    for u in range(a - 1, a + 2):
                        for v in range(b - 1, b + 2):
                            if windows[i, u, v] == windows[i, u, v]:
                                total += windows[i, u, v]
                                known += 1
                    if known > 0:
                        mean = total / known - judged[i, 0]
                        if s == 0:
                            own = mean
                        valley = min(valley, mean)
                noise = np.sqrt((judged[i, 2] ** 2 + gain * max(own, 0.0)) / 9.0)
                if not own - valley > max(prominence_sigma * noise, 0.05 * own):
                    keep[i] = 0
