"""Self-supervised representation learning with SAMix as a label-free augmentation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_samix.artifacts.encoder import (
        Encoder,
        TrainedClassifier,
        load_classifier,
        load_encoder,
    )
    from ssl_samix.artifacts.mixer import TrainedMixer, load_mixer
    from ssl_samix.cli.functions import (
        Embedded,
        Measured,
        compare,
        embed,
        export,
        knn,
        linear,
        measures,
        outliers,
        report,
        robustness,
        semi,
    )
    from ssl_samix.errors import UserError
    from ssl_samix.methods.barlow_twins import BarlowTwins
    from ssl_samix.methods.byol import BYOL
    from ssl_samix.methods.dino import DINO
    from ssl_samix.methods.moco import MoCo
    from ssl_samix.methods.mocov3 import MoCoV3
    from ssl_samix.methods.nnclr import NNCLR
    from ssl_samix.methods.simclr import SimCLR
    from ssl_samix.methods.simsiam import SimSiam
    from ssl_samix.methods.swav import SwAV
    from ssl_samix.methods.vicreg import VICReg
    from ssl_samix.mixup.mixer import SAMix
    from ssl_samix.training.logging import Run
    from ssl_samix.training.pretrain import pretrain
    from ssl_samix.training.supervised import train_supervised

__all__ = [
    "BYOL",
    "DINO",
    "NNCLR",
    "BarlowTwins",
    "Embedded",
    "Encoder",
    "Measured",
    "MoCo",
    "MoCoV3",
    "Run",
    "SAMix",
    "SimCLR",
    "SimSiam",
    "SwAV",
    "TrainedClassifier",
    "TrainedMixer",
    "UserError",
    "VICReg",
    "compare",
    "embed",
    "export",
    "knn",
    "linear",
    "load_classifier",
    "load_encoder",
    "load_mixer",
    "measures",
    "outliers",
    "pretrain",
    "report",
    "robustness",
    "semi",
    "train_supervised",
]

# Loaded at first use, so that the command line answers before torch is imported.
_HOMES = {
    "BYOL": "ssl_samix.methods.byol",
    "DINO": "ssl_samix.methods.dino",
    "BarlowTwins": "ssl_samix.methods.barlow_twins",
    "Embedded": "ssl_samix.cli.functions",
    "Encoder": "ssl_samix.artifacts.encoder",
    "Measured": "ssl_samix.cli.functions",
    "MoCo": "ssl_samix.methods.moco",
    "MoCoV3": "ssl_samix.methods.mocov3",
    "NNCLR": "ssl_samix.methods.nnclr",
    "Run": "ssl_samix.training.logging",
    "SAMix": "ssl_samix.mixup.mixer",
    "SimCLR": "ssl_samix.methods.simclr",
    "SimSiam": "ssl_samix.methods.simsiam",
    "SwAV": "ssl_samix.methods.swav",
    "TrainedClassifier": "ssl_samix.artifacts.encoder",
    "TrainedMixer": "ssl_samix.artifacts.mixer",
    "UserError": "ssl_samix.errors",
    "VICReg": "ssl_samix.methods.vicreg",
    "compare": "ssl_samix.cli.functions",
    "embed": "ssl_samix.cli.functions",
    "export": "ssl_samix.cli.functions",
    "knn": "ssl_samix.cli.functions",
    "linear": "ssl_samix.cli.functions",
    "load_classifier": "ssl_samix.artifacts.encoder",
    "load_encoder": "ssl_samix.artifacts.encoder",
    "load_mixer": "ssl_samix.artifacts.mixer",
    "measures": "ssl_samix.cli.functions",
    "outliers": "ssl_samix.cli.functions",
    "pretrain": "ssl_samix.cli.functions",
    "report": "ssl_samix.cli.functions",
    "robustness": "ssl_samix.cli.functions",
    "semi": "ssl_samix.cli.functions",
    "train_supervised": "ssl_samix.training.supervised",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ssl_samix' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
