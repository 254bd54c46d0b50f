"""Pictures whose answer is known."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter


def two_phase(rows: int, columns: int, seed: int, scale_px: float = 4.0, noise: float = 6.0) -> np.ndarray:
    """A structure of two greys with noise, as uint8."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.standard_normal((rows, columns)), scale_px, mode="wrap")
    grey = np.where(field > 0.0, 160.0, 80.0) + rng.normal(0.0, noise, field.shape)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def data_bar(columns: int, rows: int, background: int, ink: int, style: str) -> np.ndarray:
    """A data bar with text, a scale and perhaps lines, as uint8."""
    image = Image.new("L", (columns, rows), background)
    draw = ImageDraw.Draw(image)
    if style == "framed":
        draw.rectangle([0, 0, columns - 1, rows - 1], outline=ink)
        for x in (columns // 4, columns // 2):
            draw.line([x, 0, x, rows], fill=ink)
    font = ImageFont.load_default(14 if rows >= 24 else 11)
    draw.text((8, rows // 2 - 8), "HV 15.00 kV  WD 5.1 mm  mag 1 000 x", font=font, fill=ink)
    draw.line([columns - 120, rows - 6, columns - 20, rows - 6], fill=ink, width=3)
    draw.text((columns - 90, rows // 2 - 9), "50 um", font=font, fill=ink)
    return np.asarray(image)


def discs(rows: int, columns: int, radius_px: float, per_px2: float, seed: int) -> np.ndarray:
    """A Boolean model: discs (255) at Poisson points on black, with discs that reach in from outside."""
    rng = np.random.default_rng(seed)
    margin = int(np.ceil(radius_px)) + 1
    height, width = rows + 2 * margin, columns + 2 * margin
    centres = rng.uniform((0, 0), (height, width), (rng.poisson(per_px2 * height * width), 2)) - margin
    image = np.zeros((rows, columns), dtype=np.uint8)
    reach = int(np.ceil(radius_px)) + 1
    for y, x in centres:
        top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
        box = image[top : max(int(y) + reach + 2, 0), left : max(int(x) + reach + 2, 0)]
        if box.size:
            row, column = np.ogrid[: box.shape[0], : box.shape[1]]
            box[(row + top - y) ** 2 + (column + left - x) ** 2 <= radius_px**2] = 255
    return image
