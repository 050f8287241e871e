"""Sources of single pictures: files, tar shards, or an array in memory."""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from threading import Lock
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_samix.data.image_files import formats
from ssl_samix.data.shards import Members, Shard
from ssl_samix.errors import check_range

VARIABLE = "SSL_SAMIX_MAX_MEGAPIXELS"
_MAX_MEGAPIXELS = 500  # more than any camera's; in RGB, 2 GB

# exceptions of Pillow for damaged files, depending on format and damage
UNREADABLE = (
    OSError,  # truncated data, PIL.UnidentifiedImageError, files that may not be read
    SyntaxError,  # broken PNG and TIFF headers
    ValueError,
    TypeError,
    LookupError,  # missing TIFF tags
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,  # too many pixels
)
WINDOW = 16  # shards whose images are shuffled together, and so read at the same time
_OPEN = 2 * WINDOW  # files per process; a batch may span two windows


class UnusableImage(OSError):  # noqa: N818  not an error: the file is intact, but unusable
    """A file that cannot be used as a picture; the message says why."""


def described(name: str, error: Exception) -> str:
    """Return the name of an unreadable picture, with the reason if it is not damaged."""
    return f"{name} ({error})" if isinstance(error, UnusableImage) else name


def set_up_pillow() -> None:
    """Set the largest picture size, and silence Pillow's warnings about damaged files.

    Unreadable files are reported by name elsewhere. Filters and limits are set for the process:
    context managers would not be thread-safe.

    Raises:
        ConfigError: ``$SSL_SAMIX_MAX_MEGAPIXELS`` is not a number from 1 on.
    """
    given: object = os.environ.get(VARIABLE) or _MAX_MEGAPIXELS
    with suppress(ValueError):
        given = float(str(given))
    check_range(VARIABLE, given, 1)
    assert isinstance(given, float)
    Image.MAX_IMAGE_PIXELS = int(given * 1e6 / 2)  # Pillow raises above twice this
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


set_up_pillow()  # in workers too: they import this module when they unpickle a source


def open_image(file: str | IO[bytes]) -> Image.Image:
    """Open a picture and read its header.

    Raises:
        One of ``UNREADABLE``.
    """
    try:
        return Image.open(file, formats=formats())
    except Image.DecompressionBombError as error:
        raise _too_large(error) from error
    except RuntimeError as error:  # of the decoders of AVIF and DDS
        raise OSError(str(error)) from error


def _too_large(error: Image.DecompressionBombError) -> UnusableImage:
    found = re.search(r"\d+", str(error))  # the exception has no attributes
    size = f"{int(found[0]) / 1e6:.0f} megapixels" if found else "too many pixels"
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return UnusableImage(f"{size}, and the limit is {most:g}: raise it with {VARIABLE}")


class Source(ABC):
    """Interface of N pictures that are decoded on request."""

    @abstractmethod
    def __len__(self) -> int:
        """Return N."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the picture's name in messages: its path, or its position in a data set."""

    @abstractmethod
    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Return one decoded picture.

        Args:
            index: Position in 0..N-1.
            at_least: The picture may be reduced while decoding, if both sides stay at least this
                many pixels; None for full resolution.

        Raises:
            One of ``UNREADABLE`` for a damaged picture.
        """

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Source:
        """Return the pictures at these positions."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the order of an epoch, (N,) int64: a random order of all pictures."""
        return torch.randperm(len(self), generator=generator)


class EncodedSource(Source):
    """N separately encoded pictures, in any format that Pillow reads."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return one picture, of which only the header is decoded yet.

        Raises:
            One of ``UNREADABLE`` for a damaged one.
        """

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Return one fully decoded picture; a truncated one raises here."""
        with self.open(index) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))  # JPEG only: decodes at 1/2, 1/4 or 1/8
            halved = _is_16_bit_colour(image)
            try:
                image.load()
            except Image.DecompressionBombError as error:  # a picture inside the file
                raise _too_large(error) from error
            except RuntimeError as error:
                raise OSError(str(error)) from error
            if halved and _is_dark(image):
                raise UnusableImage(
                    "Pillow reads only the upper 8 of its 16 bits per channel, here nearly empty: "
                    "convert it to 8 bits"
                )
            return image


def _is_16_bit_colour(image: Image.Image) -> bool:
    """Return whether Pillow will drop half of the bits of a picture that is not loaded yet."""
    tiles = getattr(image, "tile", [])  # codec, box, offset, arguments; gone after loading
    return len(image.getbands()) > 1 and any(";16" in str(tile[3]) for tile in tiles)


def _is_dark(image: Image.Image) -> bool:
    """Return whether all channels except alpha lie in the lowest eighth."""
    channels = [image.getchannel(band) for band in image.getbands() if band != "A"]
    return all(np.asarray(channel).max() < 32 for channel in channels)


class PathSource(EncodedSource):
    """Image files."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path."""
        return self.paths[index]

    def open(self, index: int) -> Image.Image:
        """Open one file."""
        return open_image(self.paths[index])

    def take(self, indices: Sequence[int]) -> PathSource:
        """Return the files at these positions."""
        return PathSource([self.paths[i] for i in indices])


