"""Joins a mixing policy to a method; neither knows the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_samix.mixup.plan import draw_plan
from ssl_samix.types import Method, Mixed, Mixer, MixPlan


class MixObjective(nn.Module):
    """The mixed loss of the encoder, on top of the method's own loss.

    Args:
        mixer: The policy that makes the mixed images.
        alpha: Ratios are drawn from Beta(alpha, alpha), one per sample.
        weight: Factor of the mixed loss in the sum.
    """

    def __init__(self, mixer: Mixer, alpha: float = 2.0, weight: float = 1.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.alpha = alpha
        self.weight = weight

    def forward(self, method: Method, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Mix view a with partners from view b and return the named loss terms, each a scalar."""
        plan = draw_plan(len(views[0]), self.alpha, views[0].device)
        mixed = self.mixer(views[0], views[1], plan, None)
        targets = method.targets(views[1])
        return {"mix": self.weight * encoder_loss(method, mixed, plan, targets).mean()}


def encoder_loss(method: Method, mixed: Mixed, plan: MixPlan, targets: Tensor) -> Tensor:
    """The method's loss of mixed images against both parents, weighted by lam.

    Args:
        method: Embeds and compares.
        mixed: The mixtures; only pixels reach the encoder, the mask is detached.
        plan: Who was mixed with whom.
        targets: (B, D) embeddings of the un-mixed images, in the batch's order.

    Returns:
        (B,) losses.
    """
    own = torch.arange(len(plan.partner), device=plan.partner.device)
    parents = torch.stack([own, plan.partner], dim=1)  # (B, 2)
    losses = method.pair_loss(method.query(mixed.images.detach()), targets, parents)
    return mixed.lam * losses[:, 0] + (1 - mixed.lam) * losses[:, 1]
