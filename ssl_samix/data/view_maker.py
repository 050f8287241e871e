"""Views by their recipes, wherever they are drawn: of a batch on the device, or image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from ssl_samix.data.recipes import ViewSpec
from ssl_samix.data.views import BATCHED_UP_TO, BatchedViews
from ssl_samix.data.worker_views import WorkerViews, normalize


class ViewMaker:
    """Makes the views of images.

    Up to 96 px a batch of fitted images becomes views at once, on its device. Larger images, whose
    crops see the whole picture, and augmentation policies, which are torchvision's, become views
    one by one, where they are read: in the loader's processes.

    Args:
        specs: One recipe per view, already scaled to the images.
        size: S, side of the views in px.
        mean: Of the normalisation, per channel.
        std: Likewise.

    Attributes:
        specs: The recipes.
        per_image: Maps one original, uint8 (3, h, w), to its views (V, 3, S, S); None where views
            are made of the batch.
    """

    def __init__(
        self, specs: Sequence[ViewSpec], size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.specs = tuple(specs)
        one_by_one = size > BATCHED_UP_TO or any(spec.policy != "none" for spec in specs)
        self.per_image = WorkerViews(specs, size) if one_by_one else None
        self._batched = None if one_by_one else BatchedViews(specs, size, mean, std)
        self._mean, self._std = (torch.tensor(v, dtype=torch.float32) for v in (mean, std))
        self._erasing = [
            v2.RandomErasing(spec.erasing, value="random") if spec.erasing else None
            for spec in specs
        ]

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Make normalised views, each (B, 3, S, S) float32, channels_last.

        Args:
            pixels: Fitted images (B, 3, S, S), or what ``per_image`` made, (B, V, 3, S, S); uint8.
        """
        if self._batched is None:
            mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
            views = tuple(normalize(view, mean, std) for view in pixels.unbind(dim=1))
        else:
            views = self._batched.to(pixels.device)(pixels)
        return tuple(
            view if erase is None else _each(erase, view)
            for view, erase in zip(views, self._erasing, strict=True)
        )


def _each(change: v2.Transform, images: Tensor) -> Tensor:
    """Change every image by itself: on a batch, torchvision would draw once for all."""
    changed = torch.stack([change(image) for image in images])
    return changed.contiguous(memory_format=torch.channels_last)
