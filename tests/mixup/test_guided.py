"""Masks that look where the partner matters; what they share with the others is in test_classic."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ssl_samix.errors import ConfigError
from ssl_samix.mixup.policies import AttentiveMix, Mixup, SaliencyMix, local_mean, peak, saliency
from ssl_samix.types import MixPlan

ROWS = torch.arange(3)
PARTNER = torch.tensor([1, 2, 0])


def blobs(centres, size=32, width=2.0):
    """Images with one bright round blob each, on weak noise."""
    at = torch.arange(size).float()
    images = []
    for row, column in centres:
        distance = (at[:, None] - row) ** 2 + (at - column) ** 2
        images.append(3 * torch.exp(-distance / (2 * width**2)).expand(3, -1, -1))
    return torch.stack(images) + 0.01 * torch.randn(len(centres), 3, size, size)


def test_saliencymix_centres_its_box_at_the_partners_blob():
    centres = [(6, 6), (16, 25), (24, 10)]
    partners = blobs(centres)
    lam = 1 - torch.full((3,), (9 / 32) ** 2)
    mixed = SaliencyMix()(torch.zeros(3, 3, 32, 32), partners, MixPlan(lam, PARTNER, ROWS), None)
    for k in range(3):
        box = mixed.mask[k, 0].nonzero().float()
        middle = (box.amin(dim=0) + box.amax(dim=0)) / 2
        assert_close(middle, torch.tensor(centres[PARTNER[k]]).float(), atol=1.0, rtol=0)
        assert len(box) == 81
        inside = mixed.mask[k].bool().expand(3, -1, -1)
        assert torch.equal(mixed.images[k][inside], partners[PARTNER[k]][inside])


def test_saliencymix_clips_at_the_border_and_says_so():
    lam = 1 - torch.full((3,), 0.25)  # 16 of 32 px
    partners = blobs([(0, 0), (31, 31), (0, 31)], width=1.0)
    mixed = SaliencyMix()(torch.zeros(3, 3, 32, 32), partners, MixPlan(lam, PARTNER, ROWS), None)
    assert (mixed.lam > 1 - 12**2 / 32**2).all()
    assert (mixed.mask[[2, 0, 1], 0, [0, 31, 0], [0, 31, 31]] == 1).all()


@pytest.mark.parametrize("size", [96, 160, 224])
def test_the_most_salient_pixel_of_large_images(size):
    centres = [(size // 4, size // 3), (size - 20, 30), (size // 2, size - 25)]
    found = peak(blobs(centres, size=size, width=size / 16))
    assert_close(found, torch.tensor(centres).float(), atol=size / 32, rtol=0)


@pytest.mark.parametrize("window", [1, 3, 7])
def test_local_means_against_a_loop(window):
    images, reach = torch.randn(2, 3, 9, 9), window // 2
    slow = torch.empty_like(images)
    for r in range(9):
        for c in range(9):
            rows = slice(max(0, r - reach), r + reach + 1)
            columns = slice(max(0, c - reach), c + reach + 1)
            slow[:, :, r, c] = images[:, :, rows, columns].mean(dim=(2, 3))
    assert_close(local_mean(images, window), slow)


def test_saliency_knows_no_brightness():
    images = blobs([(6, 6), (16, 25)])
    found = saliency(images)
    assert_close(saliency(images + 5), found, atol=1e-4, rtol=0)
    assert_close(saliency(-images), found)


@pytest.mark.parametrize("size", [32, 64, 100, 224])
def test_peaks_of_larger_images(size):
    centres = torch.tensor([(6, 6), (16, 25), (24, 10)]) * size // 32
    found = peak(blobs(centres.tolist(), size, width=size / 16))
    assert (found - centres).abs().max() <= size / 32


def test_attentivemix_pastes_the_strongest_cells():
    maps = torch.randn(3, 6, 4, 4)
    maps[:, :, 1, 2] += 9
    maps[:, :, 3, 0] += 7
    maps[1, :, 0, 0] += 8
    lam = 1 - torch.tensor([2 / 16, 1 / 16, 2.2 / 16])
    partners = torch.randn(3, 3, 32, 32)
    nothing = torch.zeros_like(maps)
    plan = MixPlan(lam, PARTNER, ROWS)
    mixed = AttentiveMix()(torch.zeros_like(partners), partners, plan, (nothing, maps))
    expected = torch.zeros(3, 1, 32, 32)
    for k, cells in enumerate([[(1, 2), (0, 0)], [(1, 2)], [(1, 2), (3, 0)]]):
        for row, column in cells:
            expected[k, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
    assert torch.equal(mixed.mask, expected)
    assert torch.equal(mixed.images, expected * partners[PARTNER])


def test_attentivemix_without_maps():
    images = torch.zeros(3, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"mixup\.stage"):
        AttentiveMix()(images, images, MixPlan(torch.rand(3), PARTNER, ROWS), None)


@pytest.mark.parametrize("policy", [Mixup, SaliencyMix, AttentiveMix])
def test_a_shuffled_batch_is_mixed_alike_where_nothing_is_drawn(policy):
    images, partners = torch.randn(2, 8, 3, 16, 16)
    maps = (torch.rand(8, 5, 4, 4), torch.rand(8, 5, 4, 4))
    plan = MixPlan(torch.rand(8), torch.arange(8).roll(-1), torch.arange(8))
    order = torch.randperm(8)
    shuffled = MixPlan(plan.lam[order], order.argsort()[plan.partner[order]], plan.rows)
    before = policy()(images, partners, plan, maps)
    after = policy()(images[order], partners[order], shuffled, tuple(m[order] for m in maps))
    assert torch.equal(after.images, before.images[order])
    assert torch.equal(after.lam, before.lam[order])
