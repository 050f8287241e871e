"""Fine-tuning a whole network on few labels, the learning rates chosen within them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssl_samix.evaluation.accuracy import top1_top5
from ssl_samix.evaluation.augmented import head_logits, labelled_data
from ssl_samix.evaluation.features import extract
from ssl_samix.evaluation.linear import split
from ssl_samix.evaluation.task import Task
from ssl_samix.evaluation.training import Classifier, Recipe, fit
from ssl_samix.models.backbone import Backbone


@dataclass(frozen=True)
class FewLabels:
    """Some labelled training images, and how a network is trained on them.

    Attributes:
        task: Encoder and images.
        picks: (n,) positions of the training images that keep their labels.
        recipes: The learning rates to choose from; all else is the same.
        views: Has ``flip`` and ``crop_min``.
        held_out: Share of the labels that chooses.
        seed: Of held-out images, heads and order.
    """

    task: Task
    picks: Tensor
    recipes: tuple[Recipe, ...]
    views: Any
    held_out: float
    seed: int


def finetuned(
    few: FewLabels,
    backbone: Backbone,
    say: Callable[[str], object],
    callbacks: Sequence[Any] = (),
) -> tuple[float, float, dict[str, Any]]:
    """Fine-tune a copy of a network, and test it.

    Args:
        few: Labels and recipes.
        backbone: Where it starts from.
        say: Told what is going on.
        callbacks: Lightning's.

    Returns:
        Top-1 and top-5 on the test images after the last epoch, in percent, and the settings.
    """
    test = few.task.labelled[1]
    recipe, tried = _chosen(few, backbone, say, callbacks)
    module = _trained(few, backbone, recipe, few.picks, callbacks)
    top1, top5 = top1_top5(_answers(few.task, module, test, range(len(test))), test.labels)
    settings = {"backbone_lr": recipe.backbone_lr, "head_lr": recipe.lr[0]}
    return top1, top5, settings | ({"held_out": tried} if tried else {})


def _chosen(
    few: FewLabels, backbone: Backbone, say: Callable[[str], object], callbacks: Sequence[Any]
) -> tuple[Recipe, dict[str, float]]:
    """Return the recipe that is best on held-out labels, and what each gave there."""
    if len(few.recipes) == 1:
        return few.recipes[0], {}
    images = few.task.labelled[0]
    labels = images.labels[few.picks]
    kept, held = split(labels, len(few.task.splits.classes), few.held_out, few.seed)
    if len(held) == 0:
        return few.recipes[(len(few.recipes) - 1) // 2], {}
    tried: dict[str, float] = {}
    for recipe in few.recipes:
        module = _trained(few, backbone, recipe, few.picks[kept], callbacks)
        logits = _answers(few.task, module, images, few.picks[held].tolist())
        name = f"{recipe.backbone_lr:g} / {recipe.lr[0]:g}"
        # A learning rate that diverges has no accuracy: it is no candidate.
        tried[name] = top1_top5(logits, labels[held])[0] if logits.isfinite().all() else -1.0
        say(f"  lr {name} (backbone / head): {tried[name]:.1f}% of {len(held)} held-out images")
    best = max(range(len(few.recipes)), key=lambda i: list(tried.values())[i])
    return few.recipes[best], tried


def _trained(
    few: FewLabels, backbone: Backbone, recipe: Recipe, picks: Tensor, callbacks: Sequence[Any]
) -> Classifier:
    task = few.task
    data = labelled_data(
        task, task.labelled[0], picks.tolist(), recipe, views=few.views, seed=few.seed
    )
    classes = len(task.splits.classes)
    return fit(
        backbone, classes, recipe, data, seed=few.seed, device=task.device, callbacks=callbacks
    )


@torch.no_grad()
def _answers(task: Task, module: Classifier, images: Any, picks: Sequence[int]) -> Tensor:
    encoder: nn.Module = module.backbone
    features = extract(
        encoder,
        images,
        picks,
        task.encoder.mean,
        task.encoder.std,
        device=task.device,
        workers=task.workers,
        chunk=task.chunk,
    )
    return head_logits(module, features)[0]
