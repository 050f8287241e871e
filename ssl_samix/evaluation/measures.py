"""Measures without labels (rank, alignment, uniformity), and clustering by spherical k-means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor, nn

from ssl_samix.data.images import ImageSet
from ssl_samix.data.views import ViewMaker
from ssl_samix.errors import DataError
from ssl_samix.models.ema import evaluating


@torch.no_grad()
def embed_two_views(
    encoder: nn.Module,
    images: ImageSet,
    picks: Sequence[int],
    views: ViewMaker,
    device: torch.device,
    seed: int = 0,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Return features of two views of images, in eval mode.

    The views are the same at every call and on every rank. The caller's random state is unchanged.

    Args:
        encoder: Maps (B, 3, S, S) to (B, D).
        images: The data set.
        picks: Indices of its images.
        views: Makes the views.
        device: Device of the encoder.
        seed: Seed of the views.
        chunk: Images per forward pass.

    Returns:
        Features of the first and of the second views, each (len(picks), D) float32 on the CPU.
    """
    features: tuple[list[Tensor], list[Tensor]] = ([], [])
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        evaluating(encoder),
    ):
        torch.manual_seed(seed)
        for begin in range(0, len(picks), chunk):
            pixels = view_pixels(images, picks[begin : begin + chunk], views.per_image)
            drawn = views(pixels.to(device))
            for rows, view in zip(features, drawn[:2], strict=True):
                rows.append(encoder(view).float().cpu())
    return torch.cat(features[0]), torch.cat(features[1])


def view_pixels(images: ImageSet, picks: Sequence[int], draw: Any) -> Tensor:
    """Return resized images, (B, 3, S, S) uint8, or views of pictures, (B, V, 3, S, S) uint8."""
    if draw is None:
        return images.load(picks)
    return torch.stack([draw(images.picture(i)) for i in picks])


ITERATIONS = 20


def kmeans(
    features: Tensor, clusters: int, seed: int = 0, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster L2-normalised features by spherical k-means.

    Args:
        features: (N, D).
        clusters: Number of clusters.
        seed: Seed of the random start.
        start: (clusters, D) initial centroids, so that clusters keep their numbers.

    Returns:
        (N,) int64 cluster indices and (clusters, D) centroids.

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


def agreement(clusters: Tensor, labels: Tensor) -> dict[str, float]:
    """Return how well clusters match classes: ``nmi``, ``ari`` and ``cluster_accuracy`` in %.

    Normalised mutual information lies between 0 (independent) and 1 (the same partition). With many
    clusters of few images it is well above 0 by chance alone. The adjusted Rand index (Hubert and
    Arabie, Comparing partitions, 1985) corrects for chance: 0 is chance level, and it may be
    negative.

    Args:
        clusters: (N,) int64, numbered in any order.
        labels: (N,) int64.
    """
    return {
        "nmi": float(normalized_mutual_info_score(labels.numpy(), clusters.numpy())),
        "ari": float(adjusted_rand_score(labels.numpy(), clusters.numpy())),
        "cluster_accuracy": cluster_accuracy(clusters, labels),
    }


def cluster_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent under the best one-to-one matching of clusters and classes.

    The matching is found by the Hungarian method. If there are more clusters than classes, the
    images of unmatched clusters count as wrong; likewise if there are more classes.

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


def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """Return the effective rank of features: exp of the entropy of their singular values.

    This is RankMe (arXiv 2210.02885, eq. 1-2), between 1 (collapsed) and min(N, D).

    Args:
        features: (N, D), as returned by the encoder.
        epsilon: Added to each normalised singular value, as in the paper.
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + epsilon
    return float((-(share * share.log()).sum()).exp())


def alignment(first: Tensor, second: Tensor) -> float:
    """Return the mean squared distance between normalised features of two views of the images.

    Wang and Isola (arXiv 2005.10242, eq. 2, alpha 2); lower is better.

    Args:
        first: (N, D).
        second: (N, D).
    """
    distance = F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)
    return float(distance.square().sum(dim=1).mean())


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Return the log of the mean Gaussian potential of all pairs of normalised features.

    Wang and Isola (arXiv 2005.10242, eq. 3); lower is more uniform.

    Args:
        features: (N, D) with N of at least 2.
        t: Width of the potential.
    """
    distances = torch.pdist(F.normalize(features.float(), dim=1))
    return float((-t * distances.square()).exp().mean().log())


def top1_top5(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 in percent; with fewer than 5 classes, top-5 is over all of them.

    Args:
        logits: (N, C).
        labels: (N,).
    """
    hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return 100 * hit[:, 0].double().mean().item(), 100 * hit.any(dim=1).double().mean().item()
