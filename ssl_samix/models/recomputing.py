"""Activation checkpointing: activations of a block are recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, images: Tensor) -> Tensor:
    """Run a block, store only its input, and run it again in the backward pass.

    The second run uses the train and eval modes of the first, and does not update normalisation
    statistics a second time.
    """
    if not torch.is_grad_enabled():
        return block(images)
    modes = [(module, module.training) for module in block.modules()]
    return checkpoint(
        block, images, use_reentrant=False, context_fn=lambda: (nullcontext(), _restored(modes))
    )


@contextmanager
def _restored(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Restore modules' train and eval modes, and freeze their normalisation statistics."""
    now = [(module, module.training) for module, _ in modes]
    norms = [module for module, training in modes if isinstance(module, _NormBase) and training]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for module, training in modes:
        module.training = training
    for norm, _, counted in before:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if counted is None else counted.clone()
    try:
        yield
    finally:
        for module, training in now:
            module.training = training
        for norm, momentum, counted in before:
            norm.momentum, norm.num_batches_tracked = momentum, counted
