"""Normalise a batch in groups, as several devices would."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def in_groups(encoder: nn.Module, images: Tensor, groups: int) -> Tensor:
    """Run ``encoder`` on each of ``groups`` consecutive parts of the batch and join the results.

    BatchNorm sees one part at a time. A group has at least two images; fewer groups are made of a
    batch that is too small.
    """
    groups = min(groups, len(images) // 2)
    if groups <= 1 or not encoder.training:
        return encoder(images)
    return torch.cat([encoder(part) for part in images.tensor_split(groups)])
