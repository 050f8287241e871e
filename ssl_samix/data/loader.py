"""Loader of whole batches by step: images and random numbers depend on seed, step and rank only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ssl_samix.data.images import ImageSet


class PerImageViews(Protocol):
    """Interface of a callable that draws the views of one image in a worker process."""

    def __call__(self, image: Tensor) -> Tensor:
        """Return the views (V, 3, S, S) of an image (3, h, w), both uint8."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed for torch, mixed from run seed, step and rank (splitmix64's finaliser)."""
    mixed = (
        seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    ) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63


class StepSampler(Sampler[tuple[int, list[int]]]):
    """Yields (step, indices of this rank's part of the batch); drops the last, incomplete batch.

    The order follows from seed and epoch, and a global batch is the same for any number of ranks;
    no index appears twice in an epoch. Lightning calls ``set_epoch``.

    Args:
        size: N images.
        batch_size: Images per step, over all ranks.
        seed: Of the run.
        rank: Of this process.
        ranks: Number of processes.
        order: Maps a generator to the order of an epoch, (N,) int64; a shuffle of all if None.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int,
        ranks: int,
        order: Callable[[torch.Generator], Tensor] | None = None,
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.ranks = rank, ranks
        self.order = order or (lambda generator: torch.randperm(size, generator=generator))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        generator = torch.Generator().manual_seed(step_seed(self.seed, self.epoch, -1))
        order = self.order(generator).tolist()
        share = self.batch_size // self.ranks
        for batch in range(len(self)):
            first = batch * self.batch_size + self.rank * share
            yield self.epoch * len(self) + batch, order[first : first + share]


class StepReader(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """Reads the batch of one step: pixels, labels, indices and the step.

    Args:
        images: The data set.
        views: Draws the views per image here, in the worker, from each image's own pixels;
            None: views are drawn on the device, from fitted images.
        seed: Seed of the run.
        rank: Rank of this process.
    """

    def __init__(self, images: ImageSet, views: PerImageViews | None, seed: int, rank: int) -> None:
        self.images, self.views, self.seed, self.rank = images, views, seed, rank

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, list[int]]) -> tuple[Tensor, Tensor, Tensor, int]:
        step, indices = item
        index = torch.tensor(indices)
        if self.views is None:
            pixels = self.images.load(indices)  # (B, 3, S, S)
        else:
            torch.manual_seed(step_seed(self.seed, step, self.rank))
            pixels = torch.stack([self.views(self.images.original(i)) for i in indices])
        return pixels, self.images.labels[index], index, step


class StepLoader(DataLoader[Any]):
    """A DataLoader that does not call its sampler before the first batch is requested.

    Lightning creates the iterator of a resumed run before it calls ``set_epoch``; workers would
    already be reading the batches of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()
