"""Code of both training modes: from the configuration to a finished run."""

from __future__ import annotations

import os
import shlex
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.distributed import DistError

from ssl_samix.artifacts.checkpoints import AtomicCheckpointIO, describe
from ssl_samix.artifacts.encoder import load_encoder, save_encoder
from ssl_samix.artifacts.foreign import published
from ssl_samix.artifacts.mixer import save_mixer
from ssl_samix.artifacts.run_folder import RunFolder, default_out, mend_metrics, resumed_config
from ssl_samix.config.compose import (
    PRETRAINED,
    absolute,
    build,
    compose,
    dotted,
    groups,
    in_hydras_grammar,
    parse,
    plain,
    quoted,
)
from ssl_samix.config.extras import check_extras
from ssl_samix.config.key_types import check_callbacks
from ssl_samix.data.datamodule import DataModule
from ssl_samix.data.view_spec import Recipes
from ssl_samix.errors import ConfigError, Interrupted, UserError, check_range
from ssl_samix.methods.base import BaseMethod
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.models.backbone import Backbone
from ssl_samix.optim import OptimizerRecipe
from ssl_samix.processes import fit_to_launcher, is_main_process, started_world
from ssl_samix.trainer import compile_if_wanted, memory_format, record_start
from ssl_samix.training.averaging import ExportedAverage
from ssl_samix.training.defaults import known_of, resolve_auto
from ssl_samix.training.guards import FiniteLoss, MixerHealth, RunCheckpoint, SeveralProcesses
from ssl_samix.training.launch import given_folder, imported_by_a_worker, relaunched_as
from ssl_samix.training.logging import (
    MetricsCSV,
    Pace,
    Readings,
    Run,
    RunProgress,
    announce,
    finish,
)
from ssl_samix.training.monitors import KNNMonitor, Monitor, Recluster
from ssl_samix.training.probe import OnlineProbe
from ssl_samix.training.trackers import build_loggers, tracking
from ssl_samix.training.view_picture import ViewPicture


class Mode(ABC):
    """Interface of a training mode: what differs between pretraining and supervised training."""

    command: str  # subcommand of ``samix``, and name of its configuration
    labelled = False  # whether it trains on labelled images only
    monitor: str  # key of its monitor, under ``callbacks``
    purpose: str  # of labels, for the screen

    @abstractmethod
    def views(self, config: DictConfig) -> Recipes:
        """Return the settings of a batch's views."""

    @abstractmethod
    def module(
        self,
        config: DictConfig,
        data: DataModule,
        folder: RunFolder,
        backbone: Backbone,
        mixing: MixObjective | None,
    ) -> BaseMethod:
        """Build the module to train; raise if the data do not suit it."""

    @abstractmethod
    def meta(self, choices: dict[str, str], data: DataModule) -> dict[str, Any]:
        """Return the mode's metadata of the run's files: at least its ``method``."""

    def save(self, folder: RunFolder, module: BaseMethod, meta: dict[str, Any]) -> None:
        """Write the encoder, or its average if wanted, and the Mixer if there is one."""
        trainer: Any = module.trainer
        average = next((c for c in trainer.callbacks if isinstance(c, ExportedAverage)), None)
        if average is None:
            save_encoder(folder.encoder, module.backbone, meta)
        else:
            said = {**meta, "ema": average.momentum}
            save_encoder(folder.encoder, average.backbone(module), said)
        if module.mixing is not None and module.mixing.learns:
            save_mixer(folder.mixer, module.teacher_backbone, module.mixing.policy, meta)  # type: ignore[arg-type]


def as_words(
    data: str | os.PathLike[str] | None, overrides: dict[str, Any], **choices: Any
) -> list[str]:
    """Return the arguments of a Python call as command-line arguments.

    Args:
        data: A data set's name, or the path of a folder of images; a ``Path`` is never a name.
        overrides: Choices and keys, as nested dictionaries or dotted.
        **choices: Further choices; None is left out.
    """
    given = {**choices, **dotted(overrides)}
    own = overrides.get("config_dir")
    if isinstance(data, str) and data in groups(None, own and os.fspath(own))["data"]:
        given["data"] = data
    elif data is not None:
        given |= {"data": "folder", "data.root": data}
    return [f"{key}={in_hydras_grammar(v)}" for key, v in given.items() if v is not None]


