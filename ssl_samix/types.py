"""Data classes that packages exchange, and two interfaces: ``Method`` and ``MixingPolicy``.

Legend: B images on this rank, S image side, D embedding width, C channels of a feature map,
h and w its sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Augmented views of B images, normalised, on the device."""

    views: tuple[Tensor, ...]  # two of (B, 3, S, S) float, then small ones (one if supervised)
    label: Tensor  # (B,) int64, -1 where there is no label
    index: Tensor  # (B,) int64


@dataclass(frozen=True)
class Features:
    """Output of a backbone: feature maps by stage, and pooled features."""

    maps: dict[int, Tensor]  # stage (1, 2, ...) -> (B, C, h, w)
    pooled: Tensor  # (B, feature_dim)


@dataclass(frozen=True)
class MapSpec:
    """Channels and stride of one stage's feature maps."""

    channels: int
    stride: int  # pixels of the image per position of the map


@dataclass(frozen=True)
class MixPlan:
    """Partners and ratios of a batch's mixtures; drawn once, for images, maps and targets alike.

    K of the B images are mixed; K = B unless only a fraction of the batch is mixed.
    """

    lam: Tensor  # (K,) float in [0, 1], the share of the image itself
    partner: Tensor  # (K,) int64, the row that image ``rows[k]`` is mixed with, never itself
    rows: Tensor  # (K,) int64, ascending, the images that are mixed

    @property
    def parents(self) -> Tensor:
        """Rows of both parents of each mixture, (K, 2)."""
        return torch.stack([self.rows, self.partner], dim=1)


@dataclass(frozen=True)
class Mixed:
    """Mixed images and how they were mixed."""

    images: Tensor  # (K, 3, S, S)
    partner: Tensor  # (K,) int64, row of each mixture's partner
    lam: Tensor  # (K,) weight of the image itself in the loss
    mask: Tensor  # (K, 1, S, S) in [0, 1], the share of the partner in each pixel


@dataclass(frozen=True)
class Terms:
    """Losses and logged values of one batch."""

    losses: dict[str, Tensor]  # scalars; their sum is minimised
    logs: dict[str, Tensor]  # scalars without gradient


class StagedBackbone(Protocol):
    """The part of a backbone's interface that mixing uses."""

    def map_spec(self, stage: int) -> MapSpec:
        """Return a stage's channels and stride; raise ``ConfigError`` if there is no such stage."""


class Method(Protocol):
    """Interface of a method: what a mixing objective needs to train on mixtures.

    Embeddings are L2-normalised, unless the method's criterion depends on their norm.
    """

    directions: tuple[tuple[int, int], ...]  # (query view, key view) of each term of its own loss
    keeps_plain_views: bool  # what ``placement=auto`` means
    mixer_weights: tuple[float, float]  # defaults of ``local_weight`` and ``eta``

    def own_loss(self, views: tuple[Tensor, ...]) -> Tensor:
        """Return the loss of the plain views, (B,)."""

    def query(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) with the online branch, with gradient, to (B, D)."""

    def mixed_query(self, images: Tensor) -> Tensor:
        """Embed mixtures that are used beside plain views; equals ``query`` if there is one head.

        ``frozen_query`` is the same through the frozen teacher.
        """

    def keys(self, images: Tensor) -> Tensor:
        """Embed images to the keys (B, D) of the method's own loss, with gradient if it has one."""

    def targets(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) to (B, D) as ``keys`` does, without gradient."""

    def maps(self, images: Tensor, stage: int, source: str) -> Tensor:
        """Return a stage's feature maps (B, C, h, w), without gradient.

        Args:
            images: (B, 3, S, S), plain views.
            stage: Of the backbone.
            source: ``teacher``, or ``online``: from a forward pass of these images that was made
                anyway.
        """

    def frozen_query(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) to (B, D) with the frozen teacher; gradient to the images only."""

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return the method's loss between each query and each of its parents.

        Args:
            query: (K, D), of the online or the frozen branch.
            target: (B, D), what ``targets`` or ``keys`` returned for this rank's images.
            parents: (K, P) int64, the rows of ``target`` that query k is made of: one for a plain
                view, two for a mixture. No parent of a query is among its negatives.

        Returns:
            (K, P), column p with parent p as the positive.
        """

    def contrast(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return a contrastive loss (K, P), even if ``pair_loss`` has no negatives."""

    def likeness(
        self, query: Tensor, target: Tensor, parents: Tensor, temperature: float
    ) -> Tensor:
        """Return the similarity of each query to each of its parents, as logits (K, P)."""


class MixingPolicy(Protocol):
    """Interface of a mixing policy; it depends on neither the queue nor labels."""

    needs_maps: bool

    def __call__(
        self, images: Tensor, partners: Tensor, plan: MixPlan, maps: tuple[Tensor, Tensor] | None
    ) -> Mixed:
        """Mix row ``plan.rows[k]`` of ``images`` with row ``plan.partner[k]`` of ``partners``.

        Args:
            images: (B, 3, S, S).
            partners: (B, 3, S, S), indexed by ``plan.partner``: the other view, or ``images``.
            plan: The ratios and partners.
            maps: Teacher feature maps of ``images`` and ``partners``, each (B, C, h, w), or None
                if ``needs_maps`` is False.
        """
