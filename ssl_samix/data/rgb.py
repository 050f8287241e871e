"""Any picture that Pillow reads becomes one in 8-bit RGB."""

from __future__ import annotations

from PIL import Image, ImageOps

from ssl_samix.data.levels import needs_scaling, to_8_bits
from ssl_samix.data.sources import UNREADABLE

_ORIENTATION = 0x0112  # the EXIF tag


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any picture upright and into 8-bit RGB.

    Transparent parts become white, as on the page they were made for. Gray that is not 8 bits is
    scaled as ``ssl_samix.data.levels`` says.

    Args:
        image: Any mode; an animation gives its current frame.

    Raises:
        UnusableImage: Its values cannot be understood, see ``to_8_bits``.
    """
    stored, image = image, _upright(image)
    if needs_scaling(stored):
        image = to_8_bits(image, stored)
    if image.has_transparency_data:
        layer = _straight(image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _straight(image: Image.Image) -> Image.Image:
    return image.convert("LA") if image.mode == "La" else image  # Pillow has no La to RGBA


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a damaged EXIF block leaves the picture as it is stored."""
    try:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except UNREADABLE:
        return image
