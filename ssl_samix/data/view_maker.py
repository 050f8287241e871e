"""Views by their recipes, wherever they are drawn: of a batch on the device, or image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from ssl_samix.data.recipes import ViewSpec
from ssl_samix.data.views import BATCHED_UP_TO, BatchedViews
from ssl_samix.data.worker_views import WorkerCrops, WorkerViews, normalize
from ssl_samix.errors import ConfigError


class ViewMaker:
    """Makes the views of images.

    Three ways, of which ``auto`` takes the fastest that gives the same views:

    - Up to 96 px a batch of fitted images becomes views at once, on its device (``batched``).
    - Larger images, whose crops see the whole picture, are cropped one by one where they are
      decoded, in the loader's processes; the rest is done with the whole batch, on its device
      (``batched``; for ``auto`` where that is a GPU).
    - Everything is done image by image, in the loader's processes (``workers``; for ``auto``
      without a GPU). Augmentation policies, which are torchvision's, know this way only.

    Args:
        specs: One recipe per view, already scaled to the images.
        size: S, side of the views in px.
        mean: Of the normalisation, per channel.
        std: Likewise.
        device: ``auto``, ``batched`` or ``workers``.

    Raises:
        ConfigError: If a policy is to be batched.

    Attributes:
        specs: The recipes.
        per_image: Maps one original, uint8 (3, h, w), to its views (V, 3, S, S), finished or
            not; None where views are made of the batch.
    """

    def __init__(
        self,
        specs: Sequence[ViewSpec],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: str = "auto",
    ) -> None:
        self.specs = tuple(specs)
        policy = any(spec.policy != "none" for spec in specs)
        if policy and device == "batched":
            raise ConfigError(
                "an augmentation policy is drawn image by image: set device to workers or auto"
            )
        large = size > BATCHED_UP_TO
        if device == "auto" and (policy or (large and not torch.cuda.is_available())):
            device = "workers"
        self._batched: BatchedViews | None = None
        self.per_image: WorkerViews | None = None
        if device == "workers":
            self.per_image = WorkerViews(specs, size)
        else:
            self._batched = BatchedViews(specs, size, mean, std)
            self.per_image = WorkerCrops(specs, size) if large else None
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
            batched = self._batched.to(pixels.device)
            views = batched(pixels) if self.per_image is None else batched.finish(pixels)
        return tuple(
            view if erase is None else _each(erase, view)
            for view, erase in zip(views, self._erasing, strict=True)
        )


def _each(change: v2.Transform, images: Tensor) -> Tensor:
    """Change every image by itself: on a batch, torchvision would draw once for all."""
    changed = torch.stack([change(image) for image in images])
    return changed.contiguous(memory_format=torch.channels_last)
