"""Training on labels as in the papers: heads on a frozen backbone, or the whole network.

Legend: B images, D feature width, C classes, K heads.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightly.utils.lars import LARS
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ssl_samix.data.datamodule import CROP_AND_FLIP, LabelledData
from ssl_samix.data.images import ImageSet
from ssl_samix.data.view_spec import scaled
from ssl_samix.errors import ConfigError, check_choice, check_range
from ssl_samix.evaluation.features import extract
from ssl_samix.evaluation.linear import split
from ssl_samix.evaluation.measures import top1_top5
from ssl_samix.evaluation.task import Task
from ssl_samix.models.backbone import Backbone
from ssl_samix.trainer import build_trainer, memory_format
from ssl_samix.types import Batch

_log = logging.getLogger(__name__)
REFERENCE_BATCH = 256  # images; learning rates refer to it (arXiv 1706.02677, section 2.1)
INIT_STD = 0.01  # of a head's weights, as in MoCo's main_lincls.py; biases start at 0


@dataclass(frozen=True)
class Recipe:
    """The recipe of a paper for training on labels.

    Attributes:
        optimizer: ``sgd``, ``nesterov`` or ``lars``, with momentum.
        lr: Learning rates at batch size 256, one per head.
        backbone_lr: That of the backbone at batch size 256; 0 freezes it, with its statistics.
        momentum: Momentum of the optimizer.
        weight_decay: Weight decay of all weights.
        schedule: ``cosine`` (to 0, per step) or ``step``.
        milestones: Fractions of the training after which ``step`` multiplies by ``gamma``.
        gamma: Factor of the learning rate at each milestone.
        epochs: Passes over the labelled images.
        batch_size: Images per step.
        standardize: Scale the features to mean 0 and variance 1 by a BatchNorm without affine
            parameters, as in MAE's linear probe (arXiv 2111.06377, appendix A.1).

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
        """Return the factor of the learning rate after a fraction of the training."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        # With a small tolerance, so that rounding does not miss 60 of 100 epochs.
        return self.gamma ** sum(progress >= share - 1e-9 for share in self.milestones)


class Classifier(pl.LightningModule):
    """A backbone with K linear heads, each with its own learning rate.

    Args:
        backbone: Trained too, unless the recipe freezes it.
        classes: C.
        recipe: Training recipe.
        seed: Seed of the heads' initial weights.
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
        self.train()  # the backbone may be in eval mode

    def train(self, mode: bool = True) -> Classifier:
        """Set the training mode, but keep a frozen backbone in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def logits(self, features: Tensor) -> Tensor:
        """Map features (B, D) to the logits of all heads (K, B, C)."""
        scaled = self.scaling(features)
        return torch.stack([head(scaled) for head in self.heads])

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the sum of the heads' cross-entropies, so that heads are trained independently."""
        with torch.set_grad_enabled(not self.frozen):
            features = self.backbone(batch.views[0])
        losses = torch.stack([F.cross_entropy(x, batch.label) for x in self.logits(features)])
        self.log("loss", losses.detach().mean(), on_step=False, on_epoch=True)
        return losses.sum()

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with a parameter group per head and one for the backbone."""
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
        # "step" changes the rate between epochs, "cosine" at every step.
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
    """Train a copy of the backbone, or heads on it, by a recipe.

    Args:
        backbone: The backbone; not modified.
        classes: C.
        recipe: Training recipe.
        data: The labelled images.
        seed: Seed of the heads' initial weights.
        device: Device to train on.
        callbacks: Lightning callbacks, such as a progress bar.

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


@torch.no_grad()
def head_logits(module: Classifier, features: Tensor, chunk: int = 8192) -> Tensor:
    """Map features (N, D) to the logits of all heads, (K, N, C) on the CPU."""
    device = next(module.heads.parameters()).device
    parts = [module.logits(part.to(device)).cpu() for part in features.split(chunk)]
    return torch.cat(parts, dim=1)


FEW_HELD_OUT = 100  # images; with fewer, choosing a learning rate is little better than a guess


