"""The momentum encoder (teacher): an exponential moving average of an encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightly.models.utils import deactivate_requires_grad
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn


class EMATwin(nn.Module):
    """A copy of a module whose weights follow it by exponential moving average.

    The copy starts from the module's own weights, takes no gradient, and keeps its own
    normalisation statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        deactivate_requires_grad(self.module)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embed with the twin, without gradient."""
        return self.module(images)

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float, statistics: bool = False) -> None:
        """Update every weight: ``momentum * own + (1 - momentum) * online``.

        Args:
            online: The module that the twin follows.
            momentum: Weight of the old weights.
            statistics: Also average the normalisation statistics; for a twin that is never run in
                training mode.
        """
        pairs: list[tuple[Tensor, Tensor]] = list(
            zip(self.module.parameters(), online.parameters(), strict=True)
        )
        if statistics:
            pairs += [
                (own, other)
                for own, other in zip(self.module.buffers(), online.buffers(), strict=True)
                if own.is_floating_point()
            ]
        if pairs:
            # One fused call: on a GPU, a launch per weight would take longer than the arithmetic.
            own_tensors, others = (list(tensors) for tensors in zip(*pairs, strict=True))
            torch._foreach_lerp_(own_tensors, others, 1 - momentum)


def momentum_at(step: int, total_steps: int, start: float, end: float) -> float:
    """Return the momentum at a step of a cosine from ``start`` to ``end`` (BYOL, section 3.3)."""
    return cosine_schedule(min(step, total_steps), total_steps, start, end)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in eval mode, and restore the mode of each sub-module afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


def frozen_forward(module: nn.Module, images: Tensor) -> Tensor:
    """Run ``module`` in eval mode with detached weights: gradient reaches the images only.

    Neither the ``requires_grad`` flags nor the normalisation statistics of ``module`` change.
    """
    frozen = {name: tensor.detach() for name, tensor in module.named_parameters()}
    with evaluating(module):
        return torch.func.functional_call(module, frozen, (images,))
