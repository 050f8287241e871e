"""kNN against a plain PyTorch implementation, and on data with a known answer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssl_samix.errors import DataError
from ssl_samix.evaluation.knn import knn_accuracy, neighbours, vote


def test_neighbours_are_exact():
    bank, query = torch.randn(200, 16), torch.randn(30, 16)
    similarity, rows = neighbours(bank, query, 10)
    expected = (F.normalize(query) @ F.normalize(bank).T).topk(10)
    torch.testing.assert_close(similarity, expected.values, rtol=1e-5, atol=1e-5)
    assert (rows == expected.indices).float().mean() > 0.99  # ties apart


def test_a_planted_duplicate_is_the_nearest():
    bank = torch.randn(50, 8)
    _, rows = neighbours(bank, 3.0 * bank[[7, 31]], 1)  # length does not matter
    assert rows[:, 0].tolist() == [7, 31]


def test_votes_are_the_papers_weights():
    similarity = torch.tensor([[0.9, 0.5, 0.4]])
    scores = vote(similarity, torch.tensor([[1, 0, 0]]), 3, 0.1)
    weights = (similarity / 0.1).exp()[0]
    expected = torch.tensor([weights[1] + weights[2], weights[0], 0.0])
    torch.testing.assert_close(scores[0] / scores[0].sum(), expected / expected.sum())


def test_temperature_decides_between_one_near_and_two_far():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]))
    labels = torch.tensor([0, 1, 1])
    query, answer = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    cold = knn_accuracy(bank, labels, query, answer, 2, [3], temperature=0.1)
    warm = knn_accuracy(bank, labels, query, answer, 2, [3], temperature=10.0)
    assert (cold[3][0], warm[3][0]) == (100.0, 0.0)


def test_separable_is_perfect_and_random_labels_are_chance():
    centres = 10 * torch.eye(5)
    labels = torch.arange(5).repeat(60)
    features = centres[labels] + 0.1 * torch.randn(300, 5)
    perfect = knn_accuracy(features, labels, features, labels, 5, [20, 50])
    assert perfect == {20: (100.0, 100.0), 50: (100.0, 100.0)}
    noise = torch.randn(2000, 5)
    random = torch.randint(10, (2000,))
    chance = knn_accuracy(noise[:1500], random[:1500], noise[1500:], random[1500:], 10, [20])
    assert 6 < chance[20][0] < 14
    assert 42 < chance[20][1] < 58


def test_a_k_beyond_the_bank_is_left_out():
    features, labels = torch.randn(30, 4), torch.arange(30) % 3
    assert list(knn_accuracy(features, labels, features, labels, 3, [5, 200])) == [5]
    assert list(knn_accuracy(features, labels, features, labels, 3, [200])) == [30]
    with pytest.raises(DataError, match="at least 200 images, got 30"):
        neighbours(features, features, 200)


def test_a_diverged_encoder_is_named():
    features = torch.randn(30, 4)
    features[3, 2] = float("nan")
    with pytest.raises(DataError, match="diverged"):
        neighbours(features, torch.randn(2, 4), 5)
