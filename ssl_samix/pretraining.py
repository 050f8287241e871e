"""Pretraining: the only place that wires data, backbone, method and trainer together.

(The module is not called ``pretrain`` because that is the function that the package offers.)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from ssl_samix.callbacks.metrics_csv import MetricsCSV
from ssl_samix.callbacks.pace import Pace
from ssl_samix.callbacks.progress import RunProgress
from ssl_samix.callbacks.run_summary import Run, announce, finish
from ssl_samix.checkpoint_io import AtomicCheckpointIO
from ssl_samix.config import build, compose
from ssl_samix.data.datamodule import DataModule
from ssl_samix.engine import memory_format
from ssl_samix.environment import describe_environment
from ssl_samix.errors import ConfigError, Interrupted, check_range
from ssl_samix.evaluation.checkpoint import save_encoder
from ssl_samix.files import write_atomically
from ssl_samix.launch import is_main_process, launched_outside, relaunched_as
from ssl_samix.methods.base import BaseMethod
from ssl_samix.run_folder import RunFolder, default_out, resumed_config


def pretrain(
    data: str | os.PathLike[str] = "digits",
    method: str = "moco",
    out: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Run:
    """Pretrain an encoder: ``samix pretrain`` as a function.

    Args:
        data: A data set's name, or the path of a folder of images.
        method: ``moco``, ``simclr`` or ``byol``.
        out: Run folder; a new one under ``runs`` if None. Called again with the same settings, an
            interrupted run goes on.
        **overrides: Choices (``backbone="resnet50"``) and keys, as nested dicts
            (``trainer={"max_epochs": 10}``) or dotted (``**{"trainer.max_epochs": 10}``).

    Returns:
        The run: its folder, its last metrics, its encoder.

    Raises:
        UserError: For whatever the command line would refuse, with the same sentence.
    """
    words = {"method": method, "out": None if out is None else str(out)}
    if Path(data).is_dir():
        words |= {"data": "folder", "data.root": str(data)}
    else:
        words["data"] = str(data)
    arguments = [f"{k}={_quoted(v)}" for k, v in {**words, **_dotted(overrides)}.items()]
    return run(*configured(arguments))


def configured(arguments: list[str]) -> tuple[DictConfig, dict[str, str], RunFolder]:
    """Return configuration, choices and folder of a new or a resumed run."""
    config, choices = compose("pretrain", [a for a in arguments if not a.startswith("resume=")])
    resume = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if resume and resume[-1] not in ("null", "None"):
        rest = [a for a in arguments if not a.startswith("resume=")]
        config, choices = resumed_config(resume[-1], rest)
        return config, choices, RunFolder(resume[-1])
    if config.out is None and launched_outside():
        raise ConfigError("started as several processes, the run needs a name: give out=<folder>")
    return config, choices, RunFolder(config.out or default_out(choices, config.seed))


def run(config: DictConfig, choices: dict[str, str], folder: RunFolder) -> Run:
    """Train what the configuration says, in the folder, from its last checkpoint if it has one."""
    if is_main_process():
        folder.create(config, choices)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data: DataModule = build(config.data, views=build(config.views), seed=config.seed)
    backbone = build(config.backbone, image_size=data.splits.image_size)
    mixing = build(config.mixup) if config.mixup else None
    module: BaseMethod = build(
        config.method, backbone=backbone, optimizer=build(config.optimizer), mixing=mixing
    )
    module.to(memory_format=memory_format(module))
    meta = _meta(choices, backbone, data)
    trainer = _trainer(config, folder, module, data, meta)
    if is_main_process():
        text = json.dumps(describe_environment(sys.argv), indent=2)
        write_atomically(folder.environment, lambda temporary: temporary.write_text(text))
    announce(trainer, config, choices, folder, module, data)
    # Processes that Lightning starts for further devices find the run by its folder.
    with relaunched_as("pretrain", f"resume={folder.path}"):
        try:
            trainer.fit(module, data, ckpt_path=folder.last if folder.last.exists() else None)
        except SystemExit as stop:  # Lightning's way to end a fit that was interrupted
            raise Interrupted(f"interrupted: samix pretrain resume={folder.path} goes on") from stop
    if trainer.is_global_zero:
        save_encoder(folder.encoder, backbone, meta)
    return finish(trainer, folder)


def _meta(choices: dict[str, str], backbone: Any, data: DataModule) -> dict[str, Any]:
    return {
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
    checkpoints = [_checkpoint(folder, "last", config.callbacks.checkpoint.every_n_epochs)]
    if data.splits.val is not None:
        checkpoints.append(_checkpoint(folder, "best", 1, monitor="knn/top1", mode="max"))
    trainer: pl.Trainer = build(
        config.trainer,
        wants_sync_batchnorm=module.wants_sync_batchnorm,
        callbacks=[Pace(), build(config.callbacks.knn), RunProgress(), *checkpoints],
        logger=[
            MetricsCSV(folder.metrics),
            TensorBoardLogger(folder.path, name="", version="tensorboard"),
        ],
        plugins=[AtomicCheckpointIO(meta)],
        default_root_dir=folder.path,
    )
    return trainer


def _checkpoint(folder: RunFolder, name: str, epochs: int, **arguments: Any) -> ModelCheckpoint:
    check_range("callbacks.checkpoint.every_n_epochs", epochs, 1)
    return ModelCheckpoint(
        dirpath=folder.path,
        filename=name,
        every_n_epochs=epochs,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
        **arguments,
    )


def _dotted(overrides: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, dict) and key != "options":
            flat.update(_dotted(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _quoted(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if isinstance(value, str):
        return json.dumps(value) if any(c in value for c in " ,=:[]{}()'\"$") else value
    return "null" if value is None else plain_text(value)


def plain_text(value: Any) -> str:
    """Write numbers, truth values, lists and dicts in Hydra's grammar."""
    return json.dumps(value).replace('"', "")
