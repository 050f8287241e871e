"""Activation checkpointing: what a block kept for the backward pass is computed again there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, images: Tensor) -> Tensor:
    """Run a block, keep its input alone, and run it again in the backward pass.

    The second run leaves normalisation statistics where they are: they would move twice.
    """
    if not torch.is_grad_enabled():
        return block(images)
    return checkpoint(
        block, images, use_reentrant=False, context_fn=lambda: (nullcontext(), _held(block))
    )


@contextmanager
def _held(block: nn.Module) -> Iterator[None]:
    """Normalise by the batch, as in training, without counting the batch once more."""
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.training]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, counted in before:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if counted is None else counted.clone()
    try:
        yield
    finally:
        for norm, momentum, counted in before:
            norm.momentum, norm.num_batches_tracked = momentum, counted
