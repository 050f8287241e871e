"""Image operations on a batch, with separate parameters for each sample.

torchvision's v2 transforms give every sample of a batch the same parameters, which is useless for
self-supervised learning; these are the same operations, equal to torchvision's sample by sample,
in a few batched tensor operations that run where the images are.

Images are float (B, 3, H, W) in [0, 1]; parameters are (B,), one per sample. Nothing here draws
random numbers, and no argument is written to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RED, GREEN, BLUE = 0.2989, 0.587, 0.114  # ITU-R 601-2 luma, rounded as torchvision rounds it


def crop_resize(images: Tensor, box: tuple[Tensor, ...], flip: Tensor, size: int) -> Tensor:
    """Return a box of each image, resized to a square, and mirrored where ``flip`` is True.

    Equals torchvision's ``resized_crop(..., antialias=True)``, bilinear, then ``horizontal_flip``:
    a separable resampling, so two batched matrix products per image.

    Args:
        images: (B, 3, H, W) float.
        box: Top, left, height and width, each (B,) integer, in pixels, inside the image.
        flip: (B,) bool, True to mirror left and right.
        size: Side of the result, in pixels.

    Returns:
        (B, 3, size, size).
    """
    top, left, height, width = box
    count, channels, rows, columns = images.shape
    upright = torch.zeros_like(flip)
    down = _resampling(top, height, upright, rows, size)  # (B, size, H)
    across = _resampling(left, width, flip, columns, size)  # (B, size, W)
    lines = images.reshape(count, channels * rows, columns)  # a view: one product per image
    lines = torch.bmm(lines, across.transpose(1, 2))  # (B, 3 * H, size)
    return down.unsqueeze(1) @ lines.view(count, channels, rows, size)  # (B, 3, size, size)


def _resampling(start: Tensor, extent: Tensor, mirror: Tensor, source: int, size: int) -> Tensor:
    """Return the (B, size, source) matrices that resample ``extent`` pixels from ``start`` on.

    A triangle of half-width max(scale, 1) around (i + 0.5) * scale, cut off at the border of the
    crop, rows summing to one: what Pillow and torch's antialias compute.
    """
    device = start.device
    start, extent = start.float().unsqueeze(1), extent.float().unsqueeze(1)  # (B, 1)
    scale = extent / size
    inverse = scale.clamp(min=1).reciprocal()
    centre = (torch.arange(size, device=device) + 0.5) * scale  # (B, size), from the crop's edge
    centre = torch.where(mirror.unsqueeze(1), centre.flip(1), centre) * inverse
    pixel = torch.arange(source, device=device) + 0.5 - start  # (B, source)
    inside = (pixel > 0) & (pixel < extent)
    # A pixel outside of the crop is infinitely far away: its weight is zero at no further cost.
    pixel = torch.where(inside, pixel * inverse, torch.inf)
    weight = pixel.unsqueeze(1) - centre.unsqueeze(2)  # (B, size, source)
    weight = weight.abs_().neg_().add_(1).clamp_(min=0)
    return weight.div_(weight.sum(2, keepdim=True))


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale (B, 3, H, W) images by their ``factor`` (B,) >= 0, as torchvision's function does."""
    return (images * _per_image(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend (B, 3, H, W) images with their mean grey by ``factor`` (B,) >= 0, as torchvision."""
    factor = _per_image(factor)
    grey = _luma(images).mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return (images * factor).add_(grey * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend (B, 3, H, W) images with their grey version by ``factor`` (B,) >= 0, as torchvision."""
    factor = _per_image(factor)
    return (images * factor).add_(_luma(images) * (1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Rotate the hue of (B, 3, H, W) images by ``factor`` (B,) in [-0.5, 0.5] turns of HSV.

    Equals torchvision's function, by the closed form of HSV to RGB: a channel is
    value - chroma * clamp(2 - |sixths of a turn to the channel's opposite hue|, 0, 1).
    """
    red, green, blue = images.unbind(1)  # each (B, H, W)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Chroma times sixths of a turn, by the largest channel. lerp by exactly 0 or 1 selects exactly
    # and, unlike where, does not branch on every pixel: four times faster on CPU.
    sixths = (red - green).add_(chroma, alpha=4)
    sixths = sixths.lerp_((blue - red).add_(chroma, alpha=2), (green - value).eq_(0))
    sixths = sixths.lerp_(green - blue, (red - value).eq_(0))
    # A grey pixel has no hue: with chroma 0 any finite number is right, so avoid only 0 / 0.
    turns = sixths.div_(chroma.clamp(min=1e-12)).mul_(1 / 6).add_(factor.view(-1, 1, 1))
    opposite = sent(torch.tensor([3 / 6, 1 / 6, -1 / 6]), images.device).view(3, 1, 1)
    distance = turns.unsqueeze(1) + opposite  # (B, 3, H, W)
    distance = distance.sub_(distance.round()).abs_()  # turns, the shorter way round
    share = distance.mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(1), chroma.unsqueeze(1), share, value=-1)


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Apply the four adjustments of torchvision's ``ColorJitter`` in an order per sample.

    Args:
        images: (B, 3, H, W) float.
        factors: (B, 4), the factors of brightness, contrast, saturation and hue, on the CPU.
        order: (B, 4) int64, row b the order in which image b gets operations 0 to 3 of `JITTER`;
            on the CPU, so that the number per operation is known without synchronising.

    Returns:
        (B, 3, H, W).
    """
    device = images.device
    counts = F.one_hot(order, len(JITTER)).sum(0).tolist()  # [slot][operation]
    rows = torch.arange(len(images))  # index of the image in each row
    # Two alternating buffers: on a CPU, new memory for every slot costs more than the arithmetic.
    buffers = torch.empty_like(images), torch.empty_like(images)
    for slot, count in enumerate(counts):
        # Sorted by operation, the samples of each are contiguous.
        step = order[rows, slot].argsort()
        rows = rows[step]
        values = sent(factors[rows], device).split(count)
        images = torch.index_select(images, 0, sent(step, device), out=buffers[slot % 2])
        for operation, piece in enumerate(images.split(count)):
            piece.copy_(JITTER[operation](piece, values[operation][:, operation]))
    return torch.index_select(images, 0, sent(rows.argsort(), device), out=buffers[0])


def grayscale(images: Tensor) -> Tensor:
    """Return the luma of (B, 3, H, W) images in all three channels, as torchvision."""
    return _luma(images).expand_as(images)


def solarize(images: Tensor) -> Tensor:
    """Invert the values of (B, 3, H, W) images at or above 0.5, as torchvision with that threshold.

    The smaller of x and 1 - x is just that, without a branch on every pixel.
    """
    return torch.minimum(images, 1 - images)


def blur_kernel_size(size: int) -> int:
    """Return the odd width, in pixels, of the blur's kernel: a tenth of the image's side.

    As SimCLR does it (arXiv 2002.05709, appendix A): 23 at 224 px, 9 at 96 px; at least 3.
    """
    return 2 * max(size // 20, 1) + 1


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Blur each image by its own Gaussian, as torchvision's function: reflecting borders.

    Args:
        images: (B, 3, H, W) float, both sides longer than half the kernel.
        sigma: (B,) standard deviations, in pixels, > 0.
        kernel_size: Odd width of the kernel, in pixels.

    Returns:
        (B, 3, H, W).
    """
    count, channels, rows, columns = images.shape
    radius = kernel_size // 2
    tap = torch.arange(-radius, radius + 1, device=images.device)
    sigma = sent(sigma, images.device).unsqueeze(1)
    kernel = (-0.5 * (tap / sigma) ** 2).softmax(1)  # (B, k)
    kernel = kernel.repeat_interleave(channels, 0)  # (B * 3, k)
    # Every channel of every image is a group of one convolution: its own kernel, no copies.
    planes = images.reshape(1, count * channels, rows, columns)
    planes = F.pad(planes, (radius, radius, 0, 0), mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=count * channels)
    planes = F.pad(planes, (0, 0, radius, radius), mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=count * channels)
    return planes.view_as(images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``(images - mean) / std`` per channel, float32, laid out as channels_last.

    Args:
        images: (B, 3, H, W), float or uint8, in the unit of ``mean`` and ``std``.
        mean: (3,) float.
        std: (3,) float, > 0.
    """
    result = (images - mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
    return result.contiguous(memory_format=torch.channels_last)


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """Copy a few numbers to a device without waiting for it."""
    # Only CUDA copies them before it returns; elsewhere they could be freed before they are read.
    return drawn.to(device, non_blocking=device.type == "cuda")


def _per_image(values: Tensor) -> Tensor:
    """Reshape (B,) values to broadcast with (B, 3, H, W) images."""
    return values.view(-1, 1, 1, 1)


def _luma(images: Tensor) -> Tensor:
    """Return the (B, 1, H, W) grey version of (B, 3, H, W) images."""
    red, green, blue = images.unbind(1)
    return (red * RED).add_(green, alpha=GREEN).add_(blue, alpha=BLUE).unsqueeze(1)
