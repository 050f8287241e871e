"""Whether what was exported is still the same encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssl_samix.errors import CheckpointError, UserError
from ssl_samix.evaluation.checkpoint import Encoder

TOLERANCE = 1e-5  # of the largest feature, or of 1 if that is larger


@torch.no_grad()
def check_same(encoder: Encoder, exported: Callable[[Tensor], Tensor], kind: str) -> None:
    """Compare features of random images, for a batch of one and of three.

    Args:
        encoder: Where the features come from.
        exported: Maps images (B, 3, S, S) to features (B, feature_dim), read back from the bytes
            that are about to be written.
        kind: The format, as its user writes it.

    Raises:
        CheckpointError: If the encoder's own features are not finite.
        UserError: If the features differ by more than ``TOLERANCE``.
    """
    size = encoder.image_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    for batch in (images[:1], images):
        wanted, given = encoder(batch), exported(batch)
        if not wanted.isfinite().all():
            raise CheckpointError("the encoder's features are not finite: its training diverged")
        if given.shape != wanted.shape:
            raise _differs(kind, f"of shape {tuple(given.shape)}, not {tuple(wanted.shape)}")
        apart, largest = (given - wanted).abs().max().item(), wanted.abs().max().item()
        if not apart <= TOLERANCE * max(1.0, largest):  # true of NaN, too
            raise _differs(kind, f"{apart:.1e} away, the largest being {largest:.1e}")


def _differs(kind: str, how: str) -> UserError:
    return UserError(
        f"format={kind} would not give this encoder's features (they are {how}): "
        "nothing was written, choose another format"
    )


def description(encoder: Encoder) -> dict[str, Any]:
    """Describe the encoder and its images in plain values, for formats that have a place for it."""
    return {
        **encoder.meta,
        "image_size": encoder.image_size,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "feature_dim": encoder.feature_dim,
    }
