"""Rows of all ranks, for losses that compare with each of them."""

from __future__ import annotations

import torch
from lightly.utils.dist import gather, rank, world_size
from torch import Tensor


def gathered(rows: Tensor) -> Tensor:
    """Join the rows (B, D) of all ranks in rank order, (N, D), with gradient to each of them."""
    return torch.cat(gather(rows), dim=0) if world_size() > 1 else rows


def offset(rows: Tensor) -> int:
    """Return the row of ``gathered(rows)`` at which this rank's begin."""
    return rank() * len(rows)
