"""Label-free measures on features whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ssl_samix.evaluation.measures import alignment, rankme, uniformity


def test_rankme_counts_equal_directions():
    basis = torch.linalg.qr(torch.randn(64, 16)).Q  # 16 orthonormal columns
    assert rankme(basis) == pytest.approx(16, abs=0.01)
    assert rankme(100 * basis[:, :4]) == pytest.approx(4, abs=0.01)


def test_rankme_of_collapsed_features_is_one():
    assert rankme(torch.ones(50, 8)) == pytest.approx(1.0, abs=1e-3)
    assert math.isfinite(rankme(torch.zeros(50, 8)))


def test_rankme_is_the_entropy_of_the_spectrum():
    values = torch.tensor([3.0, 1.0])
    share = values / values.sum()
    expected = math.exp(-float((share * share.log()).sum()))
    assert rankme(torch.diag(values)) == pytest.approx(expected, abs=1e-4)


def test_alignment_is_zero_for_equal_and_four_for_opposite_views():
    features = torch.randn(20, 6)
    assert alignment(features, 5 * features) == pytest.approx(0.0, abs=1e-6)
    assert alignment(features, -features) == pytest.approx(4.0, abs=1e-5)


def test_uniformity_against_the_double_loop():
    features = F.normalize(torch.randn(12, 4))
    pairs = [(i, j) for i in range(12) for j in range(i)]
    kernel = [math.exp(-2 * float((features[i] - features[j]).square().sum())) for i, j in pairs]
    assert uniformity(features) == pytest.approx(math.log(sum(kernel) / len(kernel)), abs=1e-5)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0.0, abs=1e-6)  # collapsed
