"""Any picture that Pillow reads becomes one in 8-bit RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from ssl_samix.data.sources import UNREADABLE

_ORIENTATION = 0x0112  # the EXIF tag


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any picture upright and into 8-bit RGB.

    Transparent parts become white, as on the page they were made for. 16-bit gray is scaled from
    0..65535; 32-bit and float gray from the smallest of 0..1 (floats), 0..255 and 0..65535 that
    holds all values, else from the picture's own minimum and maximum.

    Args:
        image: Any mode; an animation gives its current frame.
    """
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a damaged EXIF block leaves the picture as it is stored."""
    try:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except UNREADABLE:
        return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    tops = [65535.0] if image.mode.startswith("I;16") else [255.0, 65535.0]
    if image.mode == "F":
        tops.insert(0, 1.0)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        values, top = values - low, high - low
    return Image.fromarray(np.rint(values / top * 255).astype(np.uint8))
