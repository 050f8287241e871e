"""Calibration and attack, on cases with a known answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_samix.data.images import MemoryImages
from ssl_samix.evaluation.measures import top1_top5
from ssl_samix.evaluation.robustness import attacked_logits, calibration_error


def logits_of(confidence):
    """Two classes; the first has this confidence."""
    return torch.tensor([[torch.logit(torch.tensor(confidence, dtype=torch.float64)), 0.0]])


def test_calibration_error_is_the_gap_of_confidence_and_accuracy():
    rows = logits_of(0.9).repeat(10, 1)
    labels = torch.tensor([0] * 9 + [1])
    assert calibration_error(rows, labels) == pytest.approx(0, abs=1e-5)
    assert calibration_error(rows, torch.zeros(10).long()) == pytest.approx(10, abs=1e-5)
    assert calibration_error(rows, torch.ones(10).long()) == pytest.approx(90, abs=1e-5)


def test_gaps_of_different_bins_do_not_cancel():
    rows = torch.cat([logits_of(0.6), logits_of(0.9)])
    # right at 60% (gap 0.4), wrong at 90% (gap 0.9): the mean of both, not their difference
    assert calibration_error(rows, torch.tensor([0, 1])) == pytest.approx(65, abs=1e-4)
    # within one bin they do
    assert calibration_error(rows, torch.tensor([0, 1]), bins=1) == pytest.approx(25, abs=1e-4)


class Brightness(nn.Module):
    """Says class 1 of images whose mean is above a half."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.5, 0.125)

    def forward(self, images):
        std = torch.tensor(self.std)[:, None, None]
        level = (images * std).mean(dim=(1, 2, 3))
        return torch.stack([-level, level], dim=1) * 10


def test_the_attack_moves_every_pixel_by_its_strength_and_no_further():
    levels = [118, 122, 133, 140, 2]  # darker than a half: class 0
    pixels = torch.stack([torch.full((3, 4, 4), v, dtype=torch.uint8) for v in levels])
    labels = torch.tensor([0, 0, 1, 1, 0])
    images = MemoryImages(pixels, labels, [str(v) for v in levels])
    cpu = torch.device("cpu")
    for strength, expected in ((0, 100.0), (8, 60.0), (20, 20.0)):
        logits = attacked_logits(Brightness(), images, strength / 255, cpu, chunk=2)
        assert top1_top5(logits, labels)[0] == pytest.approx(expected), strength
        # each image's mean moved by exactly the strength, towards the other class
        sign = torch.where(labels == 0, 1, -1)
        moved = torch.tensor(levels) / 255 + sign * strength / 255 - 0.5
        torch.testing.assert_close(logits[:, 1], 10 * moved, atol=1e-5, rtol=1e-4)


def test_attacked_pixels_stay_pixels():
    pixels = torch.full((1, 3, 4, 4), 250, dtype=torch.uint8)
    images = MemoryImages(pixels, torch.tensor([0]), ["bright"])
    logits = attacked_logits(Brightness(), images, 20 / 255, torch.device("cpu"))
    torch.testing.assert_close(logits[0, 1], torch.tensor(10 * 0.5), atol=1e-5, rtol=0)
