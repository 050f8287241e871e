"""Losses per sample: pure functions of tensors, computed in float32 also under autocast.

Contrastive losses read L2-normalised embeddings. The classifier's losses are linear in the shares
of the classes, so that the mean of two parents' losses, weighted by lam and 1 - lam, is exactly the
loss of the mixed label.

Legend: K rows, P parents of each, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lightly.utils.dist import world_size
from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def full_precision(loss: Loss) -> Loss:
    """Decorate ``loss``: autocast is off inside, and floating-point arguments become float32.

    Autocast would turn a product of float32 tensors into bfloat16: differences of similarities
    divided by a small temperature need more than its 8 bits.
    """

    @wraps(loss)
    def in_float32(query: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            return loss(query.float(), *map(_float32, arguments), **settings)

    return in_float32  # type: ignore[return-value]


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@full_precision
def cosines(query: Tensor, positives: Tensor) -> Tensor:
    """Return cosines (K, P) of queries (K, D), of any norm, and their positives (K, P, D)."""
    return torch.einsum("kd,kpd->kp", F.normalize(query, dim=1), F.normalize(positives, dim=2))


@full_precision
def info_nce(query: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE with negatives that all queries share: MoCo's queue (arXiv 1911.05722, eq. 1).

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
    """Return InfoNCE with positives and negatives from one (gathered) batch (SimCLR, eq. 1).

    Args:
        query: (B, D).
        others: (N, D), the batch; holds every query's parents.
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
def scores(embedding: Tensor, prototypes: Tensor) -> Tensor:
    """Return the products (K, C) of embeddings (K, D) and prototypes (C, D)."""
    return embedding @ prototypes.T


@full_precision
@torch.no_grad()
def nearest_neighbours(rows: Tensor, bank: Tensor) -> Tensor:
    """Return the row of ``bank`` (N, D) nearest to each of ``rows`` (B, D), both L2-normalised."""
    return bank[(rows @ bank.T).argmax(dim=1)]


@full_precision
def nt_xent(
    first: Tensor,
    second: Tensor,
    all_first: Tensor,
    all_second: Tensor,
    offset: int,
    temperature: float,
) -> Tensor:
    """Return NT-Xent (SimCLR, arXiv 2002.05709, eq. 1), the mean of both directions.

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


@full_precision
def cosine_regression(query: Tensor, positives: Tensor) -> Tensor:
    """Return the squared distance of unit vectors, 2 - 2 cos (BYOL, arXiv 2006.07733, eq. 2).

    Args:
        query: (B, D), L2-normalised.
        positives: (B, P, D), L2-normalised.

    Returns:
        (B, P) losses in [0, 4].
    """
    return 2 - 2 * torch.einsum("bd,bpd->bp", query, positives)


@full_precision
def negative_cosine(query: Tensor, positives: Tensor) -> Tensor:
    """Return the negative cosine of unit vectors (SimSiam, arXiv 2011.10566, eq. 1).

    Args:
        query: (B, D), L2-normalised.
        positives: (B, P, D), L2-normalised.

    Returns:
        (B, P) losses in [-1, 1].
    """
    return -torch.einsum("bd,bpd->bp", query, positives)


@full_precision
def cross_correlation(query: Tensor, positives: Tensor, redundancy: float) -> Tensor:
    """Return Barlow Twins' loss (arXiv 2103.03230, eq. 1 and 2), one value per sample.

    The loss is a function of a matrix C that is a mean over the batch. To first order in what one
    sample adds to C, the loss is a mean of contributions: their mean over the batch has the value
    and the gradient of the loss, and each can be weighted by its sample's ratio.

    Args:
        query: (K, D), not normalised.
        positives: (K, P, D), not normalised, each column as if it were the only positive.
        redundancy: Weight of the off-diagonal elements.

    Returns:
        (K, P) losses.
    """
    columns = [_per_sample(query, positive, redundancy) for positive in positives.unbind(dim=1)]
    return torch.stack(columns, dim=1)


def _per_sample(query: Tensor, positive: Tensor, redundancy: float) -> Tensor:
    first, second = _standardised(query), _standardised(positive)  # (K, D)
    identity = torch.eye(first.shape[1], device=first.device)
    with torch.no_grad():
        matrix = _over_ranks(first.T @ second / len(first))
        residual = matrix - identity
        weights = identity + redundancy * (1 - identity)
        slope = 2 * weights * residual  # of the loss, in the elements of the matrix
        constant = (weights * residual**2).sum() - (slope * matrix).sum()
    return ((first @ slope) * second).sum(dim=1) + constant


def _standardised(rows: Tensor) -> Tensor:
    """Standardise each column to mean 0 and variance 1 over the rows."""
    return F.batch_norm(rows, None, None, training=True)


def _over_ranks(mean: Tensor) -> Tensor:
    """Return the mean over all ranks of a mean over each rank's rows, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(mean)
        mean /= world_size()
    return mean


