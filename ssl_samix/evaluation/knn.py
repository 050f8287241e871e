"""Weighted k-nearest-neighbour classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_samix.errors import DataError


def check_finite(name: str, features: Tensor) -> None:
    """Check that all features are finite.

    Args:
        name: Name of the features in the error message, such as ``"bank"``.
        features: (N, D).

    Raises:
        DataError: If a feature is NaN or infinite.
    """
    # In parts, because isfinite makes a copy: gigabytes for a million features.
    if not all(torch.isfinite(part).all() for part in features.split(65536)):
        raise DataError(f"the {name} features hold NaN or infinity: the encoder has diverged")


def neighbours(
    bank: Tensor, query: Tensor, k: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k nearest bank rows of each query by cosine similarity, exactly.

    Args:
        bank: (N, D) features.
        query: (Q, D) features.
        k: Number of neighbours; at most N.
        device: A GPU that searches; without one, faiss does on the CPU.

    Returns:
        Similarities (Q, k), in descending order, and bank row indices (Q, k); on the CPU.

    Raises:
        DataError: If ``k`` exceeds the bank, or a feature is not finite.
    """
    if k > len(bank):
        raise DataError(f"kNN with k={k} needs a bank of at least {k} images, got {len(bank)}")
    check_finite("bank", bank)
    check_finite("query", query)
    if device is not None and device.type == "cuda":
        return by_products(bank, query, k, device)
    bank_rows, query_rows = (_unit_rows(features) for features in (bank, query))
    index = faiss.IndexFlatIP(bank_rows.shape[1])
    index.add(bank_rows)
    similarity, rows = index.search(query_rows, k)
    return torch.from_numpy(similarity), torch.from_numpy(rows)


def by_products(
    bank: Tensor,
    query: Tensor,
    k: int,
    device: torch.device,
    bank_rows: int = 16384,
    query_rows: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Return what ``neighbours`` does, by matrix products in float32 on any device.

    Args:
        bank: (N, D).
        query: (Q, D).
        k: Number of neighbours; at most N.
        device: Where the products are.
        bank_rows: Rows of the bank that are there at once.
        query_rows: Queries that are there at once.
    """
    found = []
    # Autocast would round the similarities to 8 bits.
    with torch.autocast(device.type, enabled=False):
        for asked in query.split(query_rows):
            wanted = F.normalize(asked.to(device).float(), dim=1)
            near = wanted.new_empty(len(wanted), 0)
            rows = near.long()
            for begin in range(0, len(bank), bank_rows):
                part = F.normalize(bank[begin : begin + bank_rows].to(device).float(), dim=1)
                close, places = (wanted @ part.T).topk(min(k, len(part)), dim=1)
                near, rows = torch.cat([near, close], 1), torch.cat([rows, places + begin], 1)
                near, kept = near.topk(min(k, near.shape[1]), dim=1)
                rows = rows.gather(1, kept)
            found.append((near.cpu(), rows.cpu()))
    similarity, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    return similarity, places


def _unit_rows(features: Tensor) -> np.ndarray:
    return np.ascontiguousarray(F.normalize(features.float(), dim=1).cpu().numpy())


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Return class scores: exp(similarity / temperature) summed over each class's neighbours.

    This is the weighting of InstDisc (arXiv 1805.01978, section 3.4).

    Args:
        similarity: (Q, k).
        labels: (Q, k) class of each neighbour.
        classes: Number of classes.
        temperature: Divides the similarities.

    Returns:
        (Q, classes) scores; the largest weight of each row is scaled to 1, to avoid overflow.
    """
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    scores = torch.zeros(len(similarity), classes, dtype=weight.dtype)
    return scores.scatter_add_(1, labels, weight)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    classes: int,
    ks: Sequence[int] = (20, 200),
    temperature: float = 0.07,
    device: torch.device | None = None,
) -> dict[int, tuple[float, float]]:
    """Return the accuracy of weighted kNN classification.

    Args:
        bank: (N, D) features of the labelled memory bank.
        bank_labels: (N,).
        query: (Q, D) features of the validation images.
        query_labels: (Q,).
        classes: Number of classes.
        ks: Numbers of neighbours; a k above the bank's size is left out. If every k is above it,
            all rows vote.
        temperature: Temperature of the weights.
        device: As in ``neighbours``.

    Returns:
        k -> (top-1, top-5) in percent.

    Raises:
        DataError: If a feature is not finite.
    """
    fitting = [k for k in ks if k <= len(bank)] or [len(bank)]
    similarity, rows = neighbours(bank, query, max(fitting), device)
    votes = vote_grid(similarity, bank_labels[rows], query_labels, classes, fitting, [temperature])
    return {vote.k: (vote.top1, vote.top5) for vote in votes}


@dataclass(frozen=True)
class Vote:
    """The result of one kNN setting.

    Attributes:
        k: Number of neighbours.
        temperature: Temperature of their weights.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent; with fewer than 5 classes, over all of them.
        predictions: (Q,) int64 classes.
    """

    k: int
    temperature: float
    top1: float
    top5: float
    predictions: Tensor


def vote_grid(
    similarity: Tensor,
    neighbour_labels: Tensor,
    query_labels: Tensor,
    classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
    chunk: int = 8192,
) -> list[Vote]:
    """Return the result of every setting of a grid, from one neighbour search.

    Args:
        similarity: (Q, K) of the K nearest neighbours, descending; K is at least the largest k.
        neighbour_labels: (Q, K).
        query_labels: (Q,).
        classes: Number of classes.
        ks: Numbers of neighbours.
        temperatures: Temperatures of the weights.
        chunk: Queries per step; bounds the memory for (chunk, classes) scores.

    Returns:
        One result per setting, ordered by k, then temperature.
    """
    votes = []
    for k in ks:
        for temperature in temperatures:
            ranked = torch.cat(
                [
                    vote(near[:, :k], labels[:, :k], classes, temperature)
                    .topk(min(5, classes), dim=1)
                    .indices
                    for near, labels in zip(
                        similarity.split(chunk), neighbour_labels.split(chunk), strict=True
                    )
                ]
            )
            hit = (ranked == query_labels[:, None]).double()
            top1, top5 = (100 * h.mean().item() for h in (hit[:, 0], hit.sum(dim=1)))
            votes.append(Vote(k, temperature, top1, top5, ranked[:, 0]))
    return votes


def leave_one_out(bank: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest neighbours of bank rows among all other rows.

    Args:
        bank: (N, D) features.
        rows: (R,) indices of the query rows.
        k: Number of neighbours; at most N - 1.

    Returns:
        Similarities (R, k), descending, and bank row indices (R, k), never the query row itself.

    Raises:
        DataError: As ``neighbours``.
    """
    similarity, found = neighbours(bank, bank[rows], k + 1)
    own = found == rows[:, None]
    # With copies of an image, the search may return only the copies and not the row itself.
    own[:, -1] |= ~own.any(dim=1)
    kept = (~own).nonzero()[:, 1].view(len(rows), k)
    return similarity.gather(1, kept), found.gather(1, kept)
