"""Images of an epoch for both sides, and a loader that measures waiting time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import MEAN, STD
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_samix.data.datasets import Splits
from ssl_samix.data.images import ImageSet, MemoryImages

CLASSES = 10


class TimedLoader(DataLoader[Any]):
    """A loader that sums the seconds of waiting for its batches."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = time.perf_counter()
        for batch in super().__iter__():
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()
        self.waited += time.perf_counter() - start


class PILImages(Dataset[tuple[list[Tensor], int]]):
    """Data set of PIL pictures, as lightly's transform gets them from torchvision.

    Args:
        images: Our image set, in memory or files.
        transform: Maps a picture to its views.
    """

    def __init__(self, images: ImageSet, transform: Callable[..., list[Tensor]]) -> None:
        self.images, self.transform = images, transform
        self.pixels = None
        if isinstance(images, MemoryImages):
            self.pixels = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        if self.pixels is not None:
            picture = Image.fromarray(self.pixels[index])
        else:
            picture = self.images.source.image(index).convert("RGB")
        return self.transform(picture), index


def random_splits(count: int, size: int) -> Splits:
    """Return random images in memory, with a fifth as many for validation."""
    train, val = (
        MemoryImages(
            torch.randint(256, (n, 3, size, size), dtype=torch.uint8),
            torch.arange(n) % CLASSES,
            [""] * n,
        )
        for n in (count, max(CLASSES, count // 5))
    )
    classes = tuple(map(str, range(CLASSES)))
    return Splits(train, train, val, classes, MEAN, STD, size)


def words(folder: str | None, count: int, size: int) -> list[str]:
    """Return the arguments that choose the data; for random images, those of a similar set."""
    if folder is None:
        return ["data=cifar10", f"data.image_size={size}"]
    chosen = ["data=cifar10" if (Path(folder) / "cifar-10-batches-py").is_dir() else "data=folder"]
    root = str(Path(folder).resolve())
    return [*chosen, f"data.root={root}", f"data.image_size={size}", f"data.limit={count}"]
