"""Pretraining: the only place that wires data, backbone, method and trainer together.

(The module is not called ``pretrain`` because that is the function that the package offers.)
"""

from __future__ import annotations

import os
import shlex
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ssl_samix.callbacks.checkpoints import RunCheckpoint
from ssl_samix.callbacks.finite_loss import FiniteLoss
from ssl_samix.callbacks.metrics_csv import MetricsCSV
from ssl_samix.callbacks.mixer_health import MixerHealth
from ssl_samix.callbacks.pace import Pace
from ssl_samix.callbacks.progress import RunProgress
from ssl_samix.callbacks.recluster import Recluster
from ssl_samix.callbacks.run_summary import Run, announce, finish
from ssl_samix.checkpoint_io import AtomicCheckpointIO
from ssl_samix.config import (
    absolute,
    build,
    compose,
    dotted,
    groups,
    parse,
    quoted,
)
from ssl_samix.data.datamodule import DataModule
from ssl_samix.engine import memory_format
from ssl_samix.environment import record_start
from ssl_samix.errors import ConfigError, Interrupted, check_range
from ssl_samix.evaluation.checkpoint import save_encoder
from ssl_samix.launch import given_folder, is_main_process, launched_outside, relaunched_as
from ssl_samix.methods.base import BaseMethod
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.python_values import in_hydras_grammar
from ssl_samix.run_folder import RunFolder, default_out, resumed_config
from ssl_samix.standalone import save_mixer


def pretrain(
    data: str | os.PathLike[str] | None = None,
    method: str | None = None,
    out: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Run:
    """Pretrain an encoder: ``samix pretrain`` as a function.

    Args:
        data: A data set's name (``digits`` if None), or the path of a folder of images.
        method: ``moco`` (if None), ``simclr`` or ``byol``.
        out: Run folder; a new one under ``runs`` if None. Called again with the same settings, an
            interrupted run goes on.
        **overrides: Choices (``backbone="resnet50"``) and keys, as nested dicts
            (``trainer={"max_epochs": 10}``) or dotted (``**{"trainer.max_epochs": 10}``); or
            ``resume=<run folder>``.

    Returns:
        The run: its folder, its last metrics, its encoder.

    Raises:
        UserError: For whatever the command line would refuse, with the same sentence.
    """
    words = {"method": method, "out": out, **dotted(overrides)}
    if data is not None and str(data) in groups()["data"]:
        words["data"] = data
    elif data is not None:
        words |= {"data": "folder", "data.root": data}
    arguments = [f"{key}={in_hydras_grammar(v)}" for key, v in words.items() if v is not None]
    return run(*configured(arguments))


def configured(arguments: list[str]) -> tuple[DictConfig, dict[str, str], RunFolder]:
    """Return configuration, choices and folder of a new or a resumed run."""
    resume = [o.value() for o in parse(arguments) if o.key_or_group == "resume"]
    if resume and resume[-1] is not None:
        config, choices = resumed_config(resume[-1], arguments)
        return config, choices, RunFolder(resume[-1])
    config, choices = compose("pretrain", arguments)
    absolute(config)
    out = config.out or given_folder()
    if out is None and launched_outside():
        raise ConfigError("started as several processes, the run needs a name: give out=<folder>")
    return config, choices, RunFolder(out or default_out(choices, config.seed))


def run(config: DictConfig, choices: dict[str, str], folder: RunFolder) -> Run:
    """Train what the configuration says, in the folder, from its last checkpoint if it has one."""
    if is_main_process() and config.resume is None:
        folder.check_mine(config)
    check_range("seed", config.seed, 0)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data: DataModule = build(config.data, views=build(config.views), seed=config.seed)
    backbone = build(config.backbone, image_size=data.splits.image_size)
    mixing = build(config.mixup, backbone=backbone) if config.mixup else None
    module: BaseMethod = build(
        config.method, backbone=backbone, optimizer=build(config.optimizer), mixing=mixing
    )
    module.to(memory_format=memory_format(module))
    meta = _meta(choices, backbone, data, mixing)
    trainer = _trainer(config, folder, module, data, meta)
    if is_main_process():
        folder.create(config, choices)
        record_start(folder.environment)
    announce(trainer, config, choices, folder, module, data)
    _fit(trainer, module, data, folder)
    if config.trainer.max_epochs % config.callbacks.checkpoint.every_n_epochs:
        trainer.save_checkpoint(folder.last)  # the interval has left the last epochs out
    if trainer.is_global_zero:
        save_encoder(folder.encoder, backbone, meta)
        if mixing is not None and mixing.learns:
            save_mixer(folder.mixer, module.teacher_backbone, mixing.policy, meta)
    return finish(trainer, folder)


def _fit(trainer: pl.Trainer, module: BaseMethod, data: DataModule, folder: RunFolder) -> None:
    # Processes that Lightning starts for further devices find the run by its folder.
    with relaunched_as(folder.path, "pretrain", f"resume={quoted(str(folder.path))}"):
        try:
            trainer.fit(module, data, ckpt_path=folder.last if folder.last.exists() else None)
        except SystemExit as stop:  # Lightning's way to end a fit that was interrupted
            resume = shlex.quote(f"resume={folder.path}")
            raise Interrupted(f"interrupted: samix pretrain {resume} goes on") from stop
        except MisconfigurationException as error:
            raise ConfigError(str(error).strip().splitlines()[0]) from error


def _meta(
    choices: dict[str, str], backbone: Any, data: DataModule, mixing: MixObjective | None
) -> dict[str, Any]:
    learned = {} if mixing is None or not mixing.learns else {"mixer": mixing.description}
    return {
        **learned,
        "method": choices["method"],
        "mixup": choices["mixup"],
        "data": choices["data"],
        "backbone": backbone.settings,
        "feature_dim": backbone.feature_dim,
        "image_size": data.splits.image_size,
        "mean": list(data.splits.mean),
        "std": list(data.splits.std),
    }


def _trainer(
    config: DictConfig,
    folder: RunFolder,
    module: BaseMethod,
    data: DataModule,
    meta: dict[str, Any],
) -> pl.Trainer:
    monitor = build(config.callbacks.knn)
    # The best checkpoint is written first, so that the last one knows of it.
    checkpoints = [RunCheckpoint(folder.path, "best", monitor="knn/top1", mode="max")]
    if data.splits.val is None:
        checkpoints.clear()
    checkpoints.append(
        RunCheckpoint(folder.path, "last", config.callbacks.checkpoint.every_n_epochs)
    )
    metrics = MetricsCSV(folder.metrics, monitor)
    watchers = [FiniteLoss(), Pace(), Recluster(), monitor, metrics, RunProgress(), MixerHealth()]
    pictures = config.callbacks.get("pictures")  # a run from before they existed has no such key
    if pictures is not None:
        watchers.append(build(pictures, folder=folder.pictures))
    trainer: pl.Trainer = build(
        config.trainer,
        wants_sync_batchnorm=module.wants_sync_batchnorm,
        callbacks=[*watchers, *checkpoints],
        logger=TensorBoardLogger(folder.path, name="", version="tensorboard"),
        plugins=[AtomicCheckpointIO(meta)],
        default_root_dir=folder.path,
    )
    return trainer
