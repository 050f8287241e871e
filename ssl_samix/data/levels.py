"""Gray values that are not 8 bits become 0..255, and no picture turns black or white unseen."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image

from ssl_samix.data.sources import UnusableImage

_CLIPPED = 1000  # one value in so many may lie beyond black, and one beyond white
_FEW_LEVELS = 16  # a picture with fewer is a drawing, in which a lone value means something
_LEAST_FILLED = 1 / 8  # of the range that a file declares; with less, a picture would be black
_NO_NUMBER = 1e30  # floats from here on stand for missing values: 3.4e38, netCDF's 9.97e36

# tags of TIFF
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _GDAL_NODATA = 258, 262, 339, 42113
_RANGES = ((340, 341), (280, 281))  # SMinSampleValue, SMaxSampleValue; those of integers
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2

_Values = np.ndarray[Any, Any]


def needs_scaling(image: Image.Image) -> bool:
    """Say whether the picture is gray and its values are not simply 0..255."""
    if image.mode == "L":
        return _tag(image, _SAMPLE_FORMAT) == _SIGNED
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_8_bits(image: Image.Image, stored: Image.Image) -> Image.Image:
    """Scale such a picture linearly to 0..255.

    Black and white are the range that the file declares (TIFF: ``SMinSampleValue`` and
    ``SMaxSampleValue``, else ``MinSampleValue`` and ``MaxSampleValue``, else ``BitsPerSample``
    below 16; PGM: its maximum), if that holds the picture and the picture fills at least 1/8 of
    it. Else they are the picture's own 0.1% and 99.9% points. A smallest or largest value that is
    farther from the others than these are from one another does not count for these points, since
    it stands for missing values or saturation. NaN, infinities and GDAL's no-data value become
    black, transparent pixels white; none of them counts either.

    Args:
        image: One for which ``needs_scaling`` holds, upright.
        stored: The same as it was opened, with what its file says of it.

    Returns:
        Mode L.

    Raises:
        UnusableImage: No pixel has a value, or all have the same one, which is not 0, and the file
            does not say how bright it is.
    """
    values = _values(image, stored)
    clear = image.info.get("transparency")
    known = np.abs(values) < _NO_NUMBER if values.dtype.kind == "f" else np.full(values.shape, True)
    for missing in (_no_data(stored), clear):
        if missing is not None:
            known &= values != missing
    if not known.any():
        raise UnusableImage("no pixel has a finite value")
    black, white = _black_and_white(np.sort(values[known]), _declared(stored))
    scaled = values.astype(np.result_type(values.dtype, np.float32))
    scaled[~known] = black
    scaled -= black
    scaled /= white - black
    scaled *= 255
    levels = np.rint(scaled.clip(0, 255, out=scaled)).astype(np.uint8)
    if _tag(stored, _PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow turns 8 bits round, but not more
        levels = 255 - levels
    levels[~known] = 0
    if clear is not None:
        levels[values == clear] = 255
    return Image.fromarray(levels)


def _values(image: Image.Image, stored: Image.Image) -> _Values:
    """Return (h, w) as the file has them: Pillow has no modes for signed bytes and uint32."""
    values = np.asarray(image)
    if image.mode == "L":
        return values.view(np.int8)
    unsigned = image.mode == "I" and _tag(stored, _SAMPLE_FORMAT) == _UNSIGNED
    return values.view(np.uint32) if unsigned else values


def _black_and_white(ordered: _Values, declared: tuple[float, float] | None) -> tuple[float, float]:
    """Choose the values that become 0 and 255, given all of them in order."""
    low, high = _ends(_without_lone_end(_without_lone_end(ordered)[::-1])[::-1])
    if declared is not None:
        black, white = declared
        single = ordered[0] == ordered[-1]
        filled = single or high - low >= _LEAST_FILLED * (white - black)
        if black <= low and high <= white and black < white and filled:
            return black, white
    if low == high == 0:
        return 0.0, 1.0
    if low == high:
        raise UnusableImage(f"all pixels have the value {low:g}, and how bright that is is unknown")
    return low, high


def _without_lone_end(ordered: _Values) -> _Values:
    """Leave out the first value, however often it occurs, if it is far from all the others."""
    rest = ordered[np.argmax(ordered != ordered[0]) :]
    if np.count_nonzero(np.diff(rest)) < _FEW_LEVELS - 1:
        return ordered
    low, high = sorted(_ends(rest))
    first = float(ordered[0])
    return rest if max(low - first, first - high) > high - low else ordered


def _ends(ordered: _Values) -> tuple[float, float]:
    """Return the values that all but 0.1% at either end lie between; the very ends if equal."""
    beyond = len(ordered) // _CLIPPED
    low, high = float(ordered[beyond]), float(ordered[-1 - beyond])
    return (low, high) if low != high else (float(ordered[0]), float(ordered[-1]))


def _declared(image: Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white that the file states, if it does."""
    for least, most in _RANGES:
        top = _tag(image, most)
        if top is not None:
            return float(_tag(image, least) or 0), float(top)
    bits = _tag(image, _BITS)
    if bits is not None and bits < 16 and image.mode != "L":
        return 0.0, 2.0**bits - 1
    return (0.0, 65535.0) if image.format == "PPM" and image.mode == "I" else None


def _no_data(image: Image.Image) -> float | None:
    """Return the value by which GDAL marks pixels without data."""
    with suppress(ValueError):
        value = float(str(_tag(image, _GDAL_NODATA)).strip("\0 "))
        return value if abs(value) < _NO_NUMBER else None  # those count as missing anyway
    return None


def _tag(image: Image.Image, number: int) -> Any:
    """Return the (first) value of a tag of TIFF, or None."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value
