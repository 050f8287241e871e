"""Views of a whole batch at once: drawing their parameters, and computing them.

Drawing (`draw`) and applying (`apply`) are apart, so that a test can give both this code and
torchvision the same parameters. Every random number comes from torch's default generator of the
CPU, and every sample has its own: a seed gives the same views on every device, and a GPU is never
asked which images an operation is for, which would let it run dry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_samix.data import transforms
from ssl_samix.data.recipes import BLUR_SIGMA, Views, ViewSpec, scaled
from ssl_samix.errors import ConfigError, DataError

__all__ = ["BatchedViews", "ViewParams", "ViewSpec", "Views", "apply", "draw", "scaled"]

BATCHED_UP_TO = 96  # px; above it, crops come from each image's own pixels, in workers
RATIO = (3 / 4, 4 / 3)  # width to height of a crop, as torchvision's RandomResizedCrop
TRIES = 10  # crops drawn before the central one is taken, likewise
PIECE = 2**20  # values that the CPU's caches and memory allocator take at once without pain


@dataclass(frozen=True)
class ViewParams:
    """What was drawn for one view of B images; on the CPU."""

    top: Tensor  # (B,) int64, pixels of the source, as the three below
    left: Tensor  # (B,) int64
    height: Tensor  # (B,) int64
    width: Tensor  # (B,) int64
    flip: Tensor  # (B,) bool
    jitter: Tensor  # (B,) bool
    factors: Tensor  # (B, 4) float: brightness, contrast, saturation, hue
    order: Tensor  # (B, 4) int64, a permutation of 0..3 per row
    grayscale: Tensor  # (B,) bool
    blur: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float, pixels of the view
    solarize: Tensor  # (B,) bool
    border: int = 0  # mirrored pixels around the source, which the box is counted from


def draw(spec: ViewSpec, n: int, height: int, width: int) -> ViewParams:
    """Draw the parameters of one view of ``n`` images of ``height`` x ``width`` pixels."""
    border = round(spec.pad * min(height, width))
    if border:
        top, left, crop_height, crop_width = _draw_shifts(border, n, height, width)
    else:
        top, left, crop_height, crop_width = _draw_boxes(spec, n, height, width)
    chances = [spec.flip, spec.jitter, spec.grayscale, spec.blur, spec.solarize]
    events = torch.rand(5, n) < torch.tensor(chances).unsqueeze(1)
    flip, jitter, grayscale, blur, solarize = events  # each (B,)
    reach = (spec.brightness, spec.contrast, spec.saturation)
    low = torch.tensor([*(max(0.0, 1 - r) for r in reach), -spec.hue])
    high = torch.tensor([*(1 + r for r in reach), spec.hue])
    return ViewParams(
        top=top,
        left=left,
        height=crop_height,
        width=crop_width,
        flip=flip,
        jitter=jitter,
        factors=low + (high - low) * torch.rand(n, 4),
        order=torch.rand(n, 4).argsort(1),
        grayscale=grayscale,
        blur=blur,
        sigma=torch.empty(n).uniform_(*BLUR_SIGMA),
        solarize=solarize,
        border=border,
    )


def _draw_shifts(
    border: int, n: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw crops of the image's own size out of the image with a border, as RandomCrop does."""
    top, left = torch.randint(2 * border + 1, (2, n))
    return top, left, torch.full_like(top, height), torch.full_like(top, width)


