"""Types of configuration keys, and checks of values. Imports no torch.

Most keys have the type of their default in ``configs``. ``TYPES`` has the others: those whose
default is null, ``auto``, or of a narrower type than the key. Annotations of constructors would
give the same types, but reading them imports torch, and many arguments are passed by ``**``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ssl_samix.config.source import arguments_of
from ssl_samix.errors import ConfigError, check_choice, nearest

Auto = Literal["auto"]
TYPES: dict[str, Any] = {
    # paths
    "out": Path | None,
    "resume": Path | None,
    "init": Path | None,
    "config_dir": Path | None,
    "run": Path | None,
    "images": Path | None,
    "split": Path | None,
    "data.root": Path | None,
    "mixup.mixer": Path | None,
    # training
    "data.image_size": int | Auto,
    "data.limit": int | None,
    "data.labels": bool | Auto,
    "data.workers": int | Auto,
    "method.hidden_dim": int | None,
    "mixup.eta": float | Auto,
    "mixup.local_weight": float | Auto,
    "backbone.stem": str,
    "classifier.heads": str,
    "data.batch_size": int | Auto,
    "data.crop_min": float | Auto,
    "views.a.brightness": float | Auto,
    "views.a.contrast": float | Auto,
    "views.a.saturation": float | Auto,
    "views.a.hue": float | Auto,
    "views.b.brightness": float | Auto,
    "views.b.contrast": float | Auto,
    "views.b.saturation": float | Auto,
    "views.b.hue": float | Auto,
    "method.queue_size": int | Auto,
    "optimizer.lr": float | Auto,
    "optimizer.warmup_epochs": float | Auto,
    "trainer.max_epochs": int | Auto,
    "callbacks.accuracy.every_n_epochs": int | Auto,
    "callbacks.ema": float | Literal["teacher"] | None,
    "callbacks.knn.every_n_epochs": int | Auto,
    "callbacks.knn.bank_limit": int | None,
    "callbacks.knn.val_limit": int | Auto | None,
    "callbacks.pictures.every_n_epochs": int | Auto,
    "logger.mlflow.run_name": str | None,
    "logger.mlflow.tracking_uri": str | None,
    "logger.wandb.entity": str | None,
    "logger.wandb.mode": str | None,
    "logger.wandb.name": str | None,
    "mixup.pairs": str,
    "mixup.placement": str,
    "mixup.size": float | Auto,
    "trainer.accelerator": str,
    "trainer.compile": bool | str,
    "trainer.devices": int | str | list[int],
    "trainer.gradient_clip_val": float | None,
    "trainer.precision": int | str,
    "trainer.strategy": str,
    "trainer.sync_batchnorm": bool | Auto,
    "views.device": str,
    "views.small.size": int | Auto,
    "augment.device": str,
    # evaluation and export
    "clusters": int | Auto,
    "device": str,
    "finetune.head_factor": list[float],
    "finetune.milestones": list[float],
    "format": str | None,
    "image_size": int | None,
    "limit": int | None,
    "mean": list[float] | None,
    "model": str | None,
    "per_class": int | None,
    "percent": float,
    "license": str | None,
    "prefix": str | None,
    "preset.milestones": list[float],
    "repo": str | None,
    "show": list[int] | None,
    "std": list[float] | None,
    "strength": float,
    "table": str | None,
    "workers": int | Auto,
}
PATHS = tuple(key for key, kind in TYPES.items() if kind == Path | None)
MISSING = "???"  # OmegaConf's marker of a missing value
LARGEST = 2**63 - 1  # largest integer of torch and NumPy (int64)
LARGEST_SEED = 2**32 - 1  # largest seed of NumPy
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name",
    Path: "a path",
    Any: "a value",
    dict: "keys and values",
    NoneType: "null",
}
CHECKS: dict[Any, Callable[[Any], bool]] = {
    Any: lambda value: value != MISSING,
    float: lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,
    int: lambda value: type(value) is int and value >= -LARGEST,
    str: lambda value: isinstance(value, str) and value != MISSING,
    Path: lambda value: isinstance(value, str) and value not in ("", MISSING),
}


def converted(key: str, value: Any, default: Any) -> Any:
    """Return a value, checked against the type of its key; for a list key, a list.

    Args:
        key: Dotted key.
        value: Plain value, not a container of OmegaConf.
        default: Default in the configuration, likewise; it gives the type of most keys.

    Raises:
        ConfigError: If the value has another type than the key; names the key's type.
    """
    most = LARGEST_SEED if key == "seed" else LARGEST
    if type(value) is int and value > most:
        raise ConfigError(f"{key} must be at most {most}, got {value}")
    kind = TYPES.get(key, _kind_of(default))
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if any(_is_of(option, value) for option in options):
        return value
    if any(get_origin(o) is list and _is_of(get_args(o)[0], value) for o in options):
        return [value]
    wanted = " or ".join(map(_said, options))
    given = {None: "null", True: "true", False: "false"}
    shown = given.get(value, value) if isinstance(value, bool | NoneType) else value
    raise ConfigError(f"{key} needs {wanted}, got '{shown}'")


def _kind_of(default: Any) -> Any:
    if isinstance(default, list):
        kinds = {type(value) for value in default}
        return list[float if float in kinds else kinds.pop()] if kinds else list[Any]  # type: ignore[misc]
    return Any if default is None else type(default)


def _is_of(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(get_args(kind)[0], each) for each in value)
    return CHECKS[kind](value) if kind in CHECKS else isinstance(value, kind)


def _said(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is list:
        plural = {int: "whole numbers", float: "numbers"}
        return f"a list of {plural.get(get_args(kind)[0], 'values')}"
    return WORDS[kind]


KEY = "backbone.options"
FILES = ("checkpoint_path", "cache_dir")  # options that take a local file or folder
PUBLISHED = "pretrained"  # prefix of options that select published weights
LISTS = (list, tuple)
VALUES = (str, int, float, bool, type(None))


def check_options(options: Any) -> None:
    """Check that backbone options select no weights, which may be any file, and have plain values.

    Raises:
        ConfigError: Names the option.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(f"{KEY} holds keys of its own: write {KEY}={{<option>: <value>}}")
    for name, value in options.items():
        if str(name) in FILES or str(name).startswith(PUBLISHED):
            raise ConfigError(
                f"{KEY} cannot have {name}: a network is built without weights; "
                "samix supervised init=<file> starts from some"
            )
        if not isinstance(name, str) or not is_plain(value):
            raise ConfigError(f"{KEY}.{name} needs a number, a text, or a list of these")


