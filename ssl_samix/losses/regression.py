"""Regression of one embedding onto another, per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_samix.losses.precision import full_precision


@full_precision
def cosine_regression(query: Tensor, positives: Tensor) -> Tensor:
    """Squared distance of unit vectors, 2 - 2 cos (BYOL, arXiv 2006.07733, eq. 2).

    Args:
        query: (B, D), L2-normalised.
        positives: (B, P, D), L2-normalised.

    Returns:
        (B, P) losses in [0, 4].
    """
    return 2 - 2 * torch.einsum("bd,bpd->bp", query, positives)


@full_precision
def negative_cosine(query: Tensor, positives: Tensor) -> Tensor:
    """Negative cosine of unit vectors (SimSiam, arXiv 2011.10566, eq. 1).

    Args:
        query: (B, D), L2-normalised.
        positives: (B, P, D), L2-normalised.

    Returns:
        (B, P) losses in [-1, 1].
    """
    return -torch.einsum("bd,bpd->bp", query, positives)
