"""The Lightning data module: batches of views on the device.

Images and random numbers of a batch depend on seed, step and rank only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ssl_samix.data.datasets import Splits, load_splits
from ssl_samix.data.images import ImageSet, MemoryImages
from ssl_samix.data.view_spec import Recipes, ViewSpec, smallest_crop
from ssl_samix.data.views import MultiCrop, ViewMaker
from ssl_samix.errors import DataError, check_range
from ssl_samix.processes import worker_count
from ssl_samix.types import Batch


class PerImageViews(Protocol):
    """Interface of a callable that draws the views of one image in a worker process."""

    def __call__(self, image: Image.Image) -> Tensor | tuple[Tensor, ...]:
        """Return the views (V, 3, S, S) uint8 of an RGB picture; one tensor per size."""


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
        seed: Seed of the run.
        rank: Rank of this process.
        ranks: Number of processes.
        order: Maps a generator to the indices of an epoch, (N,) int64; a shuffle of all if None.
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
        """Set the epoch of the next iteration."""
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


class StepReader(Dataset[tuple[Any, Tensor, Tensor, int]]):
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

    def __getitem__(self, item: tuple[int, list[int]]) -> tuple[Any, Tensor, Tensor, int]:
        step, indices = item
        index = torch.tensor(indices)
        if self.views is None:
            pixels = self.images.load(indices)  # (B, 3, S, S)
        else:
            torch.manual_seed(step_seed(self.seed, step, self.rank))
            pixels = default_collate([self.views(self.images.picture(i)) for i in indices])
        return pixels, self.images.labels[index], index, step


class StepLoader(DataLoader[Any]):
    """A DataLoader that does not call its sampler before the first batch is requested.

    Lightning creates the iterator of a resumed run before it calls ``set_epoch``; workers would
    already be reading the batches of epoch 0.

    Attributes:
        waited: Seconds that the training has waited for batches so far.
    """

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        begin = time.perf_counter()
        for batch in super().__iter__():
            self.waited += time.perf_counter() - begin
            yield batch
            begin = time.perf_counter()


class StepData(pl.LightningDataModule):
    """Base of both data modules: draws the views on the device, seeded by run seed and step."""

    images: ImageSet
    views: ViewMaker | MultiCrop
    seed: int
    accelerator = "auto"

    def loader(
        self, sampler: Sampler[tuple[int, list[int]]], workers: int, rank: int = 0
    ) -> DataLoader[Any]:
        """Return the loader of the batches that a sampler yields."""
        return StepLoader(
            StepReader(self.images, self.views.per_image, self.seed, rank),
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.accelerator != "cpu" and torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Draw the views on the device; random numbers are seeded by run seed and step."""
        pixels, label, index, step = batch
        rank = self.trainer.global_rank if self.trainer is not None else 0
        # Seeds all random numbers of this step (views, lam, partners, dropout), so that a resumed
        # run draws the same ones as an uninterrupted run.
        torch.manual_seed(step_seed(self.seed, int(step), rank))
        return Batch(views=self.views(pixels), label=label, index=index)


BATCHES = (8, 256)  # smallest and largest automatic batch
BATCHES_PER_EPOCH = 8  # at least, where the images are enough for the smallest batch


def power_of_two(limit: float) -> int:
    """Return the largest power of two that is not above ``limit``, at least 1."""
    return 1 << max(0, int(limit).bit_length() - 1)


def auto_batch_size(images: int) -> int:
    """Return a power of two: at most an eighth of the images, from 8 to 256.

    Fewer than 8 images are one batch.
    """
    smallest, largest = BATCHES
    return min(images, largest, max(smallest, power_of_two(images / BATCHES_PER_EPOCH)))


