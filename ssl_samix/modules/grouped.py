"""Normalise a batch in groups, as several devices would."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