def configured(command: str, arguments: list[str]) -> tuple[DictConfig, dict[str, str], RunFolder]:
    """Return configuration, choices and folder of a new or resumed run."""
    if imported_by_a_worker():
        raise UserError(
            "this script starts training when it is imported, and data workers import it: put the "
            "call under if __name__ == '__main__':"
        )
    resume = [o.value() for o in parse(arguments) if o.key_or_group == "resume"]
    if resume and resume[-1] is not None:
        config, choices = resumed_config(command, resume[-1], arguments)
        check_extras(config)
        return config, choices, RunFolder(resume[-1])
    config, choices = compose(command, arguments)
    absolute(config)
    check_extras(config)
    out = config.out or given_folder()
    fit_to_launcher(config.trainer.devices, config.trainer.num_nodes)  # raises if they do not
    world, _ = started_world() or (config.trainer.num_nodes, 1)
    if out is None and world > 1:
        raise ConfigError("a run of several processes needs a run folder: give out=<folder>")
    folder = RunFolder(out or default_out(choices, config.seed))
    if is_main_process():
        folder.check_same_run(config)
    return config, choices, folder


def train(mode: Mode, config: DictConfig, choices: dict[str, str], folder: RunFolder) -> Run:
    """Train by the configuration, from the folder's last checkpoint if it has one."""
    # Lock the folder first, before any work that would be lost if another process has it.
    with folder.lock() if is_main_process() else nullcontext():
        return _trained(mode, config, choices, folder)


def _trained(mode: Mode, config: DictConfig, choices: dict[str, str], folder: RunFolder) -> Run:
    check_range("seed", config.seed, 0)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data: DataModule = build(
        config.data, views=mode.views(config), seed=config.seed, labelled=mode.labelled,
        accelerator=config.trainer.accelerator,
    )  # fmt: skip
    automatic = resolve_auto(config, choices, len(data.images), known_of(data))
    backbone = build(config.backbone, image_size=data.splits.image_size)
    init = config.get("init")  # a run from before pretraining had it has no such key
    if init is not None and not folder.last.exists():
        start_from(init, backbone)
    mixing = build_mixing(config, backbone, data)
    module = mode.module(config, data, folder, backbone, mixing)
    module.to(memory_format=memory_format(module))
    meta = {**_meta(choices, backbone, data, mixing), **mode.meta(choices, data)}
    monitor: Monitor = build(config.callbacks[mode.monitor])
    trainer = _trainer(config, folder, module, data, monitor, meta)
    compiling = config.trainer.get("compile", False)  # older runs have no such key
    compile_if_wanted(module, compiling, trainer.strategy.root_device)
    if is_main_process():
        folder.create(config, choices, automatic)
        mend_metrics(folder.metrics)
        record_start(folder.environment, trainer.precision)
    announce(trainer, config, folder, module, data, meta, mode.purpose, automatic)
    with tracking(trainer, config, folder.path):
        _fit(mode.command, trainer, module, data, folder, config.get("config_dir"))
    if config.trainer.max_epochs % config.callbacks.checkpoint.every_n_epochs:
        trainer.save_checkpoint(folder.last)  # the checkpoint interval skipped the last epochs
    if trainer.is_global_zero:
        mode.save(folder, module, meta)
    return finish(trainer, folder, monitor)


def start_from(init: str, backbone: Backbone) -> None:
    """Copy the weights of an encoder that has learned before.

    Args:
        init: A run folder, a checkpoint, an ``encoder.safetensors``; or ``pretrained``, the weights
            that torchvision or timm publish for this network, fetched if they are not here.
        backbone: Takes them.

    Raises:
        UserError: If there is none, or it is another network.
    """
    if init == PRETRAINED:
        theirs, meta = published(backbone.name, backbone.image_size)
        size: int = meta["image_size"]
    else:
        encoder = load_encoder(init)
        theirs, size = encoder.backbone, encoder.image_size
    if theirs.settings != backbone.settings:
        raise ConfigError(
            f"init={init} is {describe(theirs.settings)}, this run has "
            f"{describe(backbone.settings)}: choose the same backbone"
        )
    try:
        backbone.load_state_dict(theirs.state_dict(), strict=True)
    except RuntimeError as error:  # a transformer's position table
        raise ConfigError(
            f"init={init} takes images of {size} px only, not {backbone.image_size}"
        ) from error


def build_mixing(config: DictConfig, backbone: Backbone, data: DataModule) -> MixObjective | None:
    """Build the mixing objective, for images normalised as in the data set; None without mixing."""
    if not config.mixup:
        return None
    mixing: MixObjective = build(config.mixup, backbone=backbone)
    mixing.set_normalisation(data.splits.mean, data.splits.std)
    return mixing


def build_optimizer(config: DictConfig) -> OptimizerRecipe:
    """Build the optimizer; not a fused one if gradients are clipped.

    Lightning cannot clip gradients of a fused optimizer in mixed precision.
    """
    settings = config.optimizer.copy()
    if config.trainer.get("gradient_clip_val") is not None and "fused" in settings.optimizer:
        settings.optimizer.fused = False
    recipe: OptimizerRecipe = build(settings)
    return recipe


@contextmanager
def _none_left_behind(trainer: pl.Trainer) -> Iterator[None]:
    """End the processes that Lightning has started if this one fails: they would wait for it."""
    try:
        yield
    except BaseException:
        launcher = trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
        raise


