"""What a classifier loses: pure functions of logits and the shares of the classes.

Both losses are linear in the shares, so that the mean of two parents' losses, weighted by lam and
1 - lam, is exactly the loss of the mixed label.

Legend: K rows, P parents of each, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_samix.losses.precision import full_precision


def soft_labels(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Spread each label (B,) over the classes: (B, C) float32 rows that sum to one.

    Args:
        labels: (B,) int64.
        classes: C.
        smoothing: Share that all classes have in equal parts (arXiv 1512.00567, section 7).
    """
    return F.one_hot(labels, classes).float().mul_(1 - smoothing).add_(smoothing / classes)


@full_precision
def cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of the softmax.

    Args:
        logits: (K, C).
        shares: (K, P, C), of the classes in each parent.

    Returns:
        (K, P).
    """
    return -torch.einsum("kc,kpc->kp", logits.log_softmax(dim=1), shares)


@full_precision
def binary_cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of one sigmoid per class, the mean over classes (arXiv 2110.00476, section 3).

    Args:
        logits: (K, C).
        shares: (K, P, C), of the classes in each parent.

    Returns:
        (K, P).
    """
    wide = logits[:, None].expand_as(shares)
    return F.binary_cross_entropy_with_logits(wide, shares, reduction="none").mean(dim=2)
