"""The few shapes that travel between rooms, and the two contracts: method and mixer.

Legend: B images on this rank, S image side, D embedding width, C channels of a feature map,
h and w its sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Augmented views of B images, normalised, on the device."""

    views: tuple[Tensor, ...]  # each (B, 3, S, S) float
    label: Tensor  # (B,) int64, -1 where there is no label
    index: Tensor  # (B,) int64


@dataclass(frozen=True)
class Features:
    """What a backbone gives: feature maps by stage, and the pooled representation."""

    maps: dict[int, Tensor]  # stage (1, 2, ...) -> (B, C, h, w)
    pooled: Tensor  # (B, feature_dim)


@dataclass(frozen=True)
class MapSpec:
    """What a backbone states about the feature maps of one stage."""

    channels: int
    stride: int  # pixels of the image per position of the map


@dataclass(frozen=True)
class MixPlan:
    """Who is mixed with whom, and how much; drawn once, indexes images, maps and targets alike."""

    lam: Tensor  # (B,) float in [0, 1], the share of the image itself
    partner: Tensor  # (B,) int64, a derangement of 0..B-1


@dataclass(frozen=True)
class Mixed:
    """Mixed images and how they were mixed."""

    images: Tensor  # (B, 3, S, S)
    mask: Tensor  # (B, 1, S, S) in [0, 1], the share of the partner in each pixel
    lam: Tensor  # (B,) the ratio that the loss uses


class Method(Protocol):
    """What a method gives to whoever wants to learn from other images than the plain views."""

    def query(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) with the online branch, with gradient, to (B, D)."""

    def targets(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) with the branch that is compared against, no gradient, to (B, D)."""

    def frozen_query(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) with frozen weights to (B, D); gradient flows to the images only."""

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Compare each query with each of its parents, by the method's own criterion.

        Args:
            query: (B, D), of the online or the frozen branch.
            target: (B, D), what ``targets`` gave for this rank's images.
            parents: (B, P) int64, the rows of ``target`` that query i is made of: one for a plain
                view, two for a mixture. No parent of a query is among its negatives.

        Returns:
            (B, P), column p with parent p as the positive.
        """


class Mixer(Protocol):
    """A mixing policy: tensors in, tensors out; it has never heard of a queue or a label."""

    needs_maps: bool

    def __call__(
        self, images: Tensor, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None
    ) -> Mixed:
        """Mix row i of ``images`` with row ``plan.partner[i]`` of ``partners``.

        Args:
            images: (B, 3, S, S).
            partners: (B, 3, S, S), indexed by ``plan.partner``: the other view, or ``images``.
            plan: The ratios and partners.
            maps: Teacher feature maps of ``images`` and ``partners``, each (B, C, h, w), or None
                if ``needs_maps`` is False.
        """

    def regularizer(self, mixed: Mixed, plan: MixPlan) -> Tensor:
        """Scalar loss on the mask alone, zero for policies without parameters."""
