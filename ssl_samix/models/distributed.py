"""Gathering over devices, and BatchNorm in groups of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightly.utils.dist import gather, rank, world_size
from torch import Tensor


def gathered(rows: Tensor) -> Tensor:
    """Return the rows (B, D) of all ranks in rank order, (N, D), with gradient to each of them."""
    return torch.cat(gather(rows), dim=0) if world_size() > 1 else rows


def offset(rows: Tensor) -> int:
    """Return the index of this rank's first row in ``gathered(rows)``."""
    return rank() * len(rows)


def in_groups(
    encode: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor, groups: int
) -> tuple[Tensor, ...]:
    """Return the concatenated outputs of ``encode`` for ``groups`` consecutive parts of the batch.

    BatchNorm sees one part at a time. A group has at least two images; a batch that is too small is
    split into fewer groups.

    Args:
        encode: Maps images (n, 3, S, S) to tensors of n rows.
        images: (B, 3, S, S).
        groups: Number of parts.
    """
    groups = min(groups, len(images) // 2)
    if groups <= 1:
        return encode(images)
    parts = [encode(part) for part in images.tensor_split(groups)]
    return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
