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
    """Refuse features that are not numbers.

    Args:
        name: What the sentence calls them, such as ``"bank"``.
        features: (N, D).

    Raises:
        DataError: If a feature is NaN or infinite.
    """
    # by parts, since isfinite makes a copy: of a million features that would be gigabytes
    if not all(torch.isfinite(part).all() for part in features.split(65536)):
        raise DataError(f"the {name} features hold NaN or infinity: the encoder has diverged")


def neighbours(bank: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest bank rows of each query by cosine similarity, exactly.

    Args:
        bank: (N, D) features.
        query: (Q, D) features.
        k: Neighbours; at most N.

    Returns:
        Similarities (Q, k), falling, and bank rows (Q, k).

    Raises:
        DataError: If ``k`` exceeds the bank, or a feature is not finite.
    """
    if k > len(bank):
        raise DataError(f"kNN with k={k} needs a bank of at least {k} images, got {len(bank)}")
    check_finite("bank", bank)
    check_finite("query", query)
    bank_rows, query_rows = (_unit_rows(features) for features in (bank, query))
    index = faiss.IndexFlatIP(bank_rows.shape[1])
    index.add(bank_rows)
    similarity, rows = index.search(query_rows, k)
    return torch.from_numpy(similarity), torch.from_numpy(rows)


def _unit_rows(features: Tensor) -> np.ndarray:
    return np.ascontiguousarray(F.normalize(features.float(), dim=1).cpu().numpy())


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Sum exp(similarity / temperature) over the neighbours of each class.

    The weighting of InstDisc (arXiv 1805.01978, section 3.4).

    Args:
        similarity: (Q, k).
        labels: (Q, k) class of each neighbour.
        classes: Number of classes.
        temperature: Divides the similarities.

    Returns:
        (Q, classes) scores; a row's largest possible weight is 1, so that nothing overflows.
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
) -> dict[int, tuple[float, float]]:
    """Classify queries by their neighbours.

    Args:
        bank: (N, D) features of the labelled memory bank.
        bank_labels: (N,).
        query: (Q, D) features of the validation images.
        query_labels: (Q,).
        classes: Number of classes.
        ks: Neighbours to vote; a k above the bank's size is left out, and all rows vote if every
            k is.
        temperature: Of the weights.

    Returns:
        k -> (top-1, top-5) in percent.

    Raises:
        DataError: If a feature is not finite.
    """
    fitting = [k for k in ks if k <= len(bank)] or [len(bank)]
    similarity, rows = neighbours(bank, query, max(fitting))
    votes = vote_grid(similarity, bank_labels[rows], query_labels, classes, fitting, [temperature])
    return {vote.k: (vote.top1, vote.top5) for vote in votes}


@dataclass(frozen=True)
class Vote:
    """What one setting of kNN gives.

    Attributes:
        k: Neighbours that vote.
        temperature: Of their weights.
        top1: Percent.
        top5: Percent; of fewer classes, of all of them.
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
    """Classify queries with every setting of a grid, from one search.

    Args:
        similarity: (Q, K) of the K nearest neighbours, falling; K is at least the largest k.
        neighbour_labels: (Q, K).
        query_labels: (Q,).
        classes: Number of classes.
        ks: Neighbours that vote.
        temperatures: Of the weights.
        chunk: Queries at a time, which bounds the memory for (chunk, classes) scores.

    Returns:
        One vote per setting, k by k.
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
    """Find the k nearest neighbours of bank rows among all the others.

    Args:
        bank: (N, D) features.
        rows: (R,) which of them ask.
        k: Neighbours; at most N - 1.

    Returns:
        Similarities (R, k), falling, and bank rows (R, k), none of them the asking one.

    Raises:
        DataError: As ``neighbours``.
    """
    similarity, found = neighbours(bank, bank[rows], k + 1)
    own = found == rows[:, None]
    # Of copies of one image, another may be found first, and the row itself not at all.
    own[:, -1] |= ~own.any(dim=1)
    kept = (~own).nonzero()[:, 1].view(len(rows), k)
    return similarity.gather(1, kept), found.gather(1, kept)
