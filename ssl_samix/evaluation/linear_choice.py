"""The settings of a linear probe, what may be asked of it, and the choice on held-out images."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_samix.data.subsets import hold_out
from ssl_samix.errors import ConfigError, DataError, check_choice, check_range
from ssl_samix.evaluation.knn import check_finite
from ssl_samix.evaluation.linear_heads import MOMENTUM, NORMALIZATIONS, REFERENCE_BATCH

STEPS, EPOCHS = 2000, 10  # at least so many of both, unless a grid says its epochs
Setting = dict[str, Any]
Progress = Callable[[int, int], object]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """Settings of the heads that are trained side by side.

    Attributes:
        learning_rates: At batch 256, scaled linearly with the batch.
        weight_decays: Of the weights, not of the bias.
        normalizations: Of the features, see ``Scaling``; each is trained apart.
        epochs: None takes as many as 2,000 steps need, and at least 10.
        batch_size: Images per step; all of them if they are fewer.

    Raises:
        ConfigError: For a value that is out of range, or a pair that would diverge.
    """

    learning_rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    weight_decays: tuple[float, ...] = (0.0, 1e-6, 1e-5, 1e-4)
    normalizations: tuple[str, ...] = ("standardize",)
    epochs: int | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_values("learning_rates", self.learning_rates, 1e-12)
        check_values("weight_decays", self.weight_decays, 0)
        if not self.normalizations:
            raise ConfigError("normalizations needs at least one value")
        for kind in self.normalizations:
            check_choice("normalizations", kind, NORMALIZATIONS)
        check_range("batch_size", self.batch_size, 1)
        check_range("epochs", 1 if self.epochs is None else self.epochs, 1)
        rate, decay = max(self.learning_rates), max(self.weight_decays)
        # where SGD with momentum stops being stable
        if rate * decay * self.batch_size / REFERENCE_BATCH >= 2 * (1 + MOMENTUM):
            raise ConfigError(
                f"learning_rates up to {rate:g} diverge with weight_decays up to {decay:g} at "
                f"batch_size={self.batch_size}: lower one of them"
            )

    def epochs_for(self, n: int) -> int:
        """Return the epochs that ``n`` images are trained for."""
        steps = n // min(self.batch_size, n)
        return self.epochs or max(EPOCHS, math.ceil(STEPS / steps))

    def settings(self, normalization: str) -> list[Setting]:
        """Return the settings of all heads of one normalisation, as tables name them."""
        return [
            {"learning_rate": rate, "weight_decay": decay, "normalization": normalization}
            for rate in self.learning_rates
            for decay in self.weight_decays
        ]


def check_values(key: str, values: Sequence[float], low: float) -> None:
    """Refuse a list that is empty or holds a value below ``low``.

    Raises:
        ConfigError: With the key.
    """
    if not values:
        raise ConfigError(f"{key} needs at least one value")
    for value in values:
        check_range(key, value, low)


def check_labelled(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> None:
    """Refuse what no classifier can be trained or tested on.

    Raises:
        DataError: If there are fewer than 2 classes, a feature is not finite, a label is none of
            the classes, or a class has no training image.
    """
    if classes < 2:
        raise DataError(f"a linear probe needs at least 2 classes, got {classes}")
    parts = {"training": (train, train_labels), "test": (test, test_labels)}
    for name, (features, labels) in parts.items():
        if not len(features) == len(labels) > 0:
            raise DataError(f"{len(features)} {name} features cannot have {len(labels)} labels")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise DataError(
                f"the {name} labels must be 0 to {classes - 1}, got {low if low < 0 else high}"
            )
        check_finite(name, features)
    counts = torch.bincount(train_labels, minlength=classes)
    empty = torch.nonzero(counts == 0).flatten().tolist()
    if empty:
        raise DataError(
            f"{len(empty)} of {classes} classes have no training image, the first is class "
            f"{empty[0]}: give every class an image, or leave the class out"
        )


def split(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split training images into those that are learned and those that the setting is chosen on.

    Args:
        labels: (N,) int64, each class at least once.
        classes: How many there are.
        share: Part of N to hold out.
        seed: Fixes the choice.

    Returns:
        int64 positions of both, on the labels' device. Nothing is held out, with a warning, if a
        class would be left without an image.

    Raises:
        ConfigError: If the share is not in (0, 0.5].
    """
    check_range("held_out_share", share, 1e-12, 0.5)
    kept, held = (part.to(labels.device) for part in hold_out(labels.cpu(), share, seed))
    if len(held) and len(torch.unique(labels[kept])) == classes:
        return kept, held
    _log.warning("too few images per class to hold some out: the middle of the grid is taken")
    return torch.arange(len(labels), device=labels.device), held[:0]


def scored(settings: Sequence[Setting], found: tuple[Tensor, Tensor, Tensor]) -> list[Setting]:
    """Join H settings with what ``measure`` found."""
    top1, _, loss = (values.tolist() for values in found)
    return [
        {**setting, "top1": a, "loss": b}
        for setting, a, b in zip(settings, top1, loss, strict=True)
    ]


def choose(
    held_out: Sequence[Setting], settings: Sequence[Setting], images: int, name: str, key: str
) -> Setting:
    """Return the setting of the lowest cross-entropy among those with as good a top-1 as the best.

    As good is within one standard error (The Elements of Statistical Learning, section 7.10),
    since the largest of many accuracies on a few images is luck.

    Warns if all that are as good lie at an edge of the grid.

    Args:
        held_out: As ``scored`` gives them; if there are none, the middle of ``settings`` is taken.
        settings: All of them.
        images: How many were held out.
        name: Of the value whose edges are looked at.
        key: What the user widens.
    """
    if not held_out:
        return settings[(len(settings) - 1) // 2]
    top1 = max(row["top1"] for row in held_out)
    error = math.sqrt(top1 * (100 - top1) / images)
    good = [row for row in held_out if row["top1"] >= top1 - error]
    best = min(good, key=lambda row: row["loss"])
    values = [setting[name] for setting in settings]
    low, high = min(values), max(values)
    if low < high and all(row[name] in (low, high) for row in good):
        edge = "lowest" if best[name] == low else "highest"
        _log.warning("%s=%g won and is the %s tried: widen %s", name, best[name], edge, key)
    return {setting: best[setting] for setting in settings[0]}


def ticks(progress: Progress | None, total: int) -> Callable[[], None]:
    """Return what tells ``progress`` at each call that one more of ``total`` parts is done."""
    done = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), total)

    return tick
