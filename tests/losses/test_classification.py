"""Losses of classifiers, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssl_samix.losses import binary_cross_entropy, cross_entropy, soft_labels

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing):
    shares = soft_labels(LABELS, 5, smoothing)[:, None]
    expected = F.cross_entropy(LOGITS, LABELS, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(LOGITS, shares)[:, 0], expected)


def test_binary_cross_entropy_is_torchs():
    shares = soft_labels(LABELS, 5)
    expected = F.binary_cross_entropy_with_logits(LOGITS, shares)
    torch.testing.assert_close(binary_cross_entropy(LOGITS, shares[:, None]).mean(), expected)


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy])
def test_two_weighted_losses_are_the_loss_of_the_mixed_label(loss):
    one, other = soft_labels(LABELS, 5, 0.1), soft_labels(LABELS.roll(1), 5, 0.1)
    lam = torch.rand(6)
    both = loss(LOGITS, torch.stack([one, other], dim=1))
    mixed = lam[:, None] * one + (1 - lam[:, None]) * other
    torch.testing.assert_close(
        lam * both[:, 0] + (1 - lam) * both[:, 1], loss(LOGITS, mixed[:, None])[:, 0]
    )


def test_shares_sum_to_one():
    torch.testing.assert_close(soft_labels(LABELS, 5, 0.3).sum(dim=1), torch.ones(6))
    assert soft_labels(LABELS, 5, 0.3)[0].tolist() == pytest.approx([0.76, 0.06, 0.06, 0.06, 0.06])
