"""Image sets, in memory or in files, and the conversion of any picture to 8-bit RGB."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ssl_samix.data.sources import UNREADABLE, Source, UnusableImage
from ssl_samix.errors import DataError

_CLIPPED = 1000  # one value in so many may lie below black, and one above white
_FEW_LEVELS = 16  # a picture with fewer is a drawing, in which a single value is meaningful
_LEAST_FILLED = 1 / 8  # of the range that a file declares; with less, a picture would be black
_NO_NUMBER = 1e30  # floats from here on stand for missing values: 3.4e38, netCDF's 9.97e36

# tags of TIFF
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _GDAL_NODATA = 258, 262, 339, 42113
_RANGES = ((340, 341), (280, 281))  # SMinSampleValue, SMaxSampleValue; those of integers
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2

_Values = np.ndarray[Any, Any]


def needs_scaling(image: Image.Image) -> bool:
    """Return whether the picture is gray with other values than 0..255."""
    if image.mode == "L":
        return _tag(image, _SAMPLE_FORMAT) == _SIGNED
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_8_bits(image: Image.Image, stored: Image.Image) -> Image.Image:
    """Return a picture that needs scaling, scaled linearly to 0..255, in mode L.

    Black and white are the range that the file declares (TIFF: ``SMinSampleValue`` and
    ``SMaxSampleValue``, else ``MinSampleValue`` and ``MaxSampleValue``, else ``BitsPerSample``
    below 16; PGM: its maximum), if that holds the picture and the picture fills at least 1/8 of
    it. Else they are the picture's own 0.1% and 99.9% points. A smallest or largest value that is
    farther from the others than these are from one another does not count for these points, since
    it stands for missing values or saturation. NaN, infinities and GDAL's no-data value become
    black, transparent pixels white; none of them counts either.

    Args:
        image: One for which ``needs_scaling`` holds, upright.
        stored: The same picture as opened, with the file's metadata.

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
    if _tag(stored, _PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits, but not more
        levels = 255 - levels
    levels[~known] = 0
    if clear is not None:
        levels[values == clear] = 255
    return Image.fromarray(levels)


def _values(image: Image.Image, stored: Image.Image) -> _Values:
    """Return the values (h, w) as stored: Pillow has no modes for signed bytes and uint32."""
    values = np.asarray(image)
    if image.mode == "L":
        return values.view(np.int8)
    unsigned = image.mode == "I" and _tag(stored, _SAMPLE_FORMAT) == _UNSIGNED
    return values.view(np.uint32) if unsigned else values


def _black_and_white(ordered: _Values, declared: tuple[float, float] | None) -> tuple[float, float]:
    """Return the values that become 0 and 255, given all values in ascending order."""
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
        raise UnusableImage(f"all pixels have the value {low:g}, of unknown brightness")
    return low, high


def _without_lone_end(ordered: _Values) -> _Values:
    """Return values without all copies of the first one, if it is far from the others."""
    rest = ordered[np.argmax(ordered != ordered[0]) :]
    if np.count_nonzero(np.diff(rest)) < _FEW_LEVELS - 1:
        return ordered
    low, high = sorted(_ends(rest))
    first = float(ordered[0])
    return rest if max(low - first, first - high) > high - low else ordered


def _ends(ordered: _Values) -> tuple[float, float]:
    """Return the 0.1% and 99.9% points; the smallest and largest value if those are equal."""
    beyond = len(ordered) // _CLIPPED
    low, high = float(ordered[beyond]), float(ordered[-1 - beyond])
    return (low, high) if low != high else (float(ordered[0]), float(ordered[-1]))


def _declared(image: Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white that the file declares, or None."""
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
        return value if abs(value) < _NO_NUMBER else None  # they count as missing anyway
    return None


def _tag(image: Image.Image, number: int) -> Any:
    """Return the (first) value of a TIFF tag, or None."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


_ORIENTATION = 0x0112  # the EXIF tag


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any picture upright and in 8-bit RGB.

    Transparent parts become white. Gray that is not 8 bits is
    scaled as ``ssl_samix.data.images`` says.

    Args:
        image: Any mode; an animation gives its current frame.

    Raises:
        UnusableImage: Its values cannot be interpreted, see ``to_8_bits``.
    """
    stored, image = image, _upright(image)
    if needs_scaling(stored):
        image = to_8_bits(image, stored)
    if image.has_transparency_data:
        # Pillow has no La to RGBA.
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Return the picture rotated by its EXIF orientation; a damaged EXIF block is ignored."""
    try:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except UNREADABLE:
        return image


_log = logging.getLogger(__name__)
_CROPPED_FROM = 160  # px; from here on, images are cropped out of a larger resize


def fit(image: Image.Image, size: int) -> Tensor:
    """Return the centre crop of a picture after resizing its shorter side (antialiased, bilinear).

    Args:
        image: RGB picture.
        size: S. From 160 pixels on the shorter side becomes S * 256 / 224 before the crop, which
            is how ImageNet is evaluated; below, S itself, since small pictures have no margin.

    Returns:
        (3, S, S) uint8; the pixels themselves if the picture is S x S already.
    """
    if image.size == (size, size):
        return to_tensor(image)
    side = resized_side(size)
    shorter = min(image.size)
    width, height = (side * length // shorter for length in image.size)  # after the resize
    left, top = (width - size) // 2, (height - size) // 2
    # resize only what is kept: a whole resized 30,000 x 1 picture would not fit in memory
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def resized_side(size: int) -> int:
    """Return the shorter side in pixels from which ``fit`` crops a ``size`` x ``size`` centre."""
    return size if size < _CROPPED_FROM else round(size * 256 / 224)


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB picture as a (3, h, w) uint8 tensor."""
    # numpy copies on this thread; torch would start threads for 50 kB, which takes longer
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class ImageSet(Dataset[tuple[Tensor, int]], ABC):
    """A set of N images of one side S, with labels."""

    labels: Tensor  # (N,) int64, -1 where there is no label
    image_size: int  # S in pixels
    unreadable: int  # damaged images found so far in this process
    source: Source | None = None  # says in which order an epoch goes through them

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one fitted image, (3, S, S) uint8, and its label."""
        return self.load([index])[0], int(self.labels[index])

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the path of an image, or its position in its data set (``"cifar10 train 17"``)."""

    @abstractmethod
    def load(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return fitted images without augmentation, (B, 3, S, S) uint8."""

    @abstractmethod
    def original(self, index: int) -> Tensor:
        """Return one image before fitting, (3, h, w) uint8, for crops from the full picture."""

    def picture(self, index: int) -> Image.Image:
        """Return one image before fitting in RGB; decoded pictures are not copied."""
        return Image.fromarray(self.original(index).permute(1, 2, 0).numpy())

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the order of an epoch, (N,) int64, as the source prefers it."""
        if self.source is None:
            return torch.randperm(len(self), generator=generator)
        return self.source.order(generator)


class MemoryImages(ImageSet):
    """Images held as one tensor; ``original`` returns the stored pixels."""

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        names: Sequence[str],
        unreadable: int = 0,
        source: Source | None = None,
    ) -> None:
        """Store the images.

        Args:
            pixels: (N, 3, S, S) uint8.
            labels: (N,) int64, -1 where there is no label.
            names: N names.
            unreadable: How many were skipped while loading.
            source: The source whose order epochs follow, so that a run resumed with another
                ``data.memory_gb`` sees the same batches; None: shuffle.
        """
        assert len(pixels) == len(labels) == len(names)
        self.pixels = pixels
        self.labels = labels
        self.names = names
        self.unreadable = unreadable
        self.source = source
        self.image_size = pixels.shape[-1]

    def name(self, index: int) -> str:
        """Return the name of one image."""
        return self.names[index]

    def load(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return a copy of the images at ``indices``, (B, 3, S, S) uint8."""
        return self.pixels[torch.as_tensor(indices)]

    def original(self, index: int) -> Tensor:
        """Return the stored image, (3, S, S) uint8."""
        return self.pixels[index]


class FileImages(ImageSet):
    """Images decoded on demand; a damaged one is replaced by the next readable one of its class."""

    source: Source

    def __init__(self, source: Source, labels: Tensor, image_size: int) -> None:
        """Store the source of the images.

        Args:
            source: N pictures.
            labels: (N,) int64, -1 where there is no label.
            image_size: S in pixels.
        """
        assert len(source) == len(labels)
        self.source = source
        self.labels = labels
        self.image_size = image_size
        self.unreadable = 0
        self._stand_in: dict[int, int] = {}  # damaged position -> its replacement

    def name(self, index: int) -> str:
        """Return the name of one image."""
        return self.source.name(index)

    def load(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the decoded and fitted images at ``indices``, (B, 3, S, S) uint8.

        Raises:
            DataError: Every image of a class is damaged.
        """
        at_least = 2 * resized_side(self.image_size)  # decoding at twice the size keeps it sharp
        images = [fit(self._decode(int(i), at_least), self.image_size) for i in indices]
        return torch.from_numpy(np.stack([image.numpy() for image in images]))

    def original(self, index: int) -> Tensor:
        """Return one decoded image, (3, h, w) uint8.

        Raises:
            DataError: Every image of a class is damaged.
        """
        return to_tensor(self.picture(index))

    def picture(self, index: int) -> Image.Image:
        """Return one decoded image in RGB.

        Raises:
            DataError: Every image of a class is damaged.
        """
        return self._decode(index, None)

    def _decode(self, index: int, at_least: int | None) -> Image.Image:
        """Return the picture at ``index``, or the next readable one with the same label."""
        position = self._stand_in.get(index, index)
        try:
            return to_rgb(self.source.image(position, at_least))
        except UNREADABLE as error:
            reason = error
        same = torch.nonzero(self.labels == self.labels[index]).flatten().tolist()
        start = same.index(index)
        for position in same[start + 1 :] + same[:start]:
            try:
                image = to_rgb(self.source.image(position, at_least))
            except UNREADABLE:
                continue
            self._remember(index, position, reason)
            return image
        raise DataError(
            f"{self.name(index)} cannot be read ({reason}), nor any other image of its class: "
            "repair or remove them"
        )

    def _remember(self, index: int, position: int, reason: Exception) -> None:
        """Use ``position`` in place of ``index`` from now on, and warn once."""
        self._stand_in[index] = position
        self.unreadable += 1
        _log.warning(
            "%s cannot be read (%s): %s is used instead",
            self.name(index),
            reason,
            self.name(position),
        )
