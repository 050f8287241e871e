"""Linear heads on a frozen backbone, trained on augmented images, as the papers do it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssl_samix.data.datamodule import CROP_AND_FLIP, LabelledData
from ssl_samix.data.images import ImageSet
from ssl_samix.data.view_spec import scaled
from ssl_samix.evaluation.accuracy import top1_top5
from ssl_samix.evaluation.linear import split
from ssl_samix.evaluation.task import Task
from ssl_samix.evaluation.training import Classifier, Recipe, fit

_log = logging.getLogger(__name__)


def labelled_data(
    task: Task, images: ImageSet, picks: Sequence[int], recipe: Recipe, views: Any, seed: int
) -> LabelledData:
    """Give some labelled images to a classifier, in random crops and flips.

    Args:
        task: Whose encoder reads them.
        images: The data set.
        picks: Which of its images.
        recipe: Says the batch.
        views: Has ``flip`` and ``crop_min``: what the data bear.
        seed: Of order and views.
    """
    encoder = task.encoder
    spec = scaled(CROP_AND_FLIP, encoder.image_size, views.flip, views.crop_min)
    return LabelledData(
        images,
        picks,
        spec,
        encoder.mean,
        encoder.std,
        batch_size=recipe.batch_size,
        seed=seed,
        workers=task.workers,
    )


@torch.no_grad()
def head_logits(module: Classifier, features: Tensor, chunk: int = 8192) -> Tensor:
    """Map features (N, D) to the answers of all heads, (K, N, C) on the CPU."""
    device = next(module.heads.parameters()).device
    parts = [module.logits(part.to(device)).cpu() for part in features.split(chunk)]
    return torch.cat(parts, dim=1)


def choose_head(module: Classifier, features: Tensor, labels: Tensor) -> tuple[int, list[float]]:
    """Return the best head on held-out images, and the top-1 of each."""
    top1 = [top1_top5(x, labels)[0] for x in head_logits(module, features)]
    return max(range(len(top1)), key=lambda i: top1[i]), top1


def augmented_probe(
    task: Task, recipe: Recipe, views: Any, seed: int, callbacks: Sequence[Any] = ()
) -> tuple[float, float, dict[str, Any]]:
    """Train heads on all labelled training images and test the one of the chosen learning rate.

    With several learning rates, a tenth of the training labels is held out of a first training,
    which trains all heads at once, and chooses; the chosen one is then trained on all labels.

    Returns:
        Top-1 and top-5 of the last epoch, in percent, and the settings.
    """
    train, test = task.labelled
    backbone, classes = task.encoder.backbone, len(task.splits.classes)
    settings: dict[str, Any] = {}
    every = torch.arange(len(train))
    options: dict[str, Any] = {"seed": seed, "device": task.device, "callbacks": callbacks}
    if len(recipe.lr) > 1:
        kept, held = split(train.labels, classes, 0.1, seed)
        if len(held):
            data = labelled_data(task, train, kept.tolist(), recipe, views, seed)
            module = fit(backbone, classes, recipe, data, **options)
            features = task.embed(train, "held-out", held.tolist())
            best, top1 = choose_head(module, features, train.labels[held])
            settings["held_out"] = dict(zip(map(str, recipe.lr), top1, strict=True))
            if recipe.lr[best] in (min(recipe.lr), max(recipe.lr)):
                edge = "lowest" if recipe.lr[best] == min(recipe.lr) else "highest"
                _log.warning(
                    "lr=%g won and is the %s tried: widen preset.lr", recipe.lr[best], edge
                )
        else:
            best = (len(recipe.lr) - 1) // 2
        recipe = replace(recipe, lr=(recipe.lr[best],))
    data = labelled_data(task, train, every.tolist(), recipe, views, seed)
    module = fit(backbone, classes, recipe, data, **options)
    top1_, top5 = top1_top5(head_logits(module, task.embed(test, "test"))[0], test.labels)
    return top1_, top5, {"lr": recipe.lr[0], "epochs": recipe.epochs, **settings}
