"""Features of two augmented views of the same images, for alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssl_samix.data.images import ImageSet
from ssl_samix.data.recipes import Views
from ssl_samix.data.views import BATCHED_UP_TO, BatchedViews
from ssl_samix.data.worker_views import WorkerViews, normalize
from ssl_samix.modules.ema import evaluating


class DrawsViews(Protocol):
    """What draws views: the DataModule of a run, or a ``ViewDrawer``."""

    @property
    def worker_views(self) -> WorkerViews | None:
        """Draws the views of one original image; None: they are drawn from fitted images."""

    def make_views(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 images (B, 3, S, S), or views (B, V, 3, S, S), to float views."""


class ViewDrawer:
    """Draws the views of a method on a data set, as they are drawn in training.

    Args:
        views: The two recipes.
        size: S, side of the views in px.
        mean: Of the normalisation, per channel.
        std: Likewise.
        flip: Whether a mirrored image still shows the same thing.
        crop_min: Smallest area of a crop that still shows it.
    """

    def __init__(
        self,
        views: Views,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        flip: bool,
        crop_min: float,
    ) -> None:
        self.specs = views.specs(size, flip, crop_min)
        self.batched = BatchedViews(self.specs, size, mean, std)
        self.worker_views = WorkerViews(self.specs, size) if size > BATCHED_UP_TO else None

    def make_views(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 images (B, 3, S, S), or views (B, V, 3, S, S), to float views."""
        batched = self.batched.to(pixels.device)
        if pixels.ndim == 5:
            return tuple(normalize(v, batched.mean, batched.std) for v in pixels.unbind(dim=1))
        return batched(pixels)


@torch.no_grad()
def embed_two_views(
    encoder: nn.Module,
    images: ImageSet,
    picks: Sequence[int],
    views: DrawsViews,
    device: torch.device,
    seed: int = 0,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Embed two views of images in eval mode; the same views at every call and on every rank.

    The random numbers of whoever calls are left as they were.

    Args:
        encoder: Maps (B, 3, S, S) to (B, D).
        images: The data set.
        picks: Which of its images.
        views: Draws them.
        device: Where the encoder is.
        seed: Of the views.
        chunk: Images per forward pass.

    Returns:
        (len(picks), D) float32 on the CPU, of the first views and of the second.
    """
    features: tuple[list[Tensor], list[Tensor]] = ([], [])
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        evaluating(encoder),
    ):
        torch.manual_seed(seed)
        for begin in range(0, len(picks), chunk):
            pixels = _pixels(images, picks[begin : begin + chunk], views.worker_views)
            drawn = views.make_views(pixels.to(device))
            for rows, view in zip(features, drawn[:2], strict=True):
                rows.append(encoder(view).float().cpu())
    return torch.cat(features[0]), torch.cat(features[1])


def _pixels(images: ImageSet, picks: Sequence[int], draw: Any) -> Tensor:
    """Load fitted images, (B, 3, S, S) uint8, or views of the originals, (B, V, 3, S, S) uint8."""
    if draw is None:
        return images.load(picks)
    return torch.stack([draw(images.original(i)) for i in picks])
