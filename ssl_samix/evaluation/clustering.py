"""k-means on features, by faiss, and how well clusters match classes."""

from __future__ import annotations

import faiss
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from ssl_samix.errors import DataError

ITERATIONS = 20


def kmeans(
    features: Tensor, clusters: int, seed: int = 0, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster features by their direction.

    Args:
        features: (N, D).
        clusters: Number of clusters.
        seed: Of the random start.
        start: (clusters, D) centroids to start from, so that clusters keep their numbers.

    Returns:
        (N,) int64 clusters and (clusters, D) centroids.

    Raises:
        DataError: If there are fewer features than clusters.
    """
    if len(features) < clusters:
        raise DataError(f"{len(features)} images cannot make {clusters} clusters: set fewer")
    rows = F.normalize(features.float(), dim=1).cpu().numpy()
    machine = faiss.Kmeans(
        rows.shape[1],
        clusters,
        niter=ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, -(-len(rows) // clusters)),
    )
    machine.train(rows, init_centroids=None if start is None else start.cpu().numpy())
    _, ids = machine.index.search(rows, 1)
    return torch.from_numpy(ids[:, 0]).long(), torch.from_numpy(machine.centroids).clone()


def nmi(clusters: Tensor, labels: Tensor) -> float:
    """Mutual information of clusters and classes over the mean of their entropies.

    Between 0 (independent) and 1 (the same partition). With many clusters of few images it is well
    above 0 by chance alone, which the adjusted Rand index corrects for.

    Args:
        clusters: (N,) int64, numbered in any order.
        labels: (N,) int64.
    """
    return float(normalized_mutual_info_score(labels.numpy(), clusters.numpy()))


def ari(clusters: Tensor, labels: Tensor) -> float:
    """Adjusted Rand index: pairs of images on which both agree, corrected for chance.

    Hubert and Arabie, Comparing partitions, 1985. 0 is chance, 1 the same partition; it may be
    below 0.

    Args:
        clusters: (N,) int64, numbered in any order.
        labels: (N,) int64.
    """
    return float(adjusted_rand_score(labels.numpy(), clusters.numpy()))


def cluster_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """Accuracy when each cluster stands for one class and each class for one cluster, at best.

    The best one-to-one matching is found by the Hungarian method. Where there are more clusters
    than classes, the images of those left over count as wrong; likewise with more classes.

    Args:
        clusters: (N,) int64, numbered in any order.
        labels: (N,) int64.

    Returns:
        Percent.
    """
    rows, columns = int(clusters.max()) + 1, int(labels.max()) + 1
    counts = torch.bincount(clusters * columns + labels, minlength=rows * columns)
    counts = counts.view(rows, columns)
    matched = linear_sum_assignment(counts.numpy(), maximize=True)
    return 100 * float(counts[matched].sum()) / len(labels)
