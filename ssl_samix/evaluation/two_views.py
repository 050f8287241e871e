"""Features of two augmented views of the same images, for alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_samix.data.images import ImageSet
from ssl_samix.data.view_maker import ViewMaker
from ssl_samix.modules.ema import evaluating


@torch.no_grad()
def embed_two_views(
    encoder: nn.Module,
    images: ImageSet,
    picks: Sequence[int],
    views: ViewMaker,
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
        views: Makes them.
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
            pixels = _pixels(images, picks[begin : begin + chunk], views.per_image)
            drawn = views(pixels.to(device))
            for rows, view in zip(features, drawn[:2], strict=True):
                rows.append(encoder(view).float().cpu())
    return torch.cat(features[0]), torch.cat(features[1])


def _pixels(images: ImageSet, picks: Sequence[int], draw: Any) -> Tensor:
    """Load fitted images, (B, 3, S, S) uint8, or views of the originals, (B, V, 3, S, S) uint8."""
    if draw is None:
        return images.load(picks)
    return torch.stack([draw(images.original(i)) for i in picks])
