"""Pretraining: an encoder from images without labels.

(The module is not called ``pretrain`` because that is the function that the package offers.)
"""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig

from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import build
from ssl_samix.data.datamodule import DataModule
from ssl_samix.data.view_spec import Recipes
from ssl_samix.errors import ConfigError
from ssl_samix.methods.base import BaseMethod
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.models.backbone import Backbone
from ssl_samix.training.logging import Run
from ssl_samix.training.run import Mode, as_words, build_optimizer, configured, train


def pretrain(
    data: str | os.PathLike[str] | None = None,
    method: str | None = None,
    out: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Run:
    """Pretrain an encoder: ``samix pretrain`` as a function.

    Args:
        data: A data set's name (``digits`` if None), or the path of a folder of images;
            a ``Path`` is never a name.
        method: ``simclr`` (if None), ``moco``, ``byol`` or another of ``configs/method``.
        out: Run folder; a new one under ``runs`` if None. The same call resumes an interrupted
            run.
        **overrides: Choices (``backbone="resnet50"``) and keys, as nested dicts
            (``trainer={"max_epochs": 10}``) or dotted (``**{"trainer.max_epochs": 10}``); or
            ``resume=<run folder>``.

    Returns:
        The run: its folder, its last metrics, its encoder.

    Raises:
        UserError: For all errors that the command line reports, with the same message.
    """
    return train_from_words(as_words(data, overrides, method=method, out=out))


def train_from_words(arguments: list[str]) -> Run:
    """Run ``samix pretrain`` with these ``key=value`` arguments."""
    return train(Pretraining(), *configured(Pretraining.command, arguments))


class Pretraining(Mode):
    """Pretraining mode; labels are for the monitor only."""

    command = "pretrain"
    monitor = "knn"
    purpose = "for the monitor only"

    def views(self, config: DictConfig) -> Recipes:
        """Return the settings of the method's views."""
        views: Recipes = build(config.views)
        return views

    def module(
        self,
        config: DictConfig,
        data: DataModule,
        folder: RunFolder,
        backbone: Backbone,
        mixing: MixObjective | None,
    ) -> BaseMethod:
        """Build the method."""
        optimizer = build_optimizer(config)
        method: BaseMethod = build(
            config.method, backbone=backbone, optimizer=optimizer, mixing=mixing
        )
        if mixing is not None and mixing.size < 1:
            if mixing.replaces(method):
                raise ConfigError(
                    "mixup.size is for mixtures beside the plain views: set mixup.size=1 or "
                    "mixup.placement=add"
                )
            backbone.check_small(round(mixing.size * backbone.image_size), "mixup.size")
        if data.small_size is not None:
            backbone.check_small(data.small_size, "views.small.size")
            if mixing is not None and mixing.replaces(method):
                raise ConfigError(
                    "mixup.placement=replace leaves small views unused: set views.small.count=0 or "
                    "mixup.placement=add"
                )
        return method

    def meta(self, choices: dict[str, str], data: DataModule) -> dict[str, Any]:
        """Return the method's name."""
        return {"method": choices["method"]}
