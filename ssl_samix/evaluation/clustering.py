"""k-means on features, by faiss."""

from __future__ import annotations

import faiss
import torch
import torch.nn.functional as F
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
