"""Where pictures come from, one at a time: files, or an array that is already in memory."""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_samix.data.image_files import formats

# what Pillow raises for a damaged file, depending on the format and on where the damage is
UNREADABLE = (
    OSError,  # truncated data, PIL.UnidentifiedImageError, files that may not be read
    SyntaxError,  # broken PNG and TIFF headers
    ValueError,
    TypeError,
    LookupError,  # missing TIFF tags
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,  # too many pixels to be a picture
)


class Source(Protocol):
    """N pictures that are decoded on request."""

    def __len__(self) -> int:
        """Return N."""

    def name(self, index: int) -> str:
        """Return what a person finds the picture by: its path, or its place in a data set."""

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Decode one picture.

        Args:
            index: Position in 0..N-1.
            at_least: The picture may be reduced while decoding, if both sides stay at least this
                many pixels; None for full resolution.

        Raises:
            One of ``UNREADABLE`` for a damaged picture.
        """

    def take(self, indices: Sequence[int]) -> Source:
        """Return the pictures at these positions."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the order of an epoch, (N,) int64, drawn from ``generator``."""


class EncodedSource(ABC):
    """N pictures that are stored one by one, in any format that Pillow reads."""

    @abstractmethod
    def __len__(self) -> int:
        """Return N."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a person finds the picture by."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return one picture of which the header alone has been decoded.

        Raises:
            One of ``UNREADABLE`` for a damaged one.
        """

    @abstractmethod
    def take(self, indices: Sequence[int]) -> EncodedSource:
        """Return the pictures at these positions."""

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Fully decode one picture, so that a truncated one is found here."""
        with self.open(index) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))  # JPEG only: decodes at 1/2, 1/4 or 1/8
            image.load()
            return image

    def order(self, generator: torch.Generator) -> Tensor:
        """Shuffle all pictures."""
        return torch.randperm(len(self), generator=generator)


class PathSource(EncodedSource):
    """Image files."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Hold N paths; nothing is opened yet."""
        self.paths = list(paths)

    def __len__(self) -> int:
        """Return N."""
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path."""
        return self.paths[index]

    def open(self, index: int) -> Image.Image:
        """Open one file."""
        return Image.open(self.paths[index], formats=formats())

    def take(self, indices: Sequence[int]) -> PathSource:
        """Return the files at these positions."""
        return PathSource([self.paths[i] for i in indices])


class ArraySource:
    """Pictures that a data set gives as one array."""

    def __init__(self, pixels: np.ndarray[Any, Any], title: str, numbers: Sequence[int]) -> None:
        """Hold the pictures.

        Args:
            pixels: (N, h, w, 3) or gray (N, h, w), uint8.
            title: Data set and split, such as ``"cifar10 train"``.
            numbers: N positions in that split.
        """
        self.pixels = pixels
        self.title = title
        self.numbers = numbers

    def __len__(self) -> int:
        """Return N."""
        return len(self.pixels)

    def name(self, index: int) -> str:
        """Return data set, split and position."""
        return f"{self.title} {self.numbers[index]}"

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Return one picture; it costs nothing to decode, so ``at_least`` is not used."""
        return Image.fromarray(np.ascontiguousarray(self.pixels[index]))

    def stacked(self) -> Tensor:
        """Copy all pictures into one (N, 3, h, w) uint8 tensor, gray repeated three times."""
        pixels = self.pixels
        colour = pixels[..., None].repeat(3, axis=-1) if pixels.ndim == 3 else pixels
        return torch.from_numpy(colour.transpose(0, 3, 1, 2).copy())

    def take(self, indices: Sequence[int]) -> ArraySource:
        """Copy the pictures at these positions."""
        chosen = np.asarray(indices)
        return ArraySource(self.pixels[chosen], self.title, [self.numbers[i] for i in indices])

    def order(self, generator: torch.Generator) -> Tensor:
        """Shuffle all pictures."""
        return torch.randperm(len(self), generator=generator)
