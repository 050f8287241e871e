"""The few shapes that travel between rooms, and the two contracts: method and mixer.

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
    """Who is mixed with whom, and how much; drawn once, indexes images, maps and targets alike.

    K of the B images are mixed; K = B unless a share of the batch stays plain.
    """

    lam: Tensor  # (K,) float in [0, 1], the share of the image itself
    partner: Tensor  # (K,) int64, the row that image ``rows[k]`` is mixed with, never itself
    rows: Tensor  # (K,) int64, ascending, the images that are mixed

    @property
    def parents(self) -> Tensor:
        """The two rows that each mixture is made of, (K, 2)."""
        return torch.stack([self.rows, self.partner], dim=1)


@dataclass(frozen=True)
class Mixed:
    """Mixed images and how they were mixed."""

    images: Tensor  # (K, 3, S, S)
    partner: Tensor  # (K,) int64, whom each was mixed with
    lam: Tensor  # (K,) the ratio that the loss uses, the share of the image itself
    mask: Tensor  # (K, 1, S, S) in [0, 1], the share of the partner in each pixel


@dataclass(frozen=True)
class Terms:
    """What an objective makes of a batch."""

    losses: dict[str, Tensor]  # scalars, summed to what is minimised
    logs: dict[str, Tensor]  # scalars without gradient


class StagedBackbone(Protocol):
    """A backbone, as far as mixing is concerned."""

    def map_spec(self, stage: int) -> MapSpec:
        """State a stage's feature map, or raise ``ConfigError`` if there is no such stage."""


class Method(Protocol):
    """What a method gives to whoever wants to learn from other images than the plain views.

    Embeddings are unit rows, but for a method whose criterion reads their lengths.
    """

    directions: tuple[tuple[int, int], ...]  # (query view, key view) of each term of its own loss
    keeps_plain_views: bool  # beside mixtures, where the configuration leaves it to the method
    mixer_weights: tuple[float, float]  # of a Mixer's local and global term, likewise

    def own_loss(self, views: tuple[Tensor, ...]) -> Tensor:
        """Return the loss of the plain views, (B,)."""

    def query(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) with the online branch, with gradient, to (B, D)."""

    def mixed_query(self, images: Tensor) -> Tensor:
        """Embed mixtures that come beside plain views: as ``query``, if it has one head for both.

        ``frozen_query`` is this one's frozen twin.
        """

    def keys(self, images: Tensor) -> Tensor:
        """Embed what its own loss compares queries with, (B, D), with gradient where it has one."""

    def targets(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) as ``keys``, no gradient, to (B, D)."""

    def maps(self, images: Tensor, stage: int, source: str) -> Tensor:
        """Return a stage's feature maps (B, C, h, w), no gradient.

        Args:
            images: (B, 3, S, S), plain views.
            stage: Of the backbone.
            source: ``teacher``, or ``online``: of whichever pass has seen these images already.
        """

    def frozen_query(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) with the frozen teacher to (B, D); gradient to the images only."""

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Compare each query with each of its parents, by the method's own criterion.

        Args:
            query: (K, D), of the online or the frozen branch.
            target: (B, D), what ``targets`` or ``keys`` gave for this rank's images.
            parents: (K, P) int64, the rows of ``target`` that query k is made of: one for a plain
                view, two for a mixture. No parent of a query is among its negatives.

        Returns:
            (K, P), column p with parent p as the positive.
        """

    def contrast(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Like ``pair_loss``, with negatives in any case: what tells a mixture from all others."""

    def likeness(
        self, query: Tensor, target: Tensor, parents: Tensor, temperature: float
    ) -> Tensor:
        """Say how like each query is to each of its parents, as logits (K, P)."""


class MixingPolicy(Protocol):
    """Tensors in, tensors out; a policy has never heard of a queue or a label."""

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
