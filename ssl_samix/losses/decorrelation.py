"""Barlow Twins' criterion, sample by sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.utils.dist import world_size
from torch import Tensor

from ssl_samix.losses.precision import full_precision


@full_precision
def cross_correlation(query: Tensor, positives: Tensor, redundancy: float) -> Tensor:
    """Barlow Twins' loss (arXiv 2103.03230, eq. 1 and 2) as a mean of one value per sample.

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
    columns = [_one(query, positive, redundancy) for positive in positives.unbind(dim=1)]
    return torch.stack(columns, dim=1)


def _one(query: Tensor, positive: Tensor, redundancy: float) -> Tensor:
    first, second = _standardised(query), _standardised(positive)  # (K, D)
    identity = torch.eye(first.shape[1], device=first.device)
    with torch.no_grad():
        matrix = first.T @ second / len(first)
        if world_size() > 1:
            torch.distributed.all_reduce(matrix)
            matrix /= world_size()
        residual = matrix - identity
        weights = identity + redundancy * (1 - identity)
        slope = 2 * weights * residual  # of the loss, in the elements of the matrix
        constant = (weights * residual**2).sum() - (slope * matrix).sum()
    return ((first @ slope) * second).sum(dim=1) + constant


def _standardised(rows: Tensor) -> Tensor:
    """Bring each column to mean 0 and variance 1 over the rows."""
    return F.batch_norm(rows, None, None, training=True)