class ArraySource(Source):
    """Pictures in one array."""

    def __init__(self, pixels: np.ndarray[Any, Any], title: str, numbers: Sequence[int]) -> None:
        """Store the pictures.

        Args:
            pixels: (N, h, w, 3) or gray (N, h, w), uint8.
            title: Data set and split, such as ``"cifar10 train"``.
            numbers: N positions in that split.
        """
        self.pixels = pixels
        self.title = title
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        """Return data set, split and position."""
        return f"{self.title} {self.numbers[index]}"

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Return one picture; it needs no decoding, so ``at_least`` is ignored."""
        return Image.fromarray(np.ascontiguousarray(self.pixels[index]))

    def stacked(self) -> Tensor:
        """Return a copy of all pictures, (N, 3, h, w) uint8, gray repeated three times."""
        pixels = self.pixels
        colour = pixels[..., None].repeat(3, axis=-1) if pixels.ndim == 3 else pixels
        return torch.from_numpy(colour.transpose(0, 3, 1, 2).copy())

    def take(self, indices: Sequence[int]) -> ArraySource:
        """Return a source with copies of the pictures at these positions."""
        chosen = np.asarray(indices)
        return ArraySource(self.pixels[chosen], self.title, [self.numbers[i] for i in indices])


class ShardSource(EncodedSource):
    """Images in tar files on a local disk.

    Args:
        shards: K tar files.
        names: N members.
        places: (N, 3) int64: position in ``shards``, offset and size in bytes.
    """

    def __init__(
        self, shards: Sequence[Shard], names: Sequence[str], places: np.ndarray[Any, Any]
    ) -> None:
        assert places.shape == (len(names), 3)
        self.shards, self.names, self.places = list(shards), list(names), places

    @classmethod
    def of(cls, indexed: Sequence[tuple[Shard, Members]]) -> ShardSource:
        """Return a source of all members of some shards."""
        rows = [
            np.stack([np.full(len(m.names), k), np.array(m.offsets), np.array(m.sizes)], axis=1)
            for k, (_, m) in enumerate(indexed)
            if m.names
        ]
        names = [name for _, m in indexed for name in m.names]
        return cls([shard for shard, _ in indexed], names, np.concatenate(rows).astype(np.int64))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the path or URL of the shard, and the member's name."""
        return f"{self.shards[self.places[index, 0]].url}/{self.names[index]}"

    def open(self, index: int) -> Image.Image:
        """Return one member's picture, of which only the header is decoded yet."""
        shard, offset, size = self.places[index].tolist()
        file = _opened(self.shards[shard], os.getpid())
        return open_image(io.BytesIO(file.read(size, offset)))

    def take(self, indices: Sequence[int]) -> ShardSource:
        """Return a source of the members at these positions."""
        chosen = np.asarray(indices, dtype=np.int64)
        return ShardSource(self.shards, [self.names[i] for i in indices], self.places[chosen])

    def order(self, generator: torch.Generator) -> Tensor:
        """Return an order: shuffled shards, and shuffled images within each window of 16 shards."""
        return windowed(torch.from_numpy(self.places[:, 0]), WINDOW, generator)


def windowed(group: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """Return a shuffle of N items in which those of few groups are near each other.

    Args:
        group: (N,) int64, the group of each item.
        window: Groups that are shuffled together.
        generator: Source of the random numbers.

    Returns:
        (N,) int64, a permutation.
    """
    kinds, kind = torch.unique(group, return_inverse=True)
    turn = torch.randperm(len(kinds), generator=generator) // window  # (K,)
    shuffled = torch.randperm(len(group), generator=generator)
    return shuffled[torch.argsort(turn[kind[shuffled]], stable=True)]


class _File:
    """An open file, closed when the last reference to it is gone."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._seeking = Lock()

    def read(self, size: int, offset: int) -> bytes:
        """Return ``size`` bytes from ``offset``; several threads may read at once."""
        if hasattr(os, "pread"):
            return os.pread(self.number, size, offset)
        with self._seeking:  # Windows
            os.lseek(self.number, offset, os.SEEK_SET)
            return os.read(self.number, size)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


# Per process, not per source, so that it is never pickled. A process opens its own files
# (``process`` is its id), and threads share them.
@lru_cache(maxsize=_OPEN)
def _opened(shard: Shard, process: int) -> _File:
    return _File(shard.path)
