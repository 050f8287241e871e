"""Pictures of mixtures.

Legend: K mixtures, S image side in px.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from ssl_samix.data.datamodule import DataModule
from ssl_samix.data.images import ImageSet
from ssl_samix.data.subsets import stratified
from ssl_samix.data.views import normalize
from ssl_samix.errors import check_range
from ssl_samix.models.ema import evaluating
from ssl_samix.pictures import Channels, colours, greys, paint, write_png
from ssl_samix.training.trackers import show_picture
from ssl_samix.types import Mixed, MixPlan

MOST_ROWS = 64  # rows of a picture
PER_RUN = 5  # pictures per run, if the interval is ``auto``


def paint_mixed(
    own: Tensor, other: Tensor, mixed: Mixed, lam: Tensor, mean: Channels, std: Channels
) -> Image.Image:
    """Return a picture with a row of image, partner, mask and mixture for each of K mixtures.

    Args:
        own: (K, 3, S, S) normalised images.
        other: (K, 3, S, S), the partner of each.
        mixed: The mixtures.
        lam: (K,) the requested ratios; each row shows the requested and the actual mixing ratio.
        mean: Mean of the normalisation, per channel.
        std: Standard deviation of the normalisation, per channel.
    """
    tiles = [*(colours(i, mean, std) for i in (own, other)), greys(mixed.mask)]
    tiles.append(colours(mixed.images, mean, std))
    left = 1 - mixed.mask.float().cpu().mean(dim=(1, 2, 3))
    captions = [
        f"lam {asked:.2f}\nmask {given:.2f}"
        for asked, given in zip(lam.tolist(), left.tolist(), strict=True)
    ]
    return paint(("image", "partner", "mask", "mixture"), list(zip(*tiles, strict=True)), captions)


class MixedPictures(pl.Callback):
    """Writes pictures of fixed images, mixed by the current policy, during the run.

    Training images without augmentation, always the same pairs with the same ratios from 0.1 to
    0.9: ``<folder>/epoch-0010.png`` after the tenth epoch, and in the trackers. Nothing is written
    without mixing.

    Args:
        folder: Folder of the pictures.
        every_n_epochs: The interval; ``auto`` gives about five pictures. The last epoch has one.
        rows: Mixtures per picture.

    Raises:
        ConfigError: For an interval below 1, or rows outside [1, 64].
    """

    def __init__(
        self, folder: Path, every_n_epochs: int | Literal["auto"] = "auto", rows: int = 8
    ) -> None:
        if every_n_epochs != "auto":
            check_range("callbacks.pictures.every_n_epochs", every_n_epochs, 1)
        check_range("callbacks.pictures.rows", rows, 1, MOST_ROWS)
        self.folder, self.every_n_epochs, self.rows = folder, every_n_epochs, rows

    def interval(self, epochs: int) -> int:
        """Return the number of epochs between two pictures of a run of ``epochs``."""
        if self.every_n_epochs != "auto":
            return int(self.every_n_epochs)
        return math.ceil(epochs / PER_RUN)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a picture if due; only rank 0 does, and the others do not wait."""
        if getattr(pl_module, "mixing", None) is None or not trainer.is_global_zero:
            return
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
        if done % self.interval(epochs) and done != epochs:
            return
        with trainer.precision_plugin.forward_context():
            picture = self.picture(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        write_png(self.folder / f"epoch-{done:04d}.png", picture)
        show_picture(trainer, "mixing", picture)

    @torch.no_grad()
    def picture(self, module: Any, data: DataModule) -> Image.Image:
        """Return a picture of the fixed pairs, mixed by the module's policy; restores the RNG."""
        mean, std, device = data.splits.mean, data.splits.std, module.device
        pixels = fixed_images(data.splits.train, 2 * self.rows).to(device)
        channels = [torch.tensor(values, device=device) for values in (mean, std)]
        own, other = paired(normalize(pixels, *channels), self.rows)
        every = torch.arange(len(own), device=device)
        plan = MixPlan(torch.linspace(0.1, 0.9, len(own), device=device), every, every)
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            evaluating(module.mixing),
        ):
            torch.manual_seed(0)  # random masks are the same in every picture
            maps = module.mixing.maps(module, own, other)
            mixed = module.mixing.policy(own, other, plan, maps)
        return paint_mixed(own, other, mixed, plan.lam, mean, std)


def fixed_images(images: ImageSet, most: int, seed: int = 0) -> Tensor:
    """Return images of all classes, without augmentation, in random order.

    Args:
        images: The data set.
        most: Largest number of images.
        seed: Seed of the choice and the order.

    Returns:
        (N, 3, S, S) uint8.
    """
    picks = stratified(images.labels, most, seed)
    order = torch.randperm(len(picks), generator=torch.Generator().manual_seed(seed))
    return images.load(picks[order])


def paired(images: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the first images with partners, which appear in no other row if there are enough.

    Args:
        images: (N, 3, S, S), at least two.
        rows: Number of pairs.

    Returns:
        Images and partners, (min(rows, N), 3, S, S) each.
    """
    own = torch.arange(min(rows, len(images)))
    other = (own + min(rows, len(images) // 2)) % len(images)
    return images[own], images[other]
