"""A picture of the views that a run trains on."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_samix.data.datamodule import DataModule
from ssl_samix.data.subsets import stratified
from ssl_samix.evaluation.measures import view_pixels
from ssl_samix.pictures import MAX_TILE, colours, paint, write_png
from ssl_samix.training.trackers import show_picture

ROWS = 6  # images
DRAWS = 2  # of all views


class ViewPicture(pl.Callback):
    """Writes ``<folder>/views.png`` when a run starts: some images, and their views drawn twice.

    Args:
        folder: Folder of the picture.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "views.png"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the picture, unless a start before this one did; only rank 0 does."""
        if trainer.is_global_zero and not self.file.exists():
            picture = paint_views(trainer.datamodule)  # type: ignore[attr-defined]
            write_png(self.file, picture)
            show_picture(trainer, "views", picture)


@torch.no_grad()
def paint_views(data: DataModule) -> Image.Image:
    """Return a picture with a row per image: the image, and its views; restores the RNG."""
    images, splits = data.splits.train, data.splits
    picks = stratified(images.labels, min(ROWS, len(images)), seed=0).tolist()
    columns, header = [images.load(picks)], ["image"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(DRAWS):
            drawn = data.views(view_pixels(images, picks, data.views.per_image))
            columns += [colours(view, splits.mean, splits.std) for view in drawn]
            header += [f"view {chr(ord('a') + number)}" for number in range(len(drawn))]
    side = min(MAX_TILE, images.image_size)
    tiles = [_fitted(column, side) for column in columns]
    return paint(header, list(zip(*tiles, strict=True)))


def _fitted(pixels: Tensor, side: int) -> Tensor:
    """Return images (K, 3, S, S) as tiles of one size, (K, 3, side, side), both uint8."""
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
