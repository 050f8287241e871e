"""Robustness of a classifier: calibration, adversarial attack, and corrupted test images.

Noise, blur, contrast and JPEG have the types and strengths of CIFAR-10-C and ImageNet-C
(https://github.com/hendrycks/robustness, ``make_cifar_c.py`` and ``make_imagenet_c.py``; arXiv
1903.12261), and are computed on the fly, for any data set. Results differ from those on the
published sets: noise is drawn anew, pixels are rounded where the scripts truncate, and ImageNet-C
was additionally stored as JPEG.

Legend: B images in a batch, S the image side.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor

from ssl_samix.artifacts.encoder import TrainedClassifier
from ssl_samix.data.images import ImageSet, to_tensor

LARGEST_SMALL = 64  # px; up to this side CIFAR's strengths are used, above it ImageNet's
TRUNCATE = 4  # standard deviations: radius of scikit-image's kernel, which the scripts use

# Noise std of pixels in [0, 1]; blur std in px; contrast factor; JPEG quality. Mild to severe.
Strengths = dict[str, tuple[float, ...]]
CIFAR10_C: Strengths = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "jpeg": (80, 65, 58, 50, 40),
}
IMAGENET_C: Strengths = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "jpeg": (25, 18, 15, 10, 7),
}


def strengths_for(image_size: int) -> tuple[str, Strengths]:
    """Return the benchmark that suits images of this side in px, and its corruption strengths."""
    if image_size <= LARGEST_SMALL:
        return "CIFAR-10-C", CIFAR10_C
    return "ImageNet-C", IMAGENET_C


class CorruptedImages(ImageSet):
    """Images that are corrupted on loading, after resizing.

    Args:
        images: Images to corrupt.
        corruption: Name of the corruption, a key of ``CIFAR10_C``.
        strength: One of the strengths listed there.
    """

    def __init__(self, images: ImageSet, corruption: str, strength: float) -> None:
        self.images = images
        self.corruption = corruption
        self.strength = strength
        self.labels = images.labels
        self.image_size = images.image_size
        self.unreadable = images.unreadable

    def name(self, index: int) -> str:
        """Return the name of one image."""
        return self.images.name(index)

    def original(self, index: int) -> Tensor:
        """Return one image before resizing and corruption, (3, h, w) uint8."""
        return self.images.original(index)

    def load(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return resized, corrupted images, (B, 3, S, S) uint8; the same at every call."""
        pixels = self.images.load(indices)
        if self.corruption == "gaussian_noise":
            return gaussian_noise(pixels, self.strength, [int(i) for i in indices])
        return _WITHOUT_CHANCE[self.corruption](pixels, self.strength)


def gaussian_noise(pixels: Tensor, std: float, seeds: Sequence[int]) -> Tensor:
    """Add Gaussian noise, independent for every pixel and channel.

    Args:
        pixels: (B, 3, S, S) uint8.
        std: Standard deviation of the noise, for pixels in [0, 1].
        seeds: (B,) seed of each image's noise, so that it does not depend on the batch.

    Returns:
        (B, 3, S, S) uint8.
    """
    generator = torch.Generator()
    noise = [torch.randn(pixels.shape[1:], generator=generator.manual_seed(seed)) for seed in seeds]
    return _rounded(pixels + 255 * std * torch.stack(noise))


def gaussian_blur(pixels: Tensor, sigma: float) -> Tensor:
    """Blur (B, 3, S, S) uint8 images with a Gaussian of ``sigma`` px; edges are replicated."""
    radius = int(TRUNCATE * sigma + 0.5)
    width = 2 * radius + 1
    # torchvision pads by reflection; that border is cut off. Blurring the axes one after the other
    # gives the same result in a fraction of the time.
    wide = TF.pad(pixels.float(), [radius] * 4, padding_mode="edge")
    for kernel in ([width, 1], [1, width]):
        wide = TF.gaussian_blur(wide, kernel, [sigma, sigma])
    return _rounded(wide[..., radius:-radius, radius:-radius])


def contrast(pixels: Tensor, factor: float) -> Tensor:
    """Reduce the contrast of (B, 3, S, S) uint8 images about the mean of each image and channel.

    torchvision's ``adjust_contrast`` uses the mean of the greyscale image instead.
    """
    values = pixels.float()
    mean = values.mean(dim=(2, 3), keepdim=True)
    return _rounded((values - mean) * factor + mean)


def jpeg(pixels: Tensor, quality: float) -> Tensor:
    """Compress and decompress (B, 3, S, S) uint8 images as JPEG.

    Uses Pillow, as the scripts do; torchvision has announced the removal of its own encoder.
    """
    return torch.stack([_compressed(image, int(quality)) for image in pixels])


def _compressed(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as compressed:
        return to_tensor(compressed)


_WITHOUT_CHANCE = {"gaussian_blur": gaussian_blur, "contrast": contrast, "jpeg": jpeg}


def _rounded(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)


BINS = 15  # bins of confidence (arXiv 1706.04599, section 5)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error in percent (arXiv 1706.04599, equation 3).

    This is the mean of |accuracy - confidence| over bins of equal width in confidence, each bin
    weighted by its number of images.

    Args:
        logits: (N, C).
        labels: (N,).
        bins: Number of bins.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    gap = (predicted == labels).double() - confidence
    # Every bin includes its upper edge; the first includes its lower edge too.
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add(0, index, gap)
    return 100 * sums.abs().sum().item() / len(labels)


def attacked_logits(
    classifier: TrainedClassifier,
    images: ImageSet,
    strength: float,
    device: torch.device,
    chunk: int = 512,
) -> Tensor:
    """Return logits under the fast gradient sign attack (arXiv 1412.6572), (N, C) on the CPU.

    Every pixel in [0, 1] is changed by ``strength`` in the direction that increases the
    cross-entropy of the true class, and clipped to [0, 1].

    Args:
        classifier: In eval mode, on ``device``; no gradients are accumulated in its weights.
        images: Labelled images, un-augmented.
        strength: Size of the change, such as 8 / 255.
        device: Device to compute on.
        chunk: Images per forward pass.
    """
    mean, std = (
        torch.tensor(v, device=device)[:, None, None] for v in (classifier.mean, classifier.std)
    )
    rows = []
    for begin in range(0, len(images), chunk):
        picks = range(begin, min(begin + chunk, len(images)))
        pixels = images.load(list(picks)).to(device).float().div_(255).requires_grad_(True)
        loss = F.cross_entropy(
            classifier((pixels - mean) / std), images.labels[begin : picks.stop].to(device)
        )
        (slope,) = torch.autograd.grad(loss, pixels)
        with torch.no_grad():
            moved = (pixels + strength * slope.sign()).clamp_(0, 1)
            rows.append(classifier((moved - mean) / std).float().cpu())
    return torch.cat(rows)
