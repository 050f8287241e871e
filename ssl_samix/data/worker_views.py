"""The same recipes, executed image by image with torchvision inside DataLoader workers.

For images that are decoded on demand at 224 px: there, on CPU, Pillow's operations keep level with
a batched computation, and workers have the time (``benchmarks/views.py``). Only the blur is not
torchvision's, which multiplies by the whole square of its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssl_samix.data import transforms
from ssl_samix.data.recipes import BLUR_SIGMA, ViewSpec
from ssl_samix.data.views import RATIO
from ssl_samix.errors import DataError


class WorkerViews:
    """Draws and computes the views of one image, with torch's default generator.

    Args:
        specs: One recipe per view.
        size: Side of the views, in pixels.
    """

    def __init__(self, specs: Sequence[ViewSpec], size: int) -> None:
        """Build one torchvision pipeline per recipe."""
        self._pipelines = [self._pipeline(spec, size) for spec in specs]

    def __call__(self, image: Tensor) -> Tensor:
        """Return the V views of one uint8 (3, h, w) ``image`` as uint8 (V, 3, size, size).

        Raises:
            DataError: If the image is not such a tensor.
        """
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise DataError(
                "views are drawn from a uint8 image (3, h, w), "
                f"got {image.dtype} {tuple(image.shape)}"
            )
        picture = F.to_pil_image(image)
        return torch.stack([F.pil_to_tensor(pipeline(picture)) for pipeline in self._pipelines])

    def _pipeline(self, spec: ViewSpec, size: int) -> v2.Compose:
        """Say a recipe in torchvision's words, in the order that `ViewSpec` states."""
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
    """Crops alone: what needs the picture in full; `BatchedViews.finish` does the rest."""

    def _pipeline(self, spec: ViewSpec, size: int) -> v2.Compose:
        """Return the first step of a recipe."""
        return v2.Compose(_crop(spec, size))


class SeparableBlur:
    """torchvision's random Gaussian blur of a picture, by columns and rows.

    Args:
        kernel_size: Odd width of the kernel, in pixels.
    """

    def __init__(self, kernel_size: int) -> None:
        self.kernel_size = kernel_size

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Blur by a standard deviation drawn from `BLUR_SIGMA`."""
        sigma = torch.empty(1).uniform_(*BLUR_SIGMA)
        pixels = F.pil_to_tensor(picture).float()[None]
        blurred = transforms.gaussian_blur(pixels, sigma, self.kernel_size)[0]
        return F.to_pil_image(blurred.round_().to(torch.uint8))


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
    """Normalise views as they come from workers; equals what `BatchedViews` does to its own.

    Args:
        pixels: (B, 3, S, S) uint8.
        mean: (3,), of values in [0, 1].
        std: (3,), of values in [0, 1].

    Returns:
        (B, 3, S, S) float32, laid out as channels_last.
    """
    return transforms.normalize(pixels, 255 * mean, 255 * std)
