"""Draws of partners and ratios, and the blending of pixels by a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_samix.errors import ConfigError, check_range
from ssl_samix.types import Mixed, MixPlan

SMALLEST = 1e-3  # alpha; below it, every draw is rounded to 0 or 1


def derangement(size: int, device: torch.device) -> Tensor:
    """Return a random permutation (size,) without fixed points: one cycle through all rows.

    Raises:
        ConfigError: If ``size`` is below 2: a single image has no partner.
    """
    if size < 2:
        raise ConfigError("mixing needs at least 2 images per device: raise data.batch_size")
    order = torch.randperm(size, device=device)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def draw_plan(size: int, alpha: float, device: torch.device, fraction: float = 1.0) -> MixPlan:
    """Return a plan: ratios from Beta(alpha, alpha), one per mixture, partners by a derangement.

    Args:
        size: B, images of the batch.
        alpha: Parameter of the Beta distribution.
        device: Device of the plan's tensors.
        fraction: Share of the images that are mixed, at least one; evenly over the batch, which is
            in random order. Any image may be a partner.

    Raises:
        ConfigError: If ``alpha`` is not positive or ``size`` is below 2.
    """
    check_range("mixup.alpha", alpha, SMALLEST)
    partner = derangement(size, device)
    count = max(1, round(fraction * size))
    rows = torch.arange(count, device=device) * size // count
    # Apple's GPUs cannot draw from a Beta distribution.
    place = torch.device("cpu") if device.type == "mps" else device
    concentration = torch.full((), float(alpha), device=place)
    # Checked above: the distribution's own check would synchronise host and device.
    beta = torch.distributions.Beta(concentration, concentration, validate_args=False)
    lam = beta.sample((count,))
    return MixPlan(lam=lam.to(device), partner=partner[rows], rows=rows)


def window(during: object) -> tuple[float, float]:
    """Return ``mixup.during`` as two numbers, the shares of a run between which images are mixed.

    Args:
        during: The value given.

    Raises:
        ConfigError: If it is not two numbers, 0 <= from < to <= 1.
    """
    shares = during if isinstance(during, (list, tuple)) else ()
    numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in shares)
    if not numbers or len(shares) != 2 or not 0 <= shares[0] < shares[1] <= 1:
        allowed = "[from, to], two numbers with 0 <= from < to <= 1"
        raise ConfigError(f"mixup.during must be {allowed}, got {during!r}")
    return shares[0], shares[1]


def share_done(step: int, total_steps: int) -> float:
    """Return the share of the run before a step, in [0, 1)."""
    last = max(1, total_steps)
    return min(step, last - 1) / last


def blend(images: Tensor, partners: Tensor, plan: MixPlan, mask: Tensor, lam: Tensor) -> Mixed:
    """Return ``(1 - mask) * image + mask * partner``; a mask of 0 or 1 gives a parent exactly.

    Args:
        images: (B, 3, S, S).
        partners: (B, 3, S, S), indexed by ``plan.partner``.
        plan: The partners.
        mask: (K, 1, S, S) in [0, 1], the share of the partner.
        lam: (K,) weight of the image in the loss.
    """
    own, other = images[plan.rows], partners[plan.partner]
    kind = torch.promote_types(own.dtype, mask.dtype)  # bfloat16 would leave a ratio 3 digits
    mixed = torch.lerp(own.to(kind), other.to(kind), mask.to(kind).expand_as(own))
    return Mixed(images=mixed.to(own.dtype), partner=plan.partner, lam=lam, mask=mask)


def share(mask: Tensor) -> Tensor:
    """Return the share of the image itself in each mixture, mean(1 - mask), (K,)."""
    return 1 - mask.flatten(1).mean(dim=1)


def flat(lam: Tensor, size: int) -> Tensor:
    """Return the mask of plain mixup, 1 - lam everywhere, (K, 1, S, S)."""
    return (1 - lam)[:, None, None, None].expand(-1, 1, size, size)
