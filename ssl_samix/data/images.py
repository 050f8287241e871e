"""Pictures become uint8 tensors: one picture, a set in memory, a set decoded on demand.

Legend: N images in a set, B in a batch, S the image side, h and w the sides of an original.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ssl_samix.data.rgb import to_rgb
from ssl_samix.data.sources import UNREADABLE, EncodedSource, Source
from ssl_samix.errors import DataError

_log = logging.getLogger(__name__)
_CROPPED_FROM = 160  # image sides from here on are cropped out of a larger resize


def fit(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side (antialiased, bilinear) and crop the centre.

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
    # only what is kept is computed: the whole of a 30,000 x 1 picture would not fit in memory
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def resized_side(size: int) -> int:
    """Return the shorter side in pixels from which ``fit`` crops a ``size`` x ``size`` centre."""
    return size if size < _CROPPED_FROM else round(size * 256 / 224)


def to_tensor(image: Image.Image) -> Tensor:
    """Copy an RGB picture into a (3, h, w) uint8 tensor."""
    # numpy copies on this thread; torch would start its own threads for 50 kB, which takes longer
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class ImageSet(Dataset[tuple[Tensor, int]], ABC):
    """N images of one side S, with labels."""

    labels: Tensor  # (N,) int64, -1 where there is no label
    image_size: int  # S in pixels
    unreadable: int  # images found damaged so far, in this process

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one fitted image, (3, S, S) uint8, and its label."""
        return self.load([index])[0], int(self.labels[index])

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the path of an image, or its place in its data set (``"cifar10 train 17"``)."""

    @abstractmethod
    def load(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return fitted images without augmentation, (B, 3, S, S) uint8."""

    @abstractmethod
    def original(self, index: int) -> Tensor:
        """Return one image before fitting, (3, h, w) uint8, for crops out of the full picture."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the order of an epoch, (N,) int64, drawn from ``generator``."""
        return torch.randperm(len(self), generator=generator)


class MemoryImages(ImageSet):
    """Images held as one tensor; ``original`` is the stored pixels, there is nothing larger."""

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        names: Sequence[str],
        unreadable: int = 0,
        source: EncodedSource | None = None,
    ) -> None:
        """Hold the images.

        Args:
            pixels: (N, 3, S, S) uint8.
            labels: (N,) int64, -1 where there is no label.
            names: N names.
            unreadable: How many were skipped while loading.
            source: Where they were, if an epoch goes through them in its order: a run that is
                resumed with another ``data.memory_gb`` sees the same batches.
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

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the order of an epoch, (N,) int64."""
        return super().order(generator) if self.source is None else self.source.order(generator)


class FileImages(ImageSet):
    """Images decoded on demand; a damaged one is replaced by the next good one of its class."""

    def __init__(self, source: Source, labels: Tensor, image_size: int) -> None:
        """Hold where the images are.

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
        self._stand_in: dict[int, int] = {}  # damaged position -> the one that replaces it

    def name(self, index: int) -> str:
        """Return the name of one image."""
        return self.source.name(index)

    def load(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Decode and fit the images at ``indices`` to (B, 3, S, S) uint8.

        Raises:
            DataError: Every image of a class is damaged.
        """
        at_least = 2 * resized_side(self.image_size)  # reducing to twice the size keeps it sharp
        images = [fit(self._decode(int(i), at_least), self.image_size) for i in indices]
        return torch.from_numpy(np.stack([image.numpy() for image in images]))

    def original(self, index: int) -> Tensor:
        """Decode one image to (3, h, w) uint8.

        Raises:
            DataError: Every image of a class is damaged.
        """
        return to_tensor(self._decode(index, None))

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the order of an epoch that suits where the images are, (N,) int64."""
        return self.source.order(generator)

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
        """Use ``position`` in place of ``index`` from now on, and say so once."""
        self._stand_in[index] = position
        self.unreadable += 1
        _log.warning(
            "%s cannot be read (%s): %s takes its place",
            self.name(index),
            reason,
            self.name(position),
        )
