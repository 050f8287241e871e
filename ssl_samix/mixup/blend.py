"""From a mask to mixed images: the one place where pixels are mixed."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_samix.types import Mixed, MixPlan


def blend(images: Tensor, partners: Tensor, plan: MixPlan, mask: Tensor, lam: Tensor) -> Mixed:
    """Mix ``(1 - mask) * image + mask * partner``; a mask of 0 or 1 gives a parent exactly.

    Args:
        images: (B, 3, S, S).
        partners: (B, 3, S, S), indexed by ``plan.partner``.
        plan: Who is mixed with whom.
        mask: (K, 1, S, S) in [0, 1], the share of the partner.
        lam: (K,) the ratio that the loss uses.
    """
    own, other = images[plan.rows], partners[plan.partner]
    kind = torch.promote_types(own.dtype, mask.dtype)  # a ratio in bfloat16 has 3 digits
    mixed = torch.lerp(own.to(kind), other.to(kind), mask.to(kind).expand_as(own))
    return Mixed(images=mixed.to(own.dtype), partner=plan.partner, lam=lam, mask=mask)


def share(mask: Tensor) -> Tensor:
    """Return the share of the image itself in each mixture, mean(1 - mask), (K,)."""
    return 1 - mask.flatten(1).mean(dim=1)


def flat(lam: Tensor, size: int) -> Tensor:
    """Return the mask of plain mixup, 1 - lam everywhere, (K, 1, S, S)."""
    return (1 - lam)[:, None, None, None].expand(-1, 1, size, size)
