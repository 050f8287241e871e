"""Data module of labelled images with one view each, for probes and fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Sampler

from ssl_samix.data.images import ImageSet
from ssl_samix.data.loader import StepReader, StepSampler, step_seed
from ssl_samix.data.recipes import ViewSpec
from ssl_samix.data.views import ViewMaker
from ssl_samix.types import Batch

# Random crops and flips only: the usual augmentation of frozen probes and fine-tuning.
CROP_AND_FLIP = ViewSpec(
    crop_min=0.08, jitter=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0,
    grayscale=0.0, blur=0.0, solarize=0.0,
)  # fmt: skip


class PickedSampler(Sampler[tuple[int, list[int]]]):
    """Yields (step, indices into the data set) of the picked images, shuffled per epoch."""

    def __init__(self, picks: Sequence[int], batch_size: int, seed: int) -> None:
        self.picks = list(picks)
        self.steps = StepSampler(len(self.picks), batch_size, seed, rank=0, ranks=1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.steps.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for step, positions in self.steps:
            yield step, [self.picks[i] for i in positions]


class LabelledData(pl.LightningDataModule):
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
        return DataLoader(
            StepReader(self.images, self.views.per_image, self.seed, rank=0),
            sampler=PickedSampler(self.picks, self.batch_size, self.seed),
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Draw the views on the device; random numbers are seeded by run seed and step."""
        pixels, label, index, step = batch
        torch.manual_seed(step_seed(self.seed, int(step), 0))
        return Batch(views=self.views(pixels), label=label, index=index)