class DataModule(StepData):
    """The images of one run.

    Args:
        views: Settings of the views that a batch consists of.
        seed: Seed of the run; orders and views derive from it and from the step.
        batch_size: Images per step, over all devices; or ``auto``, see ``auto_batch_size``.
        flip: Whether views may be mirrored.
        crop_min: Smallest area of a crop, if larger than that of the method's views.
        workers: Processes that decode images, or ``auto``: none if all images are in memory.
        accelerator: Lightning's, of the run.
        **data: The images, as arguments of ``load_splits``.

    Raises:
        DataError: As ``load_splits``, and for a batch size that does not fit data or devices.
    """

    def __init__(
        self,
        *,
        views: Recipes,
        seed: int,
        batch_size: int | Literal["auto"],
        flip: bool,
        crop_min: float | Literal["auto"],
        workers: int | Literal["auto"],
        accelerator: str = "auto",
        **data: Any,
    ) -> None:
        super().__init__()
        check_range("seed", seed, 0)
        if workers != "auto":
            check_range("data.workers", workers, 0)
        self.seed, self.workers, self.accelerator = seed, workers, accelerator
        self.splits: Splits = load_splits(**data)
        self.images = self.splits.train
        images = len(self.images)
        self.batch_size = auto_batch_size(images) if batch_size == "auto" else batch_size
        self._check_batch()
        size, mean, std = self.splits.image_size, self.splits.mean, self.splits.std
        self.crop_min = smallest_crop(size, crop_min)
        self.specs = views.specs(size, flip, self.crop_min)
        device = views.device
        self.large_views = ViewMaker(self.specs, size, mean, std, device, accelerator)
        self.views = self.large_views
        self.small_size: int | None = None  # px, if there are small views
        if small := views.small_specs(size, flip, self.crop_min):
            self.small_size = views.small.side(size)
            maker = ViewMaker(
                small, self.small_size, mean, std, device, accelerator, image_size=size
            )
            self.views = MultiCrop(self.large_views, maker)

    def _check_batch(self) -> None:
        images = len(self.images)
        if self.batch_size < 2:
            raise DataError(
                f"data.batch_size={self.batch_size}: contrastive methods compare images with each "
                "other and need at least 2"
            )
        if self.batch_size > images:
            raise DataError(
                f"data.batch_size={self.batch_size} is larger than the data set ({images} images): "
                + (f"set data.batch_size={images // 2} or less" if images > 3 else "add images")
            )

    @property
    def in_memory(self) -> bool:
        """Whether all images are in memory."""
        return isinstance(self.images, MemoryImages)

    def worker_count(self) -> int:
        """Return the number of worker processes of this rank."""
        if self.workers != "auto":
            return int(self.workers)
        if self.in_memory and self.views.per_image is None:
            return 0  # pickling a batch to another process costs more than indexing it
        # Ranks of this machine: others have cores of their own.
        return worker_count(1 if self.trainer is None else self.trainer.num_devices)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this rank's part of each batch."""
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        if self.batch_size % ranks or self.batch_size // ranks < 2:
            raise DataError(
                f"data.batch_size={self.batch_size} cannot be shared by {ranks} devices: it must be"
                f" a multiple of {ranks} and give each at least 2 images"
            )
        order, size = self.images.order, len(self.images)
        sampler = StepSampler(size, self.batch_size, self.seed, rank, ranks, order=order)
        return self.loader(sampler, self.worker_count(), rank)


# Random crops and flips only: the usual augmentation of frozen probes and fine-tuning.
CROP_AND_FLIP = ViewSpec(
    crop_min=0.08, jitter=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0,
    grayscale=0.0, blur=0.0, solarize=0.0,
)  # fmt: skip


class LabelledData(StepData):
    """A subset of a data set's images, with one augmented view and the label of each.

    Args:
        images: The data set.
        picks: Indices of the images.
        spec: Settings of the view, already scaled to the images.
        mean: Mean of the normalisation, per channel.
        std: Standard deviation of the normalisation, per channel.
        batch_size: Images per step; a smaller set is one batch.
        seed: Orders and views derive from it and from the step.
        workers: Processes that decode images.
    """

    def __init__(
        self,
        images: ImageSet,
        picks: Sequence[int],
        spec: ViewSpec,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.images, self.picks, self.seed, self.workers = images, list(picks), seed, workers
        self.batch_size = min(batch_size, len(self.picks))
        self.views = ViewMaker((spec,), images.image_size, mean, std)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of all steps."""
        picks = torch.tensor(self.picks)

        def order(generator: torch.Generator) -> Tensor:
            return picks[torch.randperm(len(picks), generator=generator)]

        sampler = StepSampler(len(picks), self.batch_size, self.seed, rank=0, ranks=1, order=order)
        return self.loader(sampler, self.workers)
