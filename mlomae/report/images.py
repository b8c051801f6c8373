"""Pixels as data URIs: maps of patches one pixel a patch, which the page enlarges, and small photos."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

PHOTO_SIDE = 192
"""Longest side of a photo on the page in pixels; larger ones shrink."""
_EXACT_SIDE = 64  # up to it photos keep every pixel; above, JPEG is several times smaller
REMOVED = (132, 139, 150)
"""Colour of removed patches."""
POSITIVE, NEGATIVE = (230, 97, 1), (33, 113, 181)
"""Ends of the diverging colours; they differ in every kind of colour vision."""
_VIRIDIS = colormaps["viridis"]


def sequential(values: Floats, low: float, high: float) -> str:
    """[rows, columns] from dark (``low``) to bright (``high``)."""
    return _png(_VIRIDIS((values - low) / (high - low), bytes=True)[..., :3])


def diverging(values: Floats, scale: float) -> str:
    """[rows, columns] from blue (-scale) over transparent (0) to orange (scale); NaN is transparent."""
    share = np.nan_to_num(values / scale).clip(-1, 1)
    colors = np.where((share > 0)[..., None], POSITIVE, NEGATIVE)
    return _png(np.dstack([colors, 255 * np.abs(share) ** 0.8]).astype(np.uint8))


def covering(removed: Bools) -> str:
    """[rows, columns] to lie over an image: grey where removed, transparent elsewhere."""
    return _png(np.dstack([np.full((*removed.shape, 3), REMOVED), 255 * removed]).astype(np.uint8))


def photo(pixels: Bytes) -> str:
    """An image [H, W, 1 or 3]."""
    height, width, _ = pixels.shape
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    longest = max(height, width)
    if longest <= _EXACT_SIDE:
        return _encoded(image, "PNG", optimize=True)
    if longest > PHOTO_SIDE:
        size = (round(width * PHOTO_SIDE / longest) or 1, round(height * PHOTO_SIDE / longest) or 1)
        image = image.resize(size, Image.Resampling.LANCZOS)
    return _encoded(image, "JPEG", quality=88)


def sequential_ramp() -> str:
    """The colours of ``sequential`` as a CSS gradient."""
    stops = (_VIRIDIS(share, bytes=True)[:3] for share in np.linspace(0, 1, 9))
    return f"linear-gradient(90deg, {', '.join(_css(stop) for stop in stops)})"


def diverging_ramp() -> str:
    """The colours of ``diverging`` as a CSS gradient."""
    return f"linear-gradient(90deg, {_css(NEGATIVE)}, transparent, {_css(POSITIVE)})"


def _css(color: tuple[int, ...]) -> str:
    return f"rgb({' '.join(str(int(part)) for part in color)})"


def _png(pixels: Bytes) -> str:
    return _encoded(Image.fromarray(pixels), "PNG")


def _encoded(image: Image.Image, kind: str, **options: object) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