def _how_to_resume(command: str, folder: RunFolder, config_dir: str | None) -> str:
    given = {"resume": str(folder.path), **({"config_dir": config_dir} if config_dir else {})}
    words = shlex.join(f"{key}={value}" for key, value in given.items())
    function = {"pretrain": "pretrain", "supervised": "train_supervised"}[command]
    call = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return f"resume with samix {command} {words}, or in Python with ssl_samix.{function}({call})"


def _fit(
    command: str,
    trainer: pl.Trainer,
    module: BaseMethod,
    data: DataModule,
    folder: RunFolder,
    config_dir: str | None = None,
) -> None:
    again = _how_to_resume(command, folder, config_dir)
    # Processes that Lightning starts for further devices find the run by its folder.
    words = [f"resume={quoted(str(folder.path))}"]
    words += [] if config_dir is None else [f"config_dir={quoted(config_dir)}"]
    with relaunched_as(folder.path, command, *words):
        try:
            with _none_left_behind(trainer):
                trainer.fit(module, data, ckpt_path=folder.last if folder.last.exists() else None)
        except SystemExit as stop:  # Lightning ends an interrupted fit this way
            raise Interrupted(f"interrupted: {again}") from stop
        except RuntimeError as error:
            if isinstance(error, DistError) or "gloo" in str(error):
                raise UserError(f"another process of this run ended, see above; {again}") from error
            if "conditioned on metric" in str(error):
                raise ConfigError(f"callbacks.extra.EarlyStopping: {error}") from error
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a data worker ended unexpectedly ({error}): see its output above; without any, "
                "memory may be short; data.workers=0 uses no workers"
            ) from error
        except MisconfigurationException as error:
            raise ConfigError(str(error).strip().splitlines()[0]) from error


def _meta(
    choices: dict[str, str], backbone: Backbone, data: DataModule, mixing: MixObjective | None
) -> dict[str, Any]:
    learned = {} if mixing is None or not mixing.learns else {"mixer": mixing.description}
    return {
        **learned,
        "mixup": choices["mixup"],
        "data": choices["data"],
        "backbone": backbone.settings,
        "feature_dim": backbone.feature_dim,
        "image_size": data.splits.image_size,
        "train_images": len(data.splits.train),
        "mean": list(data.splits.mean),
        "std": list(data.splits.std),
    }


def _trainer(
    config: DictConfig,
    folder: RunFolder,
    module: BaseMethod,
    data: DataModule,
    monitor: Monitor,
    meta: dict[str, Any],
) -> pl.Trainer:
    # The best checkpoint is written first, so that the last one contains its path and score.
    checkpoints = [RunCheckpoint(folder.path, "best", monitor=monitor.quality, mode="max")]
    if data.splits.val is None:
        checkpoints.clear()
    checkpoints.append(
        RunCheckpoint(folder.path, "last", config.callbacks.checkpoint.every_n_epochs)
    )
    watchers: list[pl.Callback] = [FiniteLoss(), SeveralProcesses(), Pace(), Recluster(), monitor]
    if config.callbacks.get("probe") and isinstance(monitor, KNNMonitor):
        monitor.probe = OnlineProbe()
        watchers.append(monitor.probe)
    if config.callbacks.get("ema") is not None:
        watchers.append(ExportedAverage(config.callbacks.ema))
    readings = Readings()
    watchers += [MetricsCSV(folder.metrics, monitor), readings, RunProgress(monitor, readings)]
    watchers.append(MixerHealth())
    pictures = config.callbacks.get("pictures")  # older runs have no such key
    if pictures is not None:
        watchers += [build(pictures, folder=folder.pictures), ViewPicture(folder.views)]
    watchers += _extra_callbacks(config)
    trainer: pl.Trainer = build(
        config.trainer,
        wants_sync_batchnorm=module.wants_sync_batchnorm,
        callbacks=[*watchers, *checkpoints],
        logger=build_loggers(config, folder.path) or False,
        plugins=[AtomicCheckpointIO(meta)],
        **fit_to_launcher(config.trainer.devices, config.trainer.num_nodes),
        default_root_dir=folder.path,
    )
    return trainer


def _extra_callbacks(config: DictConfig) -> list[pl.Callback]:
    """Return the callbacks of Lightning that ``callbacks.extra`` names.

    Raises:
        ConfigError: For one that is not allowed, or an argument that it does not take.
    """
    wanted: dict[str, dict[str, Any]] = plain(config.callbacks).get("extra") or {}
    check_callbacks(wanted)
    built = []
    for name, arguments in wanted.items():
        try:
            built.append(getattr(pl.callbacks, name)(**arguments))
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ConfigError(f"callbacks.extra.{name}: {error}") from error
    return built
