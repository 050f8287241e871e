"""Training on labels: heads on a frozen backbone, or the whole network.

Legend: B images, D feature width, C classes, K heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightly.utils.lars import LARS
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ssl_samix.data.datamodule import LabelledData
from ssl_samix.errors import ConfigError, check_choice, check_range
from ssl_samix.models.backbone import Backbone
from ssl_samix.trainer import build_trainer, memory_format
from ssl_samix.types import Batch

REFERENCE_BATCH = 256  # images; learning rates are stated for it (arXiv 1706.02677, section 2.1)
INIT_STD = 0.01  # of a head's weights, as in MoCo's main_lincls.py; its bias is 0


@dataclass(frozen=True)
class Recipe:
    """How a paper trains on labels.

    Attributes:
        optimizer: ``sgd``, ``nesterov`` or ``lars``, with momentum.
        lr: Learning rates of the heads at a batch of 256, one head each.
        backbone_lr: Of the backbone at a batch of 256; 0 keeps it frozen, statistics too.
        momentum: Of the optimizer.
        weight_decay: Of all weights.
        schedule: ``cosine`` (to 0, per step) or ``step``.
        milestones: Shares of the training after which ``step`` multiplies by ``gamma``.
        gamma: See there.
        epochs: Passes over the labelled images.
        batch_size: Images per step.
        standardize: Give the heads features of mean 0 and variance 1, by a BatchNorm without
            weights, as MAE's linear probe has it (arXiv 2111.06377, appendix A.1).

    Raises:
        ConfigError: If a value is out of its range.
    """

    optimizer: str
    lr: tuple[float, ...]
    schedule: str
    epochs: int
    batch_size: int
    backbone_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    standardize: bool = False

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, ("sgd", "nesterov", "lars"))
        check_choice("schedule", self.schedule, ("cosine", "step"))
        check_range("epochs", self.epochs, 1)
        check_range("batch_size", self.batch_size, 2)
        check_range("backbone_lr", self.backbone_lr, 0)
        check_range("momentum", self.momentum, 0, 1)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("gamma", self.gamma, 0, 1)
        if not self.lr:
            raise ConfigError("lr needs at least one learning rate")
        for value in self.lr:
            check_range("lr", value, 1e-12)
        for share in self.milestones:
            check_range("milestones", share, 0, 1)

    def factor(self, progress: float) -> float:
        """Return what is left of the learning rate after a share of the training."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        # A hair early, so that 60 of 100 epochs is not missed by a rounding error.
        return self.gamma ** sum(progress >= share - 1e-9 for share in self.milestones)


class Classifier(pl.LightningModule):
    """A backbone with K linear heads, each trained by its own learning rate.

    Args:
        backbone: Trained further, unless the recipe keeps it frozen.
        classes: C.
        recipe: How it is trained.
        seed: Of the heads' weights.
    """

    def __init__(self, backbone: Backbone, classes: int, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.backbone, self.recipe = backbone, recipe
        heads = [nn.Linear(backbone.feature_dim, classes) for _ in recipe.lr]
        generator = torch.Generator().manual_seed(seed)
        for head in heads:
            nn.init.normal_(head.weight, std=INIT_STD, generator=generator)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)
        width = backbone.feature_dim
        self.scaling = nn.BatchNorm1d(width, affine=False) if recipe.standardize else nn.Identity()
        self.frozen = recipe.backbone_lr == 0
        self.backbone.requires_grad_(not self.frozen)
        self.train()  # whatever mode the backbone came in

    def train(self, mode: bool = True) -> Classifier:
        """Keep the statistics of a frozen backbone where they are."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def logits(self, features: Tensor) -> Tensor:
        """Map features (B, D) to the answers of all heads (K, B, C)."""
        scaled = self.scaling(features)
        return torch.stack([head(scaled) for head in self.heads])

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the sum of the heads' cross-entropies: no head feels another."""
        with torch.set_grad_enabled(not self.frozen):
            features = self.backbone(batch.views[0])
        losses = torch.stack([F.cross_entropy(x, batch.label) for x in self.logits(features)])
        self.log("loss", losses.detach().mean(), on_step=False, on_epoch=True)
        return losses.sum()

    def configure_optimizers(self) -> Any:
        """Build the recipe's optimizer: a group per head, and one for the backbone."""
        recipe, trainer = self.recipe, self.trainer
        batch = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        scale = batch / REFERENCE_BATCH
        groups: list[dict[str, Any]] = [
            {"params": list(head.parameters()), "lr": lr * scale}
            for head, lr in zip(self.heads, recipe.lr, strict=True)
        ]
        if not self.frozen:
            weights = list(self.backbone.parameters())
            groups.append({"params": weights, "lr": recipe.backbone_lr * scale})
        shared: dict[str, Any] = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "lars":
            optimizer = LARS(groups, lr=scale, **shared)
        else:
            nesterov = recipe.optimizer == "nesterov"
            optimizer = torch.optim.SGD(groups, lr=scale, nesterov=nesterov, **shared)
        steps = max(1, int(trainer.estimated_stepping_batches))
        epoch = max(1, steps // recipe.epochs)
        # "step" falls between epochs, the cosine at every step.
        unit = epoch if recipe.schedule == "step" else 1
        schedule = LambdaLR(optimizer, lambda step: recipe.factor(step // unit * unit / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    backbone: Backbone,
    classes: int,
    recipe: Recipe,
    data: LabelledData,
    *,
    seed: int,
    device: torch.device,
    callbacks: Sequence[pl.Callback] = (),
) -> Classifier:
    """Train a copy of the backbone, or heads on it, as a recipe says.

    Args:
        backbone: Left as it is.
        classes: C.
        recipe: How.
        data: The labelled images.
        seed: Of the heads' weights.
        device: Where.
        callbacks: Lightning's, such as a progress bar.

    Returns:
        The classifier, in eval mode, on ``device``.
    """
    module = Classifier(copy.deepcopy(backbone), classes, recipe, seed)
    module.to(memory_format=memory_format(module))
    kinds = {"cuda": "gpu", "cpu": "cpu", "mps": "mps"}
    trainer = build_trainer(
        precision="auto",
        accelerator=kinds[device.type],
        devices=1,
        sync_batchnorm=False,
        wants_sync_batchnorm=False,
        max_epochs=recipe.epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    return module.to(device).eval()