EXTRA = "trainer.extra"
TRAINER = "pytorch_lightning.trainer.trainer.Trainer"
_OURS = (
    "accelerator", "accumulate_grad_batches", "devices", "gradient_clip_val", "max_epochs",
    "num_nodes", "precision", "strategy", "sync_batchnorm",
)  # fmt: skip
# Arguments of Lightning's Trainer that this package sets -> the key for it, if there is one.
SET_HERE: dict[str, str | None] = {
    **{name: f"trainer.{name}" for name in _OURS},
    "callbacks": "callbacks.<name>",
    "default_root_dir": "out",
    "enable_model_summary": None,
    "enable_progress_bar": None,
    "logger": "logger",
    "num_sanity_val_steps": None,
    "plugins": None,
    "use_distributed_sampler": None,
}


def check_trainer_arguments(extra: Any) -> None:
    """Check further arguments of Lightning's Trainer: their names and that their values are plain.

    Raises:
        ConfigError: Names the nearest argument, or the key that sets this one.
    """
    if not isinstance(extra, Mapping):
        raise ConfigError(f"{EXTRA} holds keys of its own: write {EXTRA}.<argument>=<value>")
    for name, value in extra.items():
        if name in SET_HERE:
            key = SET_HERE[name]
            way = f"write {key}=<value>" if key else "ssl_samix sets this argument itself"
            raise ConfigError(f"{EXTRA}.{name} cannot be set: {way}")
        known = arguments_of(TRAINER)
        if name not in known:
            free = known.difference(SET_HERE)
            raise ConfigError(nearest(str(name), free, "argument of Lightning's Trainer"))
        if not is_plain(value):
            raise ConfigError(f"{EXTRA}.{name} needs a number, a text, or a list of these")


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, string, bool, None, or a list of these or their lists."""
    parts = value if isinstance(value, LISTS) else [value]
    inner = (part if isinstance(part, LISTS) else [part] for part in parts)
    return all(isinstance(one, VALUES) for ones in inner for one in ones)


# Lightning's callbacks that callbacks.extra may name: those that need no function as an argument,
# and write no file where the configuration says.
CALLBACKS = (
    "DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "SpikeDetection",
    "StochasticWeightAveraging", "Timer",
)  # fmt: skip


def check_callbacks(value: Any) -> None:
    """Check that ``callbacks.extra`` names callbacks of Lightning, with plain arguments.

    Raises:
        ConfigError: Names the callback or the argument.
    """
    form = "{<callback of Lightning>: {<argument>: <value>}}"
    if not isinstance(value, Mapping):
        raise ConfigError(f"callbacks.extra holds keys of its own: write callbacks.extra={form}")
    for name, arguments in value.items():
        check_choice("callback in callbacks.extra", name, CALLBACKS)
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"callbacks.extra.{name} holds arguments: write {{}} for none")
        for key, given in arguments.items():
            if str(key).startswith("_") or not is_plain(given):
                raise ConfigError(
                    f"callbacks.extra.{name}.{key} needs a number, a text, or a list of these"
                )


# Keys that hold any keys -> the check of their value.
OPEN_KEYS: dict[str, Callable[[Any], None]] = {
    KEY: check_options,
    EXTRA: check_trainer_arguments,
    "callbacks.extra": check_callbacks,
}