def _draw_boxes(
    spec: ViewSpec, n: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw crops as torchvision's RandomResizedCrop does, all tries of all samples at once."""
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    area = torch.empty(TRIES, n).uniform_(spec.crop_min, spec.crop_max)
    area *= height * width
    ratio = torch.empty(TRIES, n).uniform_(low, high).exp()
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (TRIES, B)
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    # One more try that always fits, the largest central crop; argmax is the first that fits.
    wide = torch.cat([wide, wide.new_full((1, n), min(width, round(height * RATIO[1])))])
    tall = torch.cat([tall, tall.new_full((1, n), min(height, round(width / RATIO[0])))])
    first = torch.cat([fits, fits.new_ones(1, n)]).int().argmax(0, keepdim=True)  # (1, B)
    wide, tall = wide.gather(0, first)[0], tall.gather(0, first)[0]  # (B,)
    room = torch.stack([height - tall, width - wide])  # (2, B)
    corner = (torch.rand(2, n) * (room + 1)).floor()
    corner = torch.where(first == TRIES, (room / 2).floor(), corner)
    top, left = corner.long()
    return top, left, tall.long(), wide.long()


def apply(images: Tensor, params: ViewParams, size: int) -> Tensor:
    """Compute the views that ``params`` describe.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        params: What `draw` gave for them.
        size: Side of the views, in pixels.

    Returns:
        (B, 3, size, size) float in [0, 1].
    """
    drawn = (params.top, params.left, params.height, params.width, params.flip)
    *box, flip = (transforms.sent(values, images.device) for values in drawn)
    if params.border:
        images = F.pad(images, [params.border] * 4, mode="reflect")
    return recolour(transforms.crop_resize(images, tuple(box), flip, size), params)


def recolour(views: Tensor, params: ViewParams) -> Tensor:
    """Change the colours of crops, (B, 3, S, S) float in [0, 1], in place, as ``params`` say."""
    kernel_size = transforms.blur_kernel_size(views.shape[-1])
    blur = partial(transforms.gaussian_blur, kernel_size=kernel_size)
    _change(views, params.jitter, transforms.color_jitter, params.factors, params.order)
    _change(views, params.grayscale, transforms.grayscale)
    _change(views, params.blur, blur, params.sigma)
    _change(views, params.solarize, transforms.solarize)
    return views


def _change(images: Tensor, on: Tensor, change: Callable[..., Tensor], *values: Tensor) -> None:
    """Change those ``images`` that are ``on`` (B,), in place; the others cost nothing.

    What was drawn is on the CPU, where looking at it makes nobody wait.
    """
    rows = on.nonzero().squeeze(1)
    if len(rows) > 0:
        there = transforms.sent(rows, images.device)
        changed = change(images.index_select(0, there), *(value[rows] for value in values))
        images.index_copy_(0, there, changed)


class BatchedViews(nn.Module):
    """Draws and computes the views of a batch, on the device that the batch is on.

    Args:
        specs: One recipe per view.
        size: Side of the views, in pixels.
        mean: Per channel, of values in [0, 1], to subtract.
        std: Per channel, to divide by.

    Raises:
        ConfigError: If the size, mean or std make no views.
    """

    mean: Tensor  # (3,)
    std: Tensor  # (3,)

    def __init__(
        self, specs: Sequence[ViewSpec], size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """Check the settings; there are no parameters, and nothing that a checkpoint keeps."""
        super().__init__()
        if any(spec.policy != "none" for spec in specs):
            raise ConfigError("an augmentation policy is for views that are drawn image by image")
        if size < 2 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError(
                "views need a size of at least 2 pixels, three means and three positive standard "
                f"deviations, got size {size}, mean {list(mean)}, std {list(std)}"
            )
        self.specs = tuple(specs)
        self.size = size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the views of uint8 (B, 3, H, W) ``pixels``, normalised.

        Returns:
            Per recipe a (B, 3, size, size) float32 tensor, laid out as channels_last.

        Raises:
            DataError: If the pixels are not such a tensor.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise DataError(
                "views are drawn from uint8 images (B, 3, H, W), "
                f"got {pixels.dtype} {tuple(pixels.shape)}"
            )
        return self._in_pieces(pixels, self._views)

    @torch.no_grad()
    def finish(self, crops: Tensor) -> tuple[Tensor, ...]:
        """Return the views that crops become: mirrored, changed in their colours, normalised.

        Args:
            crops: (B, V, 3, size, size) uint8, one per recipe, as `WorkerCrops` makes them.
        """
        return self._in_pieces(crops, self._finished)

    def _in_pieces(
        self, pixels: Tensor, work: Callable[[Tensor], list[Tensor]]
    ) -> tuple[Tensor, ...]:
        piece = len(pixels)
        if pixels.device.type == "cpu":
            piece = max(1, PIECE // (3 * self.size**2))
        # Autocast would resample in half precision, which shows in the images.
        with torch.autocast(pixels.device.type, enabled=False):
            pieces = [work(part) for part in pixels.split(piece)]
        return tuple(torch.cat(views) for views in zip(*pieces, strict=True))

    def _views(self, pixels: Tensor) -> list[Tensor]:
        """Draw and compute every view of some images."""
        images = pixels.float().div_(255)
        count, _, height, width = images.shape
        views = []
        for spec in self.specs:
            params = draw(spec, count, height, width)
            view = apply(images, params, self.size)
            views.append(transforms.normalize(view, self.mean, self.std))
        return views

    def _finished(self, crops: Tensor) -> list[Tensor]:
        """Draw and compute, for every crop of some images, what comes after the crop."""
        views = []
        for spec, crop in zip(self.specs, crops.unbind(1), strict=True):
            params = draw(spec, len(crop), self.size, self.size)
            view = crop.float().div_(255)
            _change(view, params.flip, partial(torch.flip, dims=(3,)))
            views.append(transforms.normalize(recolour(view, params), self.mean, self.std))
        return views
