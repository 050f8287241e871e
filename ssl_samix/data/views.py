"""Augmented views: of a whole batch on the device, or image by image in DataLoader workers.

Drawing parameters (`draw`) and applying them (`apply`) are separate, so that a test can give this
code and torchvision the same parameters. Random numbers come from torch's default CPU generator,
separately for every sample: a seed gives the same views on every device, and the host knows
without synchronising which images an operation is for.

Images that are decoded on demand at 224 px are augmented in the workers with torchvision: on a CPU
Pillow's operations are as fast as a batched computation there, and workers are idle otherwise
(``benchmarks/views.py``). Only the blur is our own: torchvision's is not separable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from ssl_samix.data import transforms
from ssl_samix.data.view_spec import BLUR_SIGMA, Views, ViewSpec, scaled
from ssl_samix.errors import ConfigError, DataError

__all__ = ["BatchedViews", "ViewParams", "ViewSpec", "Views", "apply", "draw", "scaled"]

BATCHED_UP_TO = 96  # px; above it, crops are cut from the full picture, in workers
RATIO = (3 / 4, 4 / 3)  # width to height of a crop, as torchvision's RandomResizedCrop
TRIES = 10  # attempts before the central crop is used, likewise
PIECE = 2**20  # values per chunk, so that CPU caches and memory allocator stay fast


@dataclass(frozen=True)
class ViewParams:
    """Parameters of one view of B images; on the CPU."""

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
    border: int = 0  # px of mirrored border around the source; boxes count from it


def draw(spec: ViewSpec, n: int, height: int, width: int) -> ViewParams:
    """Return random parameters of one view of ``n`` images of ``height`` x ``width`` pixels."""
    border = round(spec.pad * min(height, width))
    if border:
        # Crops of the image's own size out of the image with a border, as RandomCrop does.
        top, left = torch.randint(2 * border + 1, (2, n))
        crop_height, crop_width = torch.full_like(top, height), torch.full_like(top, width)
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


def _draw_boxes(
    spec: ViewSpec, n: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return crops as of torchvision's RandomResizedCrop, all tries of all samples at once."""
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    area = torch.empty(TRIES, n).uniform_(spec.crop_min, spec.crop_max)
    area *= height * width
    ratio = torch.empty(TRIES, n).uniform_(low, high).exp()
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (TRIES, B)
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    # Add a try that always fits, the largest central crop; argmax finds the first that fits.
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
    """Return the views that ``params`` describe.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        params: Their parameters, from `draw`.
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
    """Apply an operation to the ``images`` that are ``on`` (B,), in place; others cost nothing.

    ``on`` is on the CPU, so that reading it does not synchronise.
    """
    rows = on.nonzero().squeeze(1)
    if len(rows) > 0:
        there = transforms.sent(rows, images.device)
        changed = change(images.index_select(0, there), *(value[rows] for value in values))
        images.index_copy_(0, there, changed)


class BatchedViews(nn.Module):
    """Draws and computes the views of a batch, on the batch's device.

    Args:
        specs: Settings of each view.
        size: Side of the views, in pixels.
        mean: Per channel, of values in [0, 1], to subtract.
        std: Per channel, to divide by.

    Raises:
        ConfigError: If size, mean or std are out of range.
    """

    mean: Tensor  # (3,)
    std: Tensor  # (3,)

    def __init__(
        self, specs: Sequence[ViewSpec], size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """Check the settings; there are no parameters and no saved state."""
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
        """Return normalised views of uint8 (B, 3, H, W) ``pixels``.

        Returns:
            For each view a (B, 3, size, size) float32 tensor, in channels_last.

        Raises:
            DataError: If the pixels have another type or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise DataError(
                "views are drawn from uint8 images (B, 3, H, W), "
                f"got {pixels.dtype} {tuple(pixels.shape)}"
            )
        return self._in_pieces(pixels, self._views)

    @torch.no_grad()
    def finish(self, crops: Tensor) -> tuple[Tensor, ...]:
        """Return views from crops: mirrored, with changed colours, normalised.

        Args:
            crops: (B, V, 3, size, size) uint8, one per view, from `WorkerCrops`.
        """
        return self._in_pieces(crops, self._finished)

    def _in_pieces(
        self, pixels: Tensor, work: Callable[[Tensor], list[Tensor]]
    ) -> tuple[Tensor, ...]:
        piece = len(pixels)
        if pixels.device.type == "cpu":
            piece = max(1, PIECE // (3 * self.size**2))
        # Autocast would resample in half precision, with visible errors.
        with torch.autocast(pixels.device.type, enabled=False):
            pieces = [work(part) for part in pixels.split(piece)]
        return tuple(torch.cat(views) for views in zip(*pieces, strict=True))

    def _views(self, pixels: Tensor) -> list[Tensor]:
        """Return every view of some images."""
        images = pixels.float().div_(255)
        count, _, height, width = images.shape
        views = []
        for spec in self.specs:
            params = draw(spec, count, height, width)
            view = apply(images, params, self.size)
            views.append(transforms.normalize(view, self.mean, self.std))
        return views

    def _finished(self, crops: Tensor) -> list[Tensor]:
        """Return the views of some images from their crops."""
        views = []
        for spec, crop in zip(self.specs, crops.unbind(1), strict=True):
            params = draw(spec, len(crop), self.size, self.size)
            view = crop.float().div_(255)
            _change(view, params.flip, partial(torch.flip, dims=(3,)))
            views.append(transforms.normalize(recolour(view, params), self.mean, self.std))
        return views


class ViewMaker:
    """Computes views of images in the fastest suitable place.

    Three ways, of which ``auto`` takes the fastest that gives the same views:

    - Up to 96 px a batch of fitted images becomes views at once, on its device (``batched``).
    - Larger images, whose crops see the whole picture, are cropped one by one where they are
      decoded, in the loader's processes; the rest is done with the whole batch, on its device
      (``batched``; for ``auto`` where that is a GPU).
    - Everything is done image by image, in the loader's processes (``workers``; for ``auto``
      without a GPU). Augmentation policies (torchvision's) need this way.

    Args:
        specs: Settings of each view, already scaled to the images.
        size: S, side of the views in px.
        mean: Mean of the normalisation, per channel.
        std: Standard deviation of the normalisation, per channel.
        device: ``auto``, ``batched`` or ``workers``.
        accelerator: Lightning's, of the run: with ``cpu`` a GPU of this machine is not used.
        image_size: Side of the images in px, if views are smaller; decides between the ways.

    Raises:
        ConfigError: If a policy is to be batched.

    Attributes:
        specs: Settings of each view.
        per_image: Maps one whole picture to its views, (V, 3, S, S) uint8, complete or only
            cropped; None if views are computed from the batch.
    """

    def __init__(
        self,
        specs: Sequence[ViewSpec],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: str = "auto",
        accelerator: str = "auto",
        image_size: int | None = None,
    ) -> None:
        self.specs = tuple(specs)
        gpu = accelerator != "cpu" and torch.cuda.is_available()
        policy = any(spec.policy != "none" for spec in specs)
        if policy and device == "batched":
            raise ConfigError(
                "an augmentation policy is drawn image by image: set device to workers or auto"
            )
        large = (image_size or size) > BATCHED_UP_TO
        if device == "auto" and (policy or (large and not gpu)):
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
        """Return normalised views, each (B, 3, S, S) float32, in channels_last.

        Args:
            pixels: Fitted images (B, 3, S, S), or output of ``per_image``, (B, V, 3, S, S); uint8.
        """
        if self._batched is None:
            if self._mean.device != pixels.device:  # the first batch: each copy is a wait
                self._mean, self._std = self._mean.to(pixels.device), self._std.to(pixels.device)
            views = tuple(normalize(v, self._mean, self._std) for v in pixels.unbind(dim=1))
        else:
            batched = self._batched.to(pixels.device)
            views = batched(pixels) if self.per_image is None else batched.finish(pixels)
        return tuple(
            view if erase is None else _erased(view, erase)
            for view, erase in zip(views, self._erasing, strict=True)
        )


def _erased(views: Tensor, erasing: v2.RandomErasing) -> Tensor:
    """Return views (B, 3, S, S) with rectangles of noise, drawn for each image, in place.

    Equals torchvision's transform of each image, but copies the noise of all of them at once.
    """
    drawn = [(i, erasing.make_params([v])) for i, v in enumerate(views) if _happens(erasing.p)]
    boxes = [(i, box) for i, box in drawn if box["v"] is not None]
    if boxes:
        noise = torch.cat([box["v"].flatten() for _, box in boxes])
        noise = noise.pin_memory() if views.device.type == "cuda" else noise
        sizes = [box["v"].numel() for _, box in boxes]
        parts = transforms.sent(noise, views.device).split(sizes)
        for (image, box), part in zip(boxes, parts, strict=True):
            i, j, h, w = (box[name] for name in "ijhw")
            views[image, :, i : i + h, j : j + w] = part.view_as(box["v"])
    return views


def _happens(probability: float) -> bool:
    return bool(torch.rand(1) < probability)


class MultiCrop:
    """Computes large and small views of the same images; the large ones as without small ones.

    Args:
        large: Makes the large views.
        small: Makes the small ones, in the same way.

    Attributes:
        per_image: As of `ViewMaker`, but returns the large and the small views of an image.
    """

    def __init__(self, large: ViewMaker, small: ViewMaker) -> None:
        self._large, self._small = large, small
        self.per_image: TwoSizes | None = None
        if large.per_image is not None and small.per_image is not None:
            self.per_image = TwoSizes(large.per_image, small.per_image)

    def __call__(self, pixels: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return normalised views, large ones first, each (B, 3, side, side) float32.

        Args:
            pixels: Fitted images, or a batch of what ``per_image`` returns.
        """
        large, small = (pixels, pixels) if isinstance(pixels, Tensor) else pixels
        return self._large(large) + self._small(small)


class WorkerViews:
    """Draws and computes the views of one image, with torch's default generator.

    Args:
        specs: Settings of each view.
        size: Side of the views, in pixels.
    """

    def __init__(self, specs: Sequence[ViewSpec], size: int) -> None:
        """Build one torchvision pipeline per view."""
        self._pipelines = [self._pipeline(spec, size) for spec in specs]

    def __call__(self, image: Tensor | Image.Image) -> Tensor:
        """Return the V views of an RGB picture, or uint8 (3, h, w), as uint8 (V, 3, size, size).

        Raises:
            DataError: If the image has another type or shape.
        """
        if isinstance(image, Image.Image):
            return self._views(image)
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise DataError(
                "views are drawn from a uint8 image (3, h, w), "
                f"got {image.dtype} {tuple(image.shape)}"
            )
        return self._views(TF.to_pil_image(image))

    def _views(self, picture: Image.Image) -> Tensor:
        return torch.stack([TF.pil_to_tensor(pipeline(picture)) for pipeline in self._pipelines])

    def _pipeline(self, spec: ViewSpec, size: int) -> v2.Compose:
        """Return the torchvision transforms of a view, in the order of `ViewSpec`."""
        jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
        blur = SeparableBlur(transforms.blur_kernel_size(size))
        return v2.Compose(
            [
                *_crop(spec, size),
                v2.RandomHorizontalFlip(spec.flip),
                *_policy(spec),
                v2.RandomApply([jitter], p=spec.jitter),
                v2.RandomGrayscale(spec.grayscale),
                v2.RandomApply([blur], p=spec.blur),
                v2.RandomSolarize(threshold=128, p=spec.solarize),
            ]
        )


class WorkerCrops(WorkerViews):
    """Cuts only the crops, which need the full picture; `BatchedViews.finish` does the rest."""

    def _pipeline(self, spec: ViewSpec, size: int) -> v2.Compose:
        """Return the transform that crops."""
        return v2.Compose(_crop(spec, size))


class TwoSizes:
    """Draws views of one image in two sizes.

    Args:
        large: Draws the large views.
        small: Draws the small ones.
    """

    def __init__(self, large: WorkerViews, small: WorkerViews) -> None:
        self._large, self._small = large, small

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Return the large and the small views, each uint8 (V, 3, side, side)."""
        return self._large(image), self._small(image)


class SeparableBlur:
    """torchvision's random Gaussian blur of a picture, computed by columns and rows.

    Args:
        kernel_size: Odd width of the kernel, in pixels.
    """

    def __init__(self, kernel_size: int) -> None:
        self.kernel_size = kernel_size

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the picture blurred by a standard deviation drawn from `BLUR_SIGMA`."""
        sigma = torch.empty(1).uniform_(*BLUR_SIGMA)
        pixels = TF.pil_to_tensor(picture).float()[None]
        blurred = transforms.gaussian_blur(pixels, sigma, self.kernel_size)[0]
        return TF.to_pil_image(blurred.round_().to(torch.uint8))


def _crop(spec: ViewSpec, size: int) -> list[v2.Transform]:
    if not spec.pad:
        area = (spec.crop_min, spec.crop_max)
        return [v2.RandomResizedCrop(size, scale=area, ratio=RATIO, antialias=True)]
    border = round(spec.pad * size)
    shifted = v2.RandomCrop(size, padding=border, padding_mode="reflect")
    return [v2.Resize(size, antialias=True), v2.CenterCrop(size), shifted]


def _policy(spec: ViewSpec) -> list[v2.Transform]:
    if spec.policy == "randaugment":
        return [v2.RandAugment(spec.operations, int(spec.magnitude))]
    return [v2.TrivialAugmentWide()] if spec.policy == "trivialaugment" else []


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return normalised views from workers; equals the normalisation of `BatchedViews`.

    Args:
        pixels: (B, 3, S, S) uint8.
        mean: (3,), of values in [0, 1].
        std: (3,), of values in [0, 1].

    Returns:
        (B, 3, S, S) float32, in channels_last.
    """
    return transforms.normalize(pixels, 255 * mean, 255 * std)
