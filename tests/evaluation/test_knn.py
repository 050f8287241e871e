"""kNN against a plain PyTorch implementation, and on data with a known answer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssl_samix.errors import DataError
from ssl_samix.evaluation.knn import (
    by_products,
    knn_accuracy,
    leave_one_out,
    neighbours,
    vote,
    vote_grid,
)


def test_neighbours_are_exact():
    bank, query = torch.randn(200, 16), torch.randn(30, 16)
    similarity, rows = neighbours(bank, query, 10)
    expected = (F.normalize(query) @ F.normalize(bank).T).topk(10)
    torch.testing.assert_close(similarity, expected.values, rtol=1e-5, atol=1e-5)
    assert (rows == expected.indices).float().mean() > 0.99  # ties apart


def test_products_find_what_faiss_finds():
    """In parts that divide neither the bank nor the queries, and hold fewer rows than k."""
    bank, query = torch.randn(200, 16), torch.randn(30, 16)
    expected, rows = neighbours(bank, query, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found, places = by_products(bank, query, 40, torch.device("cpu"), 33, 7)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (places == rows).float().mean() > 0.99  # ties apart


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


def plainly(bank, labels, query, classes, k, temperature):
    """kNN as in InstDisc's published test function: a matrix, topk, scatter."""
    near = (F.normalize(query) @ F.normalize(bank).T).topk(k)
    one_hot = F.one_hot(labels[near.indices], classes).double()
    return ((near.values.double() / temperature).exp()[..., None] * one_hot).sum(dim=1)


@pytest.mark.parametrize("chunk", [7, 8192])
def test_a_grid_is_what_plain_torch_gives_for_each_setting(chunk):
    centres = torch.randn(6, 12)
    labels, answers = torch.randint(6, (300,)), torch.randint(6, (90,))
    bank, query = (centres[x] + 1.5 * torch.randn(len(x), 12) for x in (labels, answers))
    near, rows = neighbours(bank, query, 50)
    votes = vote_grid(near, labels[rows], answers, 6, [1, 20, 50], [0.07, 0.5], chunk)
    assert [(v.k, v.temperature) for v in votes] == [
        (k, t) for k in (1, 20, 50) for t in (0.07, 0.5)
    ]
    for v in votes:
        scores = plainly(bank, labels, query, 6, v.k, v.temperature)
        assert v.predictions.tolist() == scores.argmax(dim=1).tolist()
        assert v.top1 == pytest.approx(100 * (scores.argmax(1) == answers).double().mean().item())
        if v.k > 1:  # with one neighbour four of the five best have no vote at all
            best = scores.topk(5, dim=1).indices
            assert v.top5 == pytest.approx(100 * (best == answers[:, None]).double().sum(1).mean())
    assert len({v.top1 for v in votes}) > 2


def test_leave_one_out_is_the_search_without_the_row():
    bank = torch.randn(40, 6)
    bank[11] = bank[3]  # a copy, and a third, longer one: any of them may be found first
    bank[12] = 2 * bank[3]
    asked = torch.tensor([0, 3, 11, 12, 39])
    similarity, rows = leave_one_out(bank, asked, 5)
    assert rows.shape == (5, 5)
    for i, row in enumerate(asked.tolist()):
        others = torch.tensor([j for j in range(40) if j != row])
        expected = (F.normalize(bank[others]) @ F.normalize(bank[row], dim=0)).sort(descending=True)
        assert row not in rows[i].tolist()
        torch.testing.assert_close(similarity[i], expected.values[:5], rtol=1e-5, atol=1e-5)
        if row not in (3, 11, 12):
            assert rows[i].tolist() == others[expected.indices[:5]].tolist()


def test_leave_one_out_of_copies_only():
    """Every row is found for every row: which k + 1 of them, nobody knows."""
    bank = torch.ones(30, 4)
    asked = torch.arange(30)
    similarity, rows = leave_one_out(bank, asked, 3)
    assert (rows != asked[:, None]).all()
    assert rows.shape == similarity.shape == (30, 3)
