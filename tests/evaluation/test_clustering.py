"""k-means, and clusters compared with classes, on data with a known answer."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

import ssl_samix
from ssl_samix.errors import DataError
from ssl_samix.evaluation.measures import agreement, cluster_accuracy, kmeans


def by_brute_force(clusters, labels, count):
    """The best accuracy over every one-to-one naming of ``count`` clusters."""
    return max(
        100 * float((torch.tensor(names)[clusters] == labels).double().mean())
        for names in permutations(range(count))
    )


def test_perfect_clusters_are_perfect_under_any_numbers():
    labels = torch.arange(5).repeat_interleave(torch.tensor([3, 8, 20, 1, 12]))
    for names in ([0, 1, 2, 3, 4], [3, 0, 4, 1, 2], [7, 2, 9, 0, 5]):
        clusters = torch.tensor(names)[labels]
        assert [*agreement(clusters, labels).values()] == pytest.approx([1, 1, 100])


def test_random_clusters_are_chance():
    labels, clusters = torch.randint(10, (5000,)), torch.randint(10, (5000,))
    found = agreement(clusters, labels)
    assert found["ari"] == pytest.approx(0, abs=0.003)
    assert found["nmi"] == pytest.approx(0, abs=0.01)
    assert 10 < found["cluster_accuracy"] < 14


def test_one_cluster_says_nothing():
    labels = torch.arange(4).repeat(10)
    found = agreement(torch.zeros(40, dtype=torch.long), labels)
    assert [*found.values()] == pytest.approx([0, 0, 25])


def test_accuracy_is_the_best_of_all_matchings():
    for _ in range(20):
        labels, clusters = torch.randint(5, (40,)), torch.randint(5, (40,))
        expected = by_brute_force(clusters, labels, 5)
        assert cluster_accuracy(clusters, labels) == pytest.approx(expected)


def test_a_greedy_matching_would_be_worse():
    # Cluster 0 holds most of class 0, but class 0 is all that cluster 1 can stand for.
    clusters = torch.tensor([0] * 9 + [1] * 5)
    labels = torch.tensor([0] * 5 + [1] * 4 + [0] * 5)
    assert cluster_accuracy(clusters, labels) == pytest.approx(100 * 9 / 14)


def test_images_of_left_over_clusters_are_wrong():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    clusters = torch.tensor([0, 0, 3, 1, 1, 2])
    assert cluster_accuracy(clusters, labels) == pytest.approx(100 * 4 / 6)
    assert cluster_accuracy(labels, clusters) == pytest.approx(100 * 4 / 6), "more classes, too"


def test_kmeans_finds_separate_directions():
    labels = torch.arange(4).repeat(50)
    features = torch.rand(200, 1).add(0.1) * (torch.eye(4)[labels] + 0.02 * torch.randn(200, 4))
    found = [kmeans(features, 4, seed)[0] for seed in range(5)]
    assert max(cluster_accuracy(clusters, labels) for clusters in found) == 100
    again, _ = kmeans(features, 4, seed=3)
    assert torch.equal(again, found[3])
    noise = torch.randn(200, 4)
    assert not torch.equal(kmeans(noise, 8, seed=0)[0], kmeans(noise, 8, seed=1)[0])
    with pytest.raises(DataError, match="3 images cannot make 4 clusters"):
        kmeans(features[:3], 4)


def test_a_run_clusters_where_it_mixes(tmp_path, monkeypatch):
    counted = []

    def spied(features, clusters, start=None):
        counted.append(start is None)
        return kmeans(features, clusters, start=start)

    monkeypatch.setattr("ssl_samix.training.monitors.kmeans", spied)
    settings = {
        "data.limit": 64, "data.batch_size": 32, "backbone.width": 8, "method.queue_size": 64,
        "trainer.max_epochs": 6, "callbacks.knn.val_limit": 20, "mixup": "samix_c",
        "mixup.clusters": 4, "mixup.cluster_every": 2, "mixup.during": [0.5, 0.8],
    }  # fmt: skip
    ssl_samix.pretrain("digits", "moco", tmp_path / "run", **settings)
    assert counted == [True, False]  # epochs 3 and 4 of 0 to 5; without a window 0, 2 and 4
