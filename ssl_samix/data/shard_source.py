"""Random access to pictures in tar shards, in an order that keeps to few shards at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_samix.data.shard_index import Members
from ssl_samix.data.shards import Shard
from ssl_samix.data.sources import EncodedSource, open_image

WINDOW = 16  # shards whose images are shuffled together, and so read at the same time
_OPEN = 2 * WINDOW  # files per process; a batch may span two windows


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
        """Store the positions of the images; nothing is opened yet."""
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
        """Return N."""
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the path or URL of the shard, and the member's name."""
        return f"{self.shards[self.places[index, 0]].url}/{self.names[index]}"

    def open(self, index: int) -> Image.Image:
        """Return one member's picture, of which only the header is decoded yet."""
        shard, offset, size = self.places[index].tolist()
        file = _opened(self.shards[shard], os.getpid())
        return open_image(io.BytesIO(os.pread(file.number, size, offset)))

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
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


# Per process, not per source, so that it is never pickled. A process opens its own files
# (``process`` is its id), and threads share them by pread, which moves no file position.
@lru_cache(maxsize=_OPEN)
def _opened(shard: Shard, process: int) -> _File:
    return _File(shard.path)
