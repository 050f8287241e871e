"""Mixing objective: combines a mixing policy with a method, which are independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_samix.errors import check_choice, check_range
from ssl_samix.mixup.plan import SMALLEST, draw_plan, share_done, window
from ssl_samix.optim import MixerOptimizer
from ssl_samix.types import (
    Batch,
    Method,
    Mixed,
    MixingPolicy,
    MixPlan,
    StagedBackbone,
    Terms,
)

SMALLEST_SIZE = 0.25  # of a mixture, as a fraction of the views' side
SEEN_TEMPERATURE = 0.2  # temperature of similarities, as in the Mixer's local term


class MixObjective(nn.Module):
    """The encoder's loss on plain and mixed images.

    Args:
        policy: Creates the mixed images.
        alpha: Ratios are drawn from Beta(alpha, alpha), one per mixture.
        weight: Factor of the mixed loss.
        placement: ``add``: mixtures are used in addition to the plain views, whose loss is kept (as
            in the paper). ``replace``: mixtures replace the query views and the mixed loss replaces
            the own loss, without an extra forward pass of the encoder. ``auto``: ``replace`` in
            supervised training for policies without training, as the hand-crafted ones were
            published, else ``add``.
        fraction: Fraction of the batch that is mixed.
        during: Start and end, as fractions of the run, of the steps that mix images. Other steps
            are plain and have the cost of plain ones.
        pairs: View that the partners' pixels are taken from: the other view (``cross``) or the
            ``same`` view. ``auto``: ``same`` if mixtures replace the views, else ``cross``. With
            ``replace`` and ``cross``, the only task would be an easy one, since the partner would
            be compared with the view that its own pixels are taken from.
        lam: Weight of the image in a mixture's loss. ``drawn``: the drawn ratio, or the policy's
            replacement of it. ``seen``: the mean of that and of the softmax of the teacher's
            similarities between the mixture and both parents, which takes a forward pass of the
            teacher without gradient (after SUMix, arXiv 2407.07805).
        targets: Views that the parents' targets are computed from, for ``cross`` pairs.
            ``shared``: for both, the view that the partner's pixels are taken from, which every
            method embeds anyway; the partner is compared with its own view. ``sibling``: for each
            parent, the view that its pixels are not taken from, as in OpenMixup's moco_samix.py; a
            method that embeds only one view (MoCo) needs an extra forward pass.
        size: Side of the mixtures, as a fraction of the views', when the encoder reads them; below
            1, a step costs less. For mixtures beside the plain views. ``auto``: 1, unless the run
            has chosen another.
        stage: Backbone stage whose feature maps the policy uses; None if it uses none.
        features: Source of the maps. ``teacher``: the teacher. ``online``: any forward pass of
            either branch that is made anyway, so that no extra pass is needed.
        backbone: Provides the shapes of the stages' maps; may be None if ``stage`` is None.

    Raises:
        ConfigError: If a setting is out of range, or the backbone does not have the stage.
    """

    learns = False  # whether the policy is trained and needs a teacher
    optimizer: MixerOptimizer | None = None  # optimizer of a trained policy
    description: dict[str, Any]  # settings to rebuild a trained policy
    momentum = 0.99  # EMA momentum of the teacher that is added to a method without one

    def __init__(  # noqa: PLR0913 - one argument per configuration key
        self,
        policy: MixingPolicy,
        *,
        alpha: float = 2.0,
        weight: float = 1.0,
        placement: Literal["auto", "add", "replace"] = "auto",
        fraction: float = 1.0,
        during: Sequence[float] = (0.0, 1.0),
        pairs: Literal["auto", "cross", "same"] = "auto",
        targets: Literal["shared", "sibling"] = "shared",
        lam: Literal["drawn", "seen"] = "drawn",
        size: float | Literal["auto"] = 1.0,
        stage: int | None = None,
        features: Literal["teacher", "online"] = "teacher",
        backbone: StagedBackbone | None = None,
    ) -> None:
        super().__init__()
        check_range("mixup.alpha", alpha, SMALLEST)
        check_range("mixup.weight", weight, 0)
        self.size = 1.0 if size == "auto" else size
        check_range("mixup.size", self.size, SMALLEST_SIZE, 1)
        check_range("mixup.fraction", fraction, SMALLEST, 1)
        check_choice("mixup.placement", placement, ("auto", "add", "replace"))
        check_choice("mixup.pairs", pairs, ("auto", "cross", "same"))
        check_choice("mixup.targets", targets, ("shared", "sibling"))
        check_choice("mixup.lam", lam, ("drawn", "seen"))
        check_choice("mixup.features", features, ("teacher", "online"))
        if stage is not None and backbone is not None:
            backbone.map_spec(stage)
        self.policy = policy
        self.alpha, self.weight, self.fraction = alpha, weight, fraction
        self.placement, self.pairs, self.targets = placement, pairs, targets
        self.lam = lam
        self.begin, self.end = window(during)
        self.stage, self.features = stage, features

    def forward(self, method: Method, batch: Batch, step: int, total_steps: int) -> Terms:
        """Return the named losses of a batch and the values to log.

        Args:
            method: Computes embeddings and losses.
            batch: Views of B images.
            step: Number of optimizer steps so far.
            total_steps: Number of optimizer steps of the whole run.
        """
        if not self.mixes(step, total_steps):
            return Terms({"own": method.own_loss(batch.views).mean()}, {})
        if self.replaces(method):
            directions = method.directions
            parts = [self._in_place(method, batch, *pair).mean() for pair in directions]
            return Terms({"mix": self.weight * torch.stack(parts).mean()}, {})
        own = method.own_loss(batch.views).mean()  # first: its forward passes are reused
        mix = self._beside(method, batch).mean()
        return Terms({"own": own, "mix": self.weight * mix}, {})

    def mixes(self, step: int, total_steps: int) -> bool:
        """Return whether images are mixed in this step of the run."""
        return self.begin <= share_done(step, total_steps) < self.end

    def mixes_in(self, steps: range, total_steps: int) -> bool:
        """Return whether images are mixed in any of these steps."""
        return any(self.mixes(step, total_steps) for step in steps)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the normalisation of the input images, per channel; ignored here."""

    def replaces(self, method: Method) -> bool:
        """Return whether mixtures replace the query views."""
        if self.placement == "auto":
            return not (method.keeps_plain_views or self.learns)
        return self.placement == "replace"

    def crosses(self, method: Method) -> bool:
        """Return whether partners are taken from the other view."""
        if self.pairs == "auto":
            return not self.replaces(method)
        return self.pairs == "cross"

    def _beside(self, method: Method, batch: Batch) -> Tensor:
        plan = self.draw(batch.views[0])
        # Before the mixtures, because these forward passes may provide the maps for the masks.
        targets = self.targets_of_parents(method, batch, method.targets(batch.views[1]))
        mixed = self.mixtures(method, batch, plan, 0, 1)
        query = method.mixed_query(self.resized(mixed.images.detach()))
        lam = self.weights(method, mixed, plan, targets)
        return weighted(parent_losses(method.pair_loss, query, targets, plan.parents), lam)

    @torch.no_grad()
    def weights(
        self, method: Method, mixed: Mixed, plan: MixPlan, targets: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the weight of the image itself in the loss of each mixture, (K,)."""
        if self.lam == "drawn":
            return mixed.lam
        query = method.frozen_query(self.resized(mixed.images))
        like = partial(method.likeness, temperature=SEEN_TEMPERATURE)
        seen = parent_losses(like, query, targets, plan.parents).float().softmax(dim=1)[:, 0]
        return (mixed.lam + seen.to(mixed.lam.dtype)) / 2

    def _in_place(self, method: Method, batch: Batch, first: int, second: int) -> Tensor:
        """Return losses (B,) with mixtures as view ``first``; lam is 1 for unmixed images."""
        images = batch.views[first]
        keys = method.keys(batch.views[second])
        plan = self.draw(images)
        mixed = self.mixtures(method, batch, plan, first, second)
        own = torch.arange(len(images), device=images.device)[:, None]
        parents = own.repeat(1, 2).index_copy(0, plan.rows, plan.parents)
        targets = self.targets_of_parents(method, batch, keys, first)
        weights = self.weights(method, mixed, plan, targets)
        lam = torch.ones(len(images), device=images.device, dtype=weights.dtype)
        lam = lam.index_copy(0, plan.rows, weights)
        query = method.query(images.index_copy(0, plan.rows, mixed.images.detach()))
        return weighted(parent_losses(method.pair_loss, query, targets, parents), lam)

    def targets_of_parents(
        self, method: Method, batch: Batch, own: Tensor, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the targets of the images and of their partners.

        Args:
            method: Computes the embeddings.
            batch: Views of B images.
            own: (B, D) targets of the view that the images' pixels are not taken from.
            first: Index of the view that the images' pixels are taken from.

        Returns:
            Two tensors (B, D); the same tensor twice if both use the same view.
        """
        image = batch.views[first]
        crossed = self.crosses(method) and any(view is not image for view in batch.views)
        if self.targets == "shared" or not crossed:
            return own, own
        return own, method.targets(image)

    @property
    def networks(self) -> list[nn.Module]:
        """Modules that are worth compiling; none here."""
        return []

    def resized(self, mixtures: Tensor) -> Tensor:
        """Return mixtures (K, 3, S, S) as the encoder reads them, (K, 3, size * S, size * S)."""
        if self.size == 1:
            return mixtures
        side = round(self.size * mixtures.shape[-1])
        return F.interpolate(mixtures, (side, side), mode="bilinear", antialias=True)

    def draw(self, images: Tensor) -> MixPlan:
        """Return randomly drawn pairs and mixing ratios."""
        return draw_plan(len(images), self.alpha, images.device, self.fraction)

    def mixtures(
        self, method: Method, batch: Batch, plan: MixPlan, first: int, second: int
    ) -> Mixed:
        """Return mixtures of view ``first`` with partners from view ``second`` or ``first``."""
        images, partners = self.sources(method, batch, first, second)
        return self.policy(images, partners, plan, self.maps(method, images, partners))

    def sources(
        self, method: Method, batch: Batch, first: int, second: int
    ) -> tuple[Tensor, Tensor]:
        """Return the images, and the images that their partners are taken from."""
        images = batch.views[first]
        return images, batch.views[second] if self.crosses(method) else images

    def maps(
        self, method: Method, images: Tensor, partners: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return the feature maps of both, or None if the policy does not use them."""
        if self.stage is None or not self.policy.needs_maps:
            return None
        own = method.maps(images, self.stage, self.features)
        if partners is images:
            return own, own
        return own, method.maps(partners, self.stage, self.features)

    def before_step(self) -> None:
        """Hook between backward pass and optimizer step; does nothing here."""

    def error_message(self) -> str | None:
        """Return a message about an error in the steps so far, or None."""
        return None


def parent_losses(
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    targets: tuple[Tensor, Tensor],
    parents: Tensor,
) -> Tensor:
    """Return the losses of mixtures for both parents, each among the targets of its view.

    Args:
        criterion: Function of queries, targets (B, D) and parents that returns (K, 2).
        query: (K, D).
        targets: Targets (B, D) of the images and of their partners.
        parents: (K, 2) rows of the parents; in both columns, neither of them is a negative.

    Returns:
        (K, 2).
    """
    of_image, of_partner = targets
    losses = criterion(query, of_image, parents)
    if of_partner is of_image:
        return losses
    return torch.stack([losses[:, 0], criterion(query, of_partner, parents)[:, 1]], dim=1)


def weighted(losses: Tensor, lam: Tensor) -> Tensor:
    """Return the sum (K,) of both parents' losses (K, 2), weighted by lam and 1 - lam."""
    return lam * losses[:, 0] + (1 - lam) * losses[:, 1]
