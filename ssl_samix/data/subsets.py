"""Seeded, class-balanced choices of images, made from the labels alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_samix.errors import DataError


def stratified(labels: Tensor, n: int, seed: int) -> Tensor:
    """Return ``n`` images with each class in proportion, by largest remainder.

    Each class gets at least one image when ``n`` reaches the number of classes. Without labels
    (all -1) the choice is uniform. With the same seed, a smaller choice is part of a larger one, up
    to rounding.

    Args:
        labels: (N,) int64.
        n: Number of images; more than N gives all.
        seed: Fixes the choice.

    Returns:
        (min(n, N),) int64 positions, ascending.

    Raises:
        DataError: ``n`` is below 1.
    """
    if n < 1:
        raise DataError("data.limit must be at least 1")
    if n >= len(labels):
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    _, kind, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    share = _shares(counts, n, generator)
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.argsort(kind[order], stable=True)]  # class by class, shuffled within
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - first[kind[order]]  # (N,) place within the class
    return order[rank < share[kind[order]]].sort().values


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return positions of train and validation out of N images, each class in proportion.

    A class with a single image stays in train, since it can be learned but not checked.

    Args:
        labels: (N,) int64.
        share: Part of N that becomes validation, in (0, 0.5].
        seed: Fixes the choice.

    Returns:
        Ascending int64 positions of train and of validation; the latter is empty if no class has
        two images.
    """
    _, kind, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    eligible = torch.nonzero(counts[kind] >= 2).flatten()
    n = max(1, round(share * len(labels)))
    val = eligible[stratified(labels[eligible], n, seed)] if len(eligible) else eligible
    is_train = torch.ones(len(labels), dtype=torch.bool)
    is_train[val] = False
    return torch.nonzero(is_train).flatten(), val


def _shares(counts: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return the number of each class, (K,) int64 with sum ``n``, for (K,) counts."""
    quota = n * counts.double() / counts.sum()
    share = quota.floor().long()
    if n >= len(counts):
        share = share.clamp(min=1)
    # ties are broken at random, so that the first classes are not preferred
    wish = quota + 1e-9 * torch.rand(len(counts), generator=generator, dtype=torch.float64)
    while int(share.sum()) < n:
        share[(wish - share).masked_fill(share >= counts, -torch.inf).argmax()] += 1
    while int(share.sum()) > n:  # the at-least-one rule gave too many
        share[(share - wish).masked_fill(share <= 1, -torch.inf).argmax()] -= 1
    return share