@dataclass(frozen=True)
class FewLabels:
    """The training images that keep their labels, and training on them.

    Attributes:
        task: Encoder and images.
        picks: (n,) positions of the training images that keep their labels.
        views: Settings ``flip`` and ``crop_min`` of the random flips and crops.
        held_out: Fraction of the labels that is held out to choose learning rates.
        seed: Seed of the held-out split, heads, order and views.
        callbacks: Lightning callbacks.
    """

    task: Task
    picks: Tensor
    views: Any
    held_out: float
    seed: int
    callbacks: Sequence[pl.Callback] = ()

    def split(self) -> tuple[Tensor, Tensor]:
        """Return the positions of the training part and the held-out part, which may be empty."""
        labels = self.task.labelled[0].labels[self.picks]
        kept, held = split(labels, len(self.task.splits.classes), self.held_out, self.seed)
        if 0 < len(held) < FEW_HELD_OUT:
            _log.warning(
                "%d labelled images choose the learning rate: one right or wrong is %.1f points",
                *(len(held), 100 / len(held)),
            )
        return self.picks[kept], self.picks[held]

    def fit(self, backbone: Backbone, recipe: Recipe, picks: Tensor) -> Classifier:
        """Train a copy of a backbone, or heads on it, on the training images at these positions."""
        task, encoder = self.task, self.task.encoder
        data = LabelledData(
            task.labelled[0],
            picks.tolist(),
            scaled(CROP_AND_FLIP, encoder.image_size, self.views.flip, self.views.crop_min),
            encoder.mean,
            encoder.std,
            batch_size=recipe.batch_size,
            seed=self.seed,
            workers=task.workers,
        )
        options: dict[str, Any] = {"device": task.device, "callbacks": self.callbacks}
        return fit(backbone, len(task.splits.classes), recipe, data, seed=self.seed, **options)

    def logits(self, module: Classifier, images: ImageSet, picks: Sequence[int]) -> Tensor:
        """Return a fine-tuned network's logits, (len(picks), C); not finite if it diverged."""
        task, encoder = self.task, self.task.encoder
        options: dict[str, Any] = {"workers": task.workers, "chunk": task.chunk}
        features = extract(
            module.backbone, images, picks, encoder.mean, encoder.std, device=task.device, **options
        )
        return head_logits(module, features)[0]


def augmented_probe(few: FewLabels, recipe: Recipe) -> tuple[float, float, dict[str, Any]]:
    """Train heads on the frozen backbone and test the one with the chosen learning rate.

    With several learning rates, all heads are first trained at once to choose one on held-out
    labels; the chosen one is then trained on all labels.

    Returns:
        Top-1 and top-5 of the last epoch, in percent, and the settings.
    """
    task, backbone = few.task, few.task.encoder.backbone
    train, test = task.labelled
    settings: dict[str, Any] = {}
    if len(recipe.lr) > 1:
        kept, held = few.split()
        best = (len(recipe.lr) - 1) // 2
        if len(held):
            module = few.fit(backbone, recipe, kept)
            logits = head_logits(module, task.embed(train, "held-out", held.tolist()))
            top1s = [top1_top5(head, train.labels[held])[0] for head in logits]
            settings["held_out"] = dict(zip(map(str, recipe.lr), top1s, strict=True))
            best = max(range(len(top1s)), key=top1s.__getitem__)
            lr, low, high = recipe.lr[best], min(recipe.lr), max(recipe.lr)
            if lr in (low, high):
                edge = "lowest" if lr == low else "highest"
                _log.warning("lr=%g won and is the %s tried: widen preset.lr", lr, edge)
        recipe = replace(recipe, lr=(recipe.lr[best],))
    module = few.fit(backbone, recipe, few.picks)
    top1, top5 = top1_top5(head_logits(module, task.embed(test, "test"))[0], test.labels)
    return top1, top5, {"lr": recipe.lr[0], "epochs": recipe.epochs, **settings}


def finetuned(
    few: FewLabels, backbone: Backbone, recipes: Sequence[Recipe], say: Callable[[str], object]
) -> tuple[float, float, dict[str, Any]]:
    """Fine-tune a copy of a network and test it.

    Args:
        few: The labelled images.
        backbone: The network to start from.
        recipes: Recipes to choose from; they differ in their learning rates only.
        say: Called with progress messages.

    Returns:
        Top-1 and top-5 on the test images after the last epoch, in percent, and the settings.
    """
    test = few.task.labelled[1]
    recipe, tried = _chosen(few, backbone, recipes, say)
    module = few.fit(backbone, recipe, few.picks)
    top1, top5 = top1_top5(few.logits(module, test, range(len(test))), test.labels)
    settings = {"backbone_lr": recipe.backbone_lr, "head_lr": recipe.lr[0]}
    return top1, top5, settings | ({"held_out": tried} if tried else {})


def _chosen(
    few: FewLabels, backbone: Backbone, recipes: Sequence[Recipe], say: Callable[[str], object]
) -> tuple[Recipe, dict[str, float]]:
    """Return the recipe that is best on held-out labels, and each recipe's accuracy there."""
    if len(recipes) == 1:
        return recipes[0], {}
    images = few.task.labelled[0]
    kept, held = few.split()
    if len(held) == 0:
        return recipes[(len(recipes) - 1) // 2], {}
    tried: dict[str, float] = {}
    for recipe in recipes:
        logits = few.logits(few.fit(backbone, recipe, kept), images, held.tolist())
        name = f"{recipe.backbone_lr:g} / {recipe.lr[0]:g}"
        # A learning rate that diverges has no accuracy and is excluded.
        finite = logits.isfinite().all()
        tried[name] = top1_top5(logits, images.labels[held])[0] if finite else -1.0
        say(f"  lr {name} (backbone / head): {tried[name]:.1f}% of {len(held)} held-out images")
    best = max(range(len(recipes)), key=[*tried.values()].__getitem__)
    return recipes[best], tried
