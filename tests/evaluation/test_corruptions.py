"""Corruptions against numpy, scipy and Pillow, and accuracy under them."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from ssl_samix.data.images import MemoryImages
from ssl_samix.evaluation.robustness import (
    CIFAR10_C,
    IMAGENET_C,
    CorruptedImages,
    contrast,
    gaussian_blur,
    gaussian_noise,
    jpeg,
    strengths_for,
)


def photos(count=4, size=32):
    """Smooth, coloured images with some grain."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    grain = 0.02 * torch.randn(count, 3, size, size, generator=generator)
    return (255 * (smooth + grain).clamp(0, 1)).round().to(torch.uint8)


def as_set(pixels):
    return MemoryImages(pixels, torch.arange(len(pixels)), [str(i) for i in range(len(pixels))])


def grey(level, count=2, size=32):
    return torch.full((count, 3, size, size), level, dtype=torch.uint8)


@pytest.mark.parametrize("std", [0.04, 0.1, 0.26])
def test_noise_has_its_standard_deviation_in_every_channel(std):
    noisy = gaussian_noise(grey(128, 8, 64), std, range(8)).double() / 255
    off = noisy - 128 / 255
    expected = torch.full((3,), std, dtype=torch.float64)
    if std > 0.2:  # pixels are cut off at 0 and 1
        drawn = np.random.default_rng(0).normal(size=1_000_000, scale=std)
        expected[:] = float(np.clip(drawn, -128 / 255, 127 / 255).std())
    torch.testing.assert_close(off.std(dim=(0, 2, 3)), expected, rtol=0.02, atol=0)
    assert abs(off.mean()) < 4 * std / off.numel() ** 0.5 + 0.002
    # independent: neither a channel nor an image has another's noise
    assert torch.corrcoef(off[0].flatten(1)).fill_diagonal_(0).abs().max() < 0.1
    assert torch.corrcoef(off[:, 0].flatten(1)).fill_diagonal_(0).abs().max() < 0.1


def test_noise_belongs_to_the_image_and_not_to_its_batch():
    corrupted = CorruptedImages(as_set(grey(100, 5)), "gaussian_noise", 0.08)
    whole = corrupted.load(range(5))
    torch.manual_seed(7)
    assert torch.equal(corrupted.load(torch.tensor([3, 1])), whole[[3, 1]])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("sigma", [0.4, 0.6, 0.7, 0.8, 1, 2, 3, 4, 6])
def test_blur_is_scipys_to_the_border(sigma):
    pixels = photos(2, 80)
    expected = gaussian_filter(
        pixels.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4
    )
    difference = gaussian_blur(pixels, sigma).double() - torch.from_numpy(expected)
    assert difference.abs().max() <= 0.501
    assert torch.equal(gaussian_blur(grey(77), sigma), grey(77))


def test_blur_takes_the_smallest_images():
    pixels = photos(2, 8)
    expected = gaussian_filter(pixels.double().numpy(), (0, 0, 1, 1), mode="nearest", truncate=4)
    assert (gaussian_blur(pixels, 1).double() - torch.from_numpy(expected)).abs().max() <= 0.501


@pytest.mark.parametrize("factor", [0.75, 0.15, 0.05])
def test_contrast_is_around_the_mean_of_each_channel(factor):
    pixels = (photos() * torch.tensor([1, 0.6, 0.3])[:, None, None]).to(torch.uint8)
    values = pixels.double().numpy() / 255
    mean = values.mean(axis=(2, 3), keepdims=True)
    expected = 255 * np.clip((values - mean) * factor + mean, 0, 1)
    assert np.abs(contrast(pixels, factor).numpy() - expected).max() <= 0.501
    # a tint stays: towards the mean of the grey image it would fade
    kept = contrast(pixels, factor).double().mean(dim=(2, 3)) - pixels.double().mean(dim=(2, 3))
    assert kept.abs().max() < 0.5


@pytest.mark.parametrize("size", [32, 96])
def test_jpeg_is_pillows(size):
    pixels = photos(2, size)
    for quality in {*CIFAR10_C["jpeg"], *IMAGENET_C["jpeg"]}:
        for image, found in zip(pixels, jpeg(pixels, quality), strict=True):
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
            expected = np.asarray(Image.open(file)).transpose(2, 0, 1).astype(int)
            assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("corruption", sorted(CIFAR10_C))
def test_a_higher_strength_changes_more(corruption, size):
    pixels = photos(size=size)
    name, strengths = strengths_for(size)
    assert name == {32: "CIFAR-10-C", 96: "ImageNet-C"}[size]
    changes = []
    for strength in strengths[corruption]:
        corrupted = CorruptedImages(as_set(pixels), corruption, strength).load(range(len(pixels)))
        assert (corrupted.shape, corrupted.dtype) == (pixels.shape, torch.uint8)
        changes.append((corrupted.float() - pixels.float()).abs().mean().item())
    assert changes[0] > 0
    assert len(changes) == 5
    assert all(b > a for a, b in itertools.pairwise(changes)), changes


def test_images_up_to_64_px_are_cifars():
    assert strengths_for(64)[1] == CIFAR10_C
    assert strengths_for(65)[1] == IMAGENET_C
    assert CIFAR10_C.keys() == IMAGENET_C.keys()


def test_the_images_themselves_stay():
    pixels = photos()
    images = as_set(pixels.clone())
    for corruption in CIFAR10_C:
        CorruptedImages(images, corruption, CIFAR10_C[corruption][4]).load(range(4))
    assert torch.equal(images.pixels, pixels)
