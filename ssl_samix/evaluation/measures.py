"""Measures that need no labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank of the features: exp of the entropy of their singular values.

    RankMe (arXiv 2210.02885, eq. 1-2). Between 1 (collapsed) and min(N, D).

    Args:
        features: (N, D), as the encoder gives them.
        epsilon: Added to each share, as in the paper.
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + epsilon
    return float((-(share * share.log()).sum()).exp())


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of the unit features of two views of the same images.

    Wang and Isola (arXiv 2005.10242, eq. 2, alpha 2); lower is better.

    Args:
        first: (N, D).
        second: (N, D).
    """
    distance = F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)
    return float(distance.square().sum(dim=1).mean())


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Log of the mean Gaussian potential of all pairs of unit features.

    Wang and Isola (arXiv 2005.10242, eq. 3); lower is more uniform.

    Args:
        features: (N, D) with N of at least 2.
        t: Width of the potential.
    """
    distances = torch.pdist(F.normalize(features.float(), dim=1))
    return float((-t * distances.square()).exp().mean().log())
