"""Contrastive losses per sample, of L2-normalised embeddings; all sums in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_samix.losses.precision import full_precision


@full_precision
def cosines(query: Tensor, positives: Tensor) -> Tensor:
    """Cosines of queries (K, D), of any length, and their positives (K, P, D): (K, P)."""
    return torch.einsum("kd,kpd->kp", F.normalize(query, dim=1), F.normalize(positives, dim=2))


@full_precision
def info_nce(query: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE with negatives that all queries share: MoCo's queue (arXiv 1911.05722, eq. 1).

    Args:
        query: (B, D).
        positives: (B, P, D), each scored as if it were the only positive.
        negatives: (K, D).
        temperature: Divides the similarities.

    Returns:
        (B, P) losses.
    """
    positive = torch.einsum("bd,bpd->bp", query, positives) / temperature
    negative = (query @ negatives.T / temperature).logsumexp(dim=1, keepdim=True)  # (B, 1)
    return torch.logaddexp(positive, negative) - positive


@full_precision
def info_nce_in_batch(
    query: Tensor, others: Tensor, parents: Tensor, extra: Tensor | None, temperature: float
) -> Tensor:
    """InfoNCE whose positives and negatives are rows of one (gathered) batch (SimCLR, eq. 1).

    Args:
        query: (B, D).
        others: (N, D), rows that hold every query's parents.
        parents: (B, P) rows of ``others``: each is a positive in its own column and is left out of
            the negatives of all columns.
        extra: (B, M) similarities to further negatives, -inf where there is none; or None.
        temperature: Divides the similarities, those in ``extra`` too.

    Returns:
        (B, P) losses.
    """
    similarity = query @ others.T / temperature  # (B, N)
    positive = similarity.gather(1, parents)  # (B, P)
    negatives = similarity.scatter(1, parents, float("-inf"))
    if extra is not None:
        negatives = torch.cat([negatives, extra / temperature], dim=1)
    negative = negatives.logsumexp(dim=1, keepdim=True)  # (B, 1)
    return torch.logaddexp(positive, negative) - positive


@full_precision
def nt_xent(
    first: Tensor,
    second: Tensor,
    all_first: Tensor,
    all_second: Tensor,
    offset: int,
    temperature: float,
) -> Tensor:
    """NT-Xent (SimCLR, arXiv 2002.05709, eq. 1), the mean of both directions.

    Args:
        first: (B, D) embeddings of one view of this rank's images.
        second: (B, D) of the other view.
        all_first: (N, D) of all ranks, in rank order; ``first`` itself on one rank.
        all_second: (N, D), likewise.
        offset: Row of ``all_first`` at which this rank's rows begin.
        temperature: Divides the similarities.

    Returns:
        (B,) losses.
    """
    own = offset + torch.arange(len(first), device=first.device)[:, None]  # (B, 1)
    total = torch.zeros(len(first), device=first.device)
    for query, same, other in ((first, all_first, all_second), (second, all_second, all_first)):
        siblings = (query @ same.T).scatter(1, own, float("-inf"))  # (B, N)
        total = total + info_nce_in_batch(query, other, own, siblings, temperature)[:, 0]
    return total / 2
