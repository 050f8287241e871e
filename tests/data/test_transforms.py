"""Every batched operation against torchvision's, given the same parameters, sample by sample."""

from itertools import permutations

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ssl_samix.data import transforms

COUNT = 12


@pytest.fixture
def images():
    """Random images with the awkward ones among them: grey, black, white, pure colours."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(COUNT, 3, 24, 24, generator=generator)
    images[0] = images[0, :1]
    images[1], images[2] = 0, 1
    images[3] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    images[4] = (images[4] * 4).round() / 4  # ties between channels
    return images


def uniform(low, high, seed=1):
    return low + (high - low) * torch.rand(COUNT, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (96, 80, 64), (20, 24, 32), (33, 57, 17)]
)
def test_crop_resize_equals_torchvision(height, width, size):
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(COUNT, 3, height, width, generator=generator)
    share = torch.rand(4, COUNT, generator=generator)
    tall, wide = (1 + share[0] * height).int(), (1 + share[1] * width).int()
    tall[0], wide[0] = height, width  # nothing cut off
    tall[1], wide[1] = 1, 1  # a single pixel
    top, left = (share[2] * (height - tall + 1)).int(), (share[3] * (width - wide + 1)).int()
    flip = torch.arange(COUNT) % 2 == 0
    result = transforms.crop_resize(images, (top, left, tall, wide), flip, size)
    for i in range(COUNT):
        expected = tv.resized_crop(
            images[i],
            *(int(side[i]) for side in (top, left, tall, wide)),
            size=[size, size],
            interpolation=InterpolationMode.BILINEAR,
            antialias=True,
        )
        expected = tv.horizontal_flip(expected) if flip[i] else expected
        torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (transforms.adjust_brightness, tv.adjust_brightness, 0, 2),
        (transforms.adjust_contrast, tv.adjust_contrast, 0, 2),
        (transforms.adjust_saturation, tv.adjust_saturation, 0, 2),
        (transforms.adjust_hue, tv.adjust_hue, -0.5, 0.5),
    ],
)
def test_adjustment_equals_torchvision(images, ours, theirs, low, high):
    factor = uniform(low, high)
    factor[5], factor[6] = low, high
    before = images.clone()
    result = ours(images, factor)
    assert torch.equal(images, before)
    for i in range(COUNT):
        expected = theirs(images[i], factor[i].item())
        torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=0)


def test_color_jitter_follows_each_samples_own_order(images):
    orders = torch.tensor(list(permutations(range(4))))  # all 24
    images = torch.cat([images, images.flip(0)])
    factors = torch.stack([uniform(0.2, 1.8, s) for s in (1, 2, 3)] + [uniform(-0.2, 0.2)], 1)
    factors = factors.repeat(2, 1)
    before = images.clone()
    result = transforms.color_jitter(images, factors, orders)
    assert torch.equal(images, before)
    theirs = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    for i, order in enumerate(orders.tolist()):
        expected = images[i]
        for operation in order:
            expected = theirs[operation](expected, factors[i, operation].item())
        torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=0)


def test_grayscale_and_solarize_equal_torchvision(images):
    torch.testing.assert_close(
        transforms.grayscale(images), tv.rgb_to_grayscale(images, 3), atol=1e-6, rtol=0
    )
    images[5, :, :2] = 0.5  # exactly at the threshold
    assert torch.equal(transforms.solarize(images), tv.solarize(images, 0.5))


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_gaussian_blur_equals_torchvision(images, kernel_size):
    images = images[:, :, :, :20]
    sigma = uniform(0.1, 2.0)
    result = transforms.gaussian_blur(images, sigma, kernel_size)
    for i in range(COUNT):
        expected = tv.gaussian_blur(images[i], [kernel_size] * 2, [sigma[i].item()] * 2)
        torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (64, 7), (96, 9), (224, 23)])
def test_blur_kernel_is_a_tenth_of_the_side_and_odd(size, kernel):
    assert transforms.blur_kernel_size(size) == kernel


def test_normalize_equals_torchvision(images):
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    result = transforms.normalize(images, torch.tensor(mean), torch.tensor(std))
    torch.testing.assert_close(result, tv.normalize(images, mean, std))
    assert result.is_contiguous(memory_format=torch.channels_last)
