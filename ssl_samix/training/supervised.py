"""Supervised training: a classifier from labelled images."""

from __future__ import annotations

import os
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ssl_samix.artifacts.encoder import save_classifier
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import build
from ssl_samix.data.datamodule import DataModule
from ssl_samix.data.folder import empty_classes, join_names
from ssl_samix.data.view_spec import OneView, Recipes
from ssl_samix.errors import DataError
from ssl_samix.methods.base import BaseMethod
from ssl_samix.methods.classifier import Classifier
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.models.backbone import Backbone
from ssl_samix.training.logging import Run
from ssl_samix.training.run import Mode, as_words, build_optimizer, configured, train


def train_supervised(
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Run:
    """Train a classifier: ``samix supervised`` as a function.

    Args:
        data: A data set's name (``digits`` if None), or the path of a folder with a folder of
            images per class; a ``Path`` is never a name.
        out: Run folder; a new one under ``runs`` if None. The same call resumes an interrupted
            run.
        **overrides: Choices (``mixup="cutmix"``) and keys, as ``pretrain`` takes them.

    Returns:
        The run: its folder, its last metrics, its encoder.

    Raises:
        UserError: For all errors that the command line reports, with the same message.
    """
    return train_from_words(as_words(data, overrides, out=out))


def train_from_words(arguments: list[str]) -> Run:
    """Run ``samix supervised`` with these ``key=value`` arguments."""
    return train(Supervised(), *configured(Supervised.command, arguments))


class Supervised(Mode):
    """Supervised mode: trains on labels, and measures on validation images."""

    command = "supervised"
    labelled = True
    monitor = "accuracy"
    purpose = "for training"

    def views(self, config: DictConfig) -> Recipes:
        """Return the settings of the augmentation's one view."""
        return OneView(**config.augment)

    def module(
        self,
        config: DictConfig,
        data: DataModule,
        folder: RunFolder,
        backbone: Backbone,
        mixing: MixObjective | None,
    ) -> BaseMethod:
        """Build the classifier, from the encoder in ``init`` if given."""
        _check_labels(config, data)
        classifier: Classifier = build(
            config.classifier,
            backbone=backbone,
            classes=len(data.splits.classes),
            optimizer=build_optimizer(config),
            mixing=mixing,
        )
        return classifier

    def meta(self, choices: dict[str, str], data: DataModule) -> dict[str, Any]:
        """Return the class names."""
        return {"method": "supervised", "classes": list(data.splits.classes)}

    def save(self, folder: RunFolder, module: BaseMethod, meta: dict[str, Any]) -> None:
        """Also write both classifiers."""
        super().save(folder, module, meta)
        networks: dict[str, nn.Module] = {"online": module.embedder, "ema": module.teacher}
        save_classifier(folder.classifier, networks, meta)


def _check_labels(config: DictConfig, data: DataModule) -> None:
    """Raise if labels are missing or invalid, or a class has no image.

    Raises:
        DataError: Without labels, with a label outside the classes, or with a class without
            images.
    """
    classes, labels = data.splits.classes, data.splits.train.labels
    bare = empty_classes(config.data.root) if config.data.name == "folder" else []
    if not classes:
        hint = f" (no image is in {join_names(bare)})" if bare else ""
        raise DataError(
            f"supervised training needs labels{hint}: give a folder of images per class, or use "
            "samix pretrain, which needs no labels"
        )
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise DataError(
            f"{len(outside)} training images have labels outside the {len(classes)} classes, "
            f"such as {int(outside[0])}"
        )
    counts = torch.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    if empty + bare:
        raise DataError(
            f"no training image of {join_names(empty + bare)}: add one or remove the class"
        )
