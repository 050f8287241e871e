"""Self-supervised representation learning with SAMix as a label-free augmentation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_samix.errors import UserError
    from ssl_samix.evaluation.checkpoint import Encoder, load_encoder
    from ssl_samix.methods.byol import BYOL
    from ssl_samix.methods.moco import MoCo
    from ssl_samix.methods.simclr import SimCLR
    from ssl_samix.pretraining import Run, pretrain

__all__ = [
    "BYOL",
    "Encoder",
    "MoCo",
    "Run",
    "SimCLR",
    "UserError",
    "load_encoder",
    "pretrain",
]

# Loaded at first use, so that the command line answers before torch is imported.
_HOMES = {
    "BYOL": "ssl_samix.methods.byol",
    "Encoder": "ssl_samix.evaluation.checkpoint",
    "MoCo": "ssl_samix.methods.moco",
    "Run": "ssl_samix.pretraining",
    "SimCLR": "ssl_samix.methods.simclr",
    "UserError": "ssl_samix.errors",
    "load_encoder": "ssl_samix.evaluation.checkpoint",
    "pretrain": "ssl_samix.pretraining",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ssl_samix' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
