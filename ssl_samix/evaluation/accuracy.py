"""Accuracy of logits."""

from __future__ import annotations

from torch import Tensor


def top1_top5(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 in percent; of fewer than 5 classes, top-5 is over all of them.

    Args:
        logits: (N, C).
        labels: (N,).
    """
    hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return 100 * hit[:, 0].double().mean().item(), 100 * hit.any(dim=1).double().mean().item()
