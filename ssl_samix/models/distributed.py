"""What depends on the number of devices: gathered rows, batches normalised in groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightly.utils.dist import gather, rank, world_size
from torch import Tensor


def gathered(rows: Tensor) -> Tensor:
    """Join the rows (B, D) of all ranks in rank order, (N, D), with gradient to each of them."""
    return torch.cat(gather(rows), dim=0) if world_size() > 1 else rows


def offset(rows: Tensor) -> int:
    """Return the row of ``gathered(rows)`` at which this rank's begin."""
    return rank() * len(rows)


def in_groups(
    encode: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor, groups: int
) -> tuple[Tensor, ...]:
    """Encode each of ``groups`` consecutive parts of the batch and join what they give.

    BatchNorm sees one part at a time. A group has at least two images; fewer groups are made of a
    batch that is too small.

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
