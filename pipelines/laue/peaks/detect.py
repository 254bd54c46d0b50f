"""Local maxima of the response, and what can be said of them before a fit.

Saturated areas are taken as one, and bumps on the flank of a stronger spot are told from spots.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.kernels import kernel
from pipelines.laue.peaks.rows import MASK, ROW_ARGUMENTS, image_signatures, load_line, node_row_at, respond


@kernel(
    image_signatures(
        "int64", f"{ROW_ARGUMENTS}, float32[:, ::1], float64, float64, int32[:, ::1], float32[::1]"
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
    column_sum, node_row = np.empty(columns + 4, np.float32), np.empty(nodes.shape[1], np.float32)
    noise_row = np.empty(nodes.shape[1], np.float32)
    chunk = 32
    n = 0
    for r in range(2):
        load_line(image, usable, masked, lowest, largest, r, nodes, height, width, node_row, lines[r])
    for row in range(rows + 1):
        if row < rows:
            line = lines[(row + 2) % 5]
            load_line(image, usable, masked, lowest, largest, row + 2, nodes, height, width, node_row, line)
            respond(lines, row, column_sum, response[row % 3])
        else:
            response[row % 3, :] = np.float32(0.0)
        if row == 0:
            continue
        above, here, below = response[(row + 1) % 3], response[(row + 2) % 3], response[row % 3]
        node_row_at(noise_nodes, row - 1, height, noise_row)
        for c0 in range(0, columns, chunk):
            c1 = min(c0 + chunk, columns)
            least = noise_row[int((c0 + 0.5) / width + 0.5)]
            for k in range(int((c0 + 0.5) / width + 0.5), int((c1 - 0.5) / width + 0.5) + 2):
                least = min(least, noise_row[k])
            bound = np.float32(threshold_sigma * least + excess)
            part = here[c0 + 1 : c1 + 1]
            above_bound = np.int32(0)
            for c in range(part.size):
                above_bound |= np.int32(part[c] > bound)
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


@kernel(image_signatures("void", f"{MASK}, boolean, float32, float32, int32[:, ::1], float32[:, :, ::1]"))
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
    image_signatures("int64", f"{MASK}, boolean, float32, int32[:, ::1], int64, int32[::1], float64[:, ::1]")
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


@kernel("void(float32[:, :, ::1], int32[:, ::1], float64[:, ::1], float64, float64, float64, uint8[::1])")
def suppress(
    windows: Any,
    centres: Any,
    judged: Any,
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
        Row, column, in reading order.
    judged : (n, 3)
        Local background, response above it, noise of a pixel.
    """
    n = centres.shape[0]
    centre = windows.shape[1] // 2
    walk = centre - 1
    for i in range(n):
        if keep[i] == 0:
            continue
        for direction in (-1, 1):
            other = i + direction
            while 0 <= other < n and keep[i] != 0:
                j = other
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