VARIANCE_EPS = 1e-4  # added to variances, as in the authors' code of VICReg


@full_precision
def vicreg(
    query: Tensor,
    target: Tensor,
    parents: Tensor,
    invariance: float,
    variance: float,
    covariance: float,
) -> Tensor:
    """Return VICReg's loss (arXiv 2105.04906, eq. 1 to 6), one value per sample.

    Variance and covariance are those of the rows of all ranks. Each sample has its first-order
    contribution to their terms (see ``cross_correlation``), whose mean has their value and
    gradient.

    Args:
        query: (K, D), not normalised.
        target: (B, D), not normalised.
        parents: (K, P) rows of ``target``.
        invariance: Weight of the squared distance to each parent.
        variance: Weight of the hinge that keeps each column's standard deviation at 1.
        covariance: Weight of the squared covariances between columns.

    Returns:
        (K, P) losses.
    """
    distance = (query[:, None] - target[parents]).square().mean(dim=2)  # (K, P)
    own = _regularisation(query, variance / 2, covariance)[:, None]
    return invariance * distance + own + _regularisation(target, variance / 2, covariance)[parents]


def _regularisation(rows: Tensor, variance: float, covariance: float) -> Tensor:
    """Return each row's part (K,) of VICReg's variance and covariance terms of rows (K, D)."""
    width, count = rows.shape[1], len(rows) * world_size()
    unbiased = count / max(1, count - 1)
    # The mean takes no gradient: over the batch, what flows through it adds up to zero.
    centred = rows - _over_ranks(rows.detach().mean(dim=0))
    with torch.no_grad():
        matrix = _over_ranks(unbiased * centred.T @ centred / len(rows))  # (D, D)
        deviation = (matrix.diagonal() + VARIANCE_EPS).sqrt()
        between = matrix - matrix.diagonal().diag()
        hinge = -variance * (deviation < 1) / (2 * deviation)
        slope = (2 * covariance * between + hinge.diag()) / width  # of the terms, in the matrix
        terms = (
            variance * (1 - deviation).relu().mean() + covariance * between.square().sum() / width
        )
        constant = terms - (slope * matrix).sum()
    return unbiased * ((centred @ slope) * centred).sum(dim=1) + constant


def soft_labels(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Return smoothed one-hot labels (B, C) of labels (B,), float32 rows that sum to one.

    Args:
        labels: (B,) int64.
        classes: C.
        smoothing: Share that is spread evenly over all classes (arXiv 1512.00567, section 7).
    """
    return F.one_hot(labels, classes).float().mul_(1 - smoothing).add_(smoothing / classes)


@full_precision
def cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """Return the cross-entropy of the softmax.

    Args:
        logits: (K, C).
        shares: (K, P, C), of the classes in each parent.

    Returns:
        (K, P).
    """
    return -torch.einsum("kc,kpc->kp", logits.log_softmax(dim=1), shares)


@full_precision
def binary_cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """Return the mean over classes of one sigmoid's cross-entropy (arXiv 2110.00476, section 3).

    Args:
        logits: (K, C).
        shares: (K, P, C), of the classes in each parent.

    Returns:
        (K, P).
    """
    wide = logits[:, None].expand_as(shares)
    return F.binary_cross_entropy_with_logits(wide, shares, reduction="none").mean(dim=2)
