"""The Lightning data module: batches of views on the device."""

from __future__ import annotations

import os
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ssl_samix.data.datasets import Splits, load_splits
from ssl_samix.data.images import MemoryImages
from ssl_samix.data.loader import StepLoader, StepReader, StepSampler, step_seed
from ssl_samix.data.recipes import Recipes
from ssl_samix.data.views import ViewMaker
from ssl_samix.errors import DataError, check_range
from ssl_samix.types import Batch


class DataModule(pl.LightningDataModule):
    """The images of one run.

    Args:
        views: Settings of the views that a batch consists of.
        seed: Seed of the run; orders and views derive from it and from the step.
        name: Data set name.
        root: Its folder; for ``webdataset`` also a pattern or a URL.
        image_size: Side of the views in px, or ``auto``.
        limit: Train on a class-balanced subset of at most this many images.
        batch_size: Images per step, over all devices.
        flip: Whether views may be mirrored.
        crop_min: Smallest area of a crop, if larger than that of the method's views.
        labels: ``auto``, true or false: whether sub-folders of a folder, or the ``.cls`` members
            of shards, are classes.
        download: Let torchvision download what is missing.
        workers: Processes that decode images, or ``auto``; none when all is in memory.
        memory_gb: Hold data sets of up to this many GiB in memory.
        labelled: Train on labelled images only.

    Raises:
        DataError: As ``load_splits``, and for a batch size that does not fit data or devices.
    """

    def __init__(  # noqa: PLR0913 - the keys of the data configuration, by name
        self,
        *,
        views: Recipes,
        seed: int,
        name: str,
        root: str | None,
        image_size: int | Literal["auto"],
        limit: int | None,
        batch_size: int,
        flip: bool,
        crop_min: float,
        labels: bool | Literal["auto"],
        download: bool,
        workers: int | Literal["auto"],
        memory_gb: float,
        labelled: bool = False,
    ) -> None:
        super().__init__()
        check_range("seed", seed, 0)
        check_range("data.memory_gb", memory_gb, 0)
        for key, value in {"limit": limit, "workers": workers, "image_size": image_size}.items():
            if value is not None and value != "auto":
                check_range(f"data.{key}", value, 0 if key == "workers" else 1)
        self.name, self.seed, self.batch_size, self.workers = name, seed, batch_size, workers
        self.splits: Splits = load_splits(
            name,
            root,
            image_size,
            limit,
            download=download,
            labels=labels,
            memory_gb=memory_gb,
            labelled=labelled,
        )
        self._check_batch()
        size, mean, std = self.splits.image_size, self.splits.mean, self.splits.std
        specs = views.specs(size, flip, crop_min)
        self.views = ViewMaker(specs, size, mean, std, views.device)

    def _check_batch(self) -> None:
        images = len(self.splits.train)
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
        """Whether loading a batch is a memory look-up."""
        return isinstance(self.splits.train, MemoryImages)

    def worker_count(self, ranks: int = 1) -> int:
        """Return the number of worker processes per rank."""
        if self.workers != "auto":
            return int(self.workers)
        if self.in_memory and self.views.per_image is None:
            return 0  # pickling a batch to another process costs more than indexing it
        return max(1, min(16, (os.cpu_count() or 1) // ranks))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this rank's part of every step."""
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        if self.batch_size % ranks or self.batch_size // ranks < 2:
            raise DataError(
                f"data.batch_size={self.batch_size} cannot be shared by {ranks} devices: it must be"
                f" a multiple of {ranks} and give each at least 2 images"
            )
        workers, images = self.worker_count(ranks), self.splits.train
        return StepLoader(
            StepReader(images, self.views.per_image, self.seed, rank),
            sampler=StepSampler(
                len(images), self.batch_size, self.seed, rank, ranks, order=images.order
            ),
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Draw the views on the device."""
        pixels, label, index, step = batch
        rank = self.trainer.global_rank if self.trainer is not None else 0
        # Seeds all random numbers of this step (views, lam, partners, dropout), so that a resumed
        # run draws the same ones as an uninterrupted run.
        torch.manual_seed(step_seed(self.seed, int(step), rank))
        return Batch(views=self.views(pixels), label=label, index=index)
