"""Joins a mixing policy to a method; neither knows the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
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

SEEN_TEMPERATURE = 0.2  # of similarities, as of the Mixer's local term


class MixObjective(nn.Module):
    """The loss of the encoder on plain and mixed images.

    Args:
        policy: Makes the mixed images.
        alpha: Ratios are drawn from Beta(alpha, alpha), one per mixture.
        weight: Factor of the mixed loss.
        placement: ``add``: mixtures come beside the plain views, whose own loss stays (as in the
            paper). ``replace``: mixtures are the query views and the own loss is the mixed one, at
            no extra pass of the encoder. ``auto``: replace in supervised training for policies that
            do not learn, as the hand-made ones were published, add everywhere else.
        fraction: Share of the batch that is mixed.
        during: Shares of the run, from and to, between which images are mixed; the steps before and
            after are plain ones, at the cost of plain ones.
        pairs: Partners' pixels are those of the other view, ``cross``, or of the ``same`` view.
            ``auto``: same where mixtures replace the views (else their only task were an easy one:
            the partner is compared with the view that its pixels are of), cross beside them.
        lam: Weight of the image in a mixture's loss. ``drawn``: the ratio that was drawn, or what
            the policy says instead. ``seen``: the mean of that and of what the teacher sees: the
            softmax of the mixture's similarities to both parents, at a pass of the teacher without
            gradient (after SUMix, arXiv 2407.07805).
        targets: Of the parents of ``cross`` pairs. ``shared``: both of the view that the partner's
            pixels are of, which every method embeds anyway; the partner meets its own view.
            ``sibling``: each parent's is of the view that its pixels are not of, as in OpenMixup's
            moco_samix.py; a method that embeds one view only (MoCo) makes a pass for it.
        stage: Of the backbone, whose maps the policy reads; None if it reads none.
        features: ``teacher``: maps are the teacher's. ``online``: those of a pass of either branch
            that happens anyway, so that no pass is made for them.
        backbone: States the maps of its stages; may be None if ``stage`` is.

    Raises:
        ConfigError: For a setting outside its range, or a stage that the backbone does not have.
    """

    learns = False  # whether the policy is trained, and a teacher is wanted
    optimizer: MixerOptimizer | None = None  # of a policy that is trained
    description: dict[str, Any]  # what rebuilds a policy that is trained
    momentum = 0.99  # of the teacher that a method gets if it has none of its own

    def __init__(  # noqa: PLR0913 - the keys of the configuration, by name
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
        stage: int | None = None,
        features: Literal["teacher", "online"] = "teacher",
        backbone: StagedBackbone | None = None,
    ) -> None:
        super().__init__()
        check_range("mixup.alpha", alpha, SMALLEST)
        check_range("mixup.weight", weight, 0)
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
        """Return the named losses of a batch and what is logged of it.

        Args:
            method: Embeds and compares.
            batch: Views of B images.
            step: Optimizer steps done so far.
            total_steps: Of the whole run.
        """
        if not self.mixes(step, total_steps):
            return Terms({"own": method.own_loss(batch.views).mean()}, {})
        if self.replaces(method):
            directions = method.directions
            parts = [self._in_place(method, batch, *pair).mean() for pair in directions]
            return Terms({"mix": self.weight * torch.stack(parts).mean()}, {})
        own = method.own_loss(batch.views).mean()  # first: what its passes give is used again
        mix = self._beside(method, batch).mean()
        return Terms({"own": own, "mix": self.weight * mix}, {})

    def mixes(self, step: int, total_steps: int) -> bool:
        """Say whether images are mixed in this step of the run."""
        return self.begin <= share_done(step, total_steps) < self.end

    def mixes_in(self, steps: range, total_steps: int) -> bool:
        """Say whether images are mixed in any of these steps."""
        return any(self.mixes(step, total_steps) for step in steps)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the normalisation of the input images, per channel; not needed here."""

    def replaces(self, method: Method) -> bool:
        """Say whether mixtures take the place of the query views."""
        if self.placement == "auto":
            return not (method.keeps_plain_views or self.learns)
        return self.placement == "replace"

    def crosses(self, method: Method) -> bool:
        """Say whether partners are taken from the other view."""
        if self.pairs == "auto":
            return not self.replaces(method)
        return self.pairs == "cross"

    def _beside(self, method: Method, batch: Batch) -> Tensor:
        plan = self.draw(batch.views[0])
        # Before the mixtures: what these passes give may be the maps that masks are made from.
        targets = self.targets_of_parents(method, batch, method.targets(batch.views[1]))
        mixed = self.mixtures(method, batch, plan, 0, 1)
        query = method.mixed_query(mixed.images.detach())
        lam = self.weights(method, mixed, plan, targets)
        return weighted(parent_losses(method.pair_loss, query, targets, plan.parents), lam)

    @torch.no_grad()
    def weights(
        self, method: Method, mixed: Mixed, plan: MixPlan, targets: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the weight that the loss of each mixture gives the image itself, (K,)."""
        if self.lam == "drawn":
            return mixed.lam
        query = method.frozen_query(mixed.images)
        like = partial(method.likeness, temperature=SEEN_TEMPERATURE)
        seen = parent_losses(like, query, targets, plan.parents).float().softmax(dim=1)[:, 0]
        return (mixed.lam + seen.to(mixed.lam.dtype)) / 2

    def _in_place(self, method: Method, batch: Batch, first: int, second: int) -> Tensor:
        """View ``first`` is the mixture; what is not mixed is a mixture with lam = 1, (B,)."""
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
            method: Embeds.
            batch: Views of B images.
            own: (B, D), targets of the view that the images' pixels are not of.
            first: View that the images' pixels are of.

        Returns:
            Twice (B, D); one and the same tensor if both are of one view.
        """
        image = batch.views[first]
        crossed = self.crosses(method) and any(view is not image for view in batch.views)
        if self.targets == "shared" or not crossed:
            return own, own
        return own, method.targets(image)

    @property
    def networks(self) -> list[nn.Module]:
        """Parts that are worth compiling; none."""
        return []

    def draw(self, images: Tensor) -> MixPlan:
        """Draw who is mixed with whom, and how much."""
        return draw_plan(len(images), self.alpha, images.device, self.fraction)

    def mixtures(
        self, method: Method, batch: Batch, plan: MixPlan, first: int, second: int
    ) -> Mixed:
        """Mix view ``first`` with partners from view ``second``, or from itself."""
        images, partners = self.sources(method, batch, first, second)
        return self.policy(images, partners, plan, self.maps(method, images, partners))

    def sources(
        self, method: Method, batch: Batch, first: int, second: int
    ) -> tuple[Tensor, Tensor]:
        """Return the images and those that their partners are taken from."""
        images = batch.views[first]
        return images, batch.views[second] if self.crosses(method) else images

    def maps(
        self, method: Method, images: Tensor, partners: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return the feature maps of both, if the policy reads them."""
        if self.stage is None or not self.policy.needs_maps:
            return None
        own = method.maps(images, self.stage, self.features)
        if partners is images:
            return own, own
        return own, method.maps(partners, self.stage, self.features)

    def before_step(self) -> None:
        """Do what has to be done between backward pass and optimizer step; nothing here."""

    def error_message(self) -> str | None:
        """Say what went wrong in the steps so far; None if nothing did."""
        return None


def parent_losses(
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    targets: tuple[Tensor, Tensor],
    parents: Tensor,
) -> Tensor:
    """Return the losses of mixtures for both parents, each among the targets of its own view.

    Args:
        criterion: Called with queries, targets (B, D) and parents, gives (K, 2).
        query: (K, D).
        targets: (B, D) for the images and for their partners.
        parents: (K, 2) rows; neither is a negative of its mixture in either column.

    Returns:
        (K, 2).
    """
    of_image, of_partner = targets
    losses = criterion(query, of_image, parents)
    if of_partner is of_image:
        return losses
    return torch.stack([losses[:, 0], criterion(query, of_partner, parents)[:, 1]], dim=1)


def weighted(losses: Tensor, lam: Tensor) -> Tensor:
    """Weight the losses (K, 2) of both parents by lam and 1 - lam, (K,)."""
    return lam * losses[:, 0] + (1 - lam) * losses[:, 1]
