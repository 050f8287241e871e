"""PyTorch Lightning's trainer, and the choice of precision, memory layout and compilation."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
)
from torch import nn

from ssl_samix.errors import ConfigError, check_choice, check_range, nearest
from ssl_samix.files import write_atomically
from ssl_samix.models.backbone import breaks_in_channels_last
from ssl_samix.processes import started_by

Answer = TypeVar("Answer")
PACKAGES = (
    "ssl_samix", "torch", "torchvision", "lightly", "pytorch_lightning", "timm", "faiss-cpu",
    "hydra-core", "numpy",
)  # fmt: skip


def record_start(path: Path, precision: str) -> None:
    """Append the environment of a start or resume to the list in a JSON file.

    Args:
        path: The file.
        precision: The precision in use; the configuration may say ``auto``.
    """
    starts = json.loads(path.read_text("utf-8")) if path.exists() else []
    text = json.dumps([*starts, {**describe_environment(), "precision": precision}], indent=2)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def describe_environment() -> dict[str, Any]:
    """Return package versions, the git revision of the package, system and command."""
    import torch

    return {
        "command": sys.orig_argv,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_revision": git_revision(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": before_a_fork(_device_names),
    }


def before_a_fork(question: Callable[[], Answer]) -> Answer:
    """Return the answer to a question to CUDA, which must not be in use when a process forks.

    Lightning forks in a notebook, for several devices. There a process of its own asks.
    """
    if not hasattr(sys, "ps1") or not torch.cuda.is_available() or torch.cuda.is_initialized():
        return question()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(question)


def _device_names() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Return the commit of the checkout that the package runs from; None if it is installed."""
    package = Path(__file__).resolve().parent
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


MOST_EPOCHS = 10**6
PRECISIONS = ("auto", "32", "32-true", "bf16-mixed", "16-mixed")  # weights are always float32


def choose_precision(accelerator: str = "auto") -> str:
    """Return the fastest precision that the hardware supports natively.

    On a CPU without bfloat16 instructions autocast would be far slower than float32.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        supported = before_a_fork(partial(torch.cuda.is_bf16_supported, False))
        return "bf16-mixed" if supported else "16-mixed"
    if accelerator in ("auto", "mps", "gpu") and torch.backends.mps.is_available():
        return "32-true"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16-mixed" if native else "32-true"


def memory_format(module: nn.Module) -> torch.memory_format:
    """Return the faster memory format that is safe for the module: channels_last or contiguous."""
    return torch.contiguous_format if breaks_in_channels_last(module) else torch.channels_last


def build_trainer(  # noqa: PLR0913 - one argument per configuration key
    *,
    precision: str,
    accelerator: str,
    devices: int | str | list[int],
    sync_batchnorm: bool | str,
    wants_sync_batchnorm: bool,
    compile: bool | str = False,
    strategy: str = "auto",
    plugins: Sequence[Any] = (),
    extra: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> pl.Trainer:
    """Build the trainer from its configuration.

    Args:
        precision: Lightning's name of it, or ``auto``.
        accelerator: Lightning's.
        devices: Lightning's.
        sync_batchnorm: true, false or ``auto``.
        wants_sync_batchnorm: What ``auto`` means for this method; GPUs only.
        compile: Checked here; ``compile_if_wanted`` does it.
        strategy: One of ``STRATEGIES``.
        plugins: Lightning's.
        extra: The user's further arguments of ``pytorch_lightning.Trainer``, by name.
        **arguments: Further arguments of ``pytorch_lightning.Trainer``.

    Raises:
        ConfigError: If Lightning rejects the settings, or the hardware is missing.
    """
    silence_lightning()
    check_range("trainer.max_epochs", arguments["max_epochs"], 1, MOST_EPOCHS)
    for key in ("accumulate_grad_batches", "num_nodes"):
        check_range(f"trainer.{key}", arguments.get(key, 1), 1, MOST_EPOCHS)
    if arguments.get("gradient_clip_val") is not None:
        check_range("trainer.gradient_clip_val", arguments["gradient_clip_val"], 0)
    if check_setting(compile) == "reduce-overhead" and arguments["accumulate_grad_batches"] > 1:
        raise ConfigError(
            "trainer.compile=reduce-overhead overwrites the outputs of a step in the next one, and "
            "trainer.accumulate_grad_batches keeps them: choose trainer.compile=true"
        )
    _check_strategy(strategy)
    if str(precision) not in PRECISIONS:
        raise ConfigError(nearest(str(precision), PRECISIONS, "trainer.precision"))
    if precision == "auto":
        precision = choose_precision(accelerator)
    if sync_batchnorm == "auto":
        sync_batchnorm = wants_sync_batchnorm and torch.cuda.is_available() and accelerator != "cpu"
    try:
        return pl.Trainer(
            precision=precision,  # type: ignore[arg-type]
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            plugins=[*plugins, *_environment(devices)],
            sync_batchnorm=bool(sync_batchnorm),
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            **arguments,
            **(extra or {}),
        )
    except (
        ValueError,
        TypeError,
        RuntimeError,  # such as for inconsistent SLURM variables
        pl.utilities.exceptions.MisconfigurationException,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the trainer's settings do not work here: {reason}") from error


STRATEGIES = ("auto", "ddp")


def _check_strategy(name: str) -> None:
    if name in STRATEGIES:
        return
    if "fsdp" in name or "deepspeed" in name:
        raise ConfigError(
            f"trainer.strategy={name} splits weights between devices, but the momentum encoder and "
            "the frozen teacher need whole ones in each step: use ddp, and for larger networks "
            "backbone.checkpointing=true"
        )
    raise ConfigError(nearest(name, STRATEGIES, "trainer.strategy"))


def _environment(devices: int | str | list[int]) -> list[ClusterEnvironment]:
    """Return the plugin that makes Lightning start the processes, where SLURM has not.

    Lightning takes the variables of a SLURM job for those of tasks, and would wait for tasks that
    nobody started, or train on one device only. A single task on a single device keeps SLURM's
    plugin, which requeues jobs.
    """
    several = str(devices) != "1" and (devices != "auto" or torch.cuda.device_count() > 1)
    is_task = "SLURM_PROCID" in os.environ
    if started_by() is not None or not SLURMEnvironment.detect() or (is_task and not several):
        return []
    return [LightningEnvironment()]


def silence_lightning() -> None:
    """Silence Lightning's hints; this package prints what a user needs."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\..*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")


_log = logging.getLogger(__name__)
CHOICES = ("true", "false", "auto", "reduce-overhead")


def check_setting(setting: bool | str) -> str:
    """Return ``trainer.compile`` as one of ``CHOICES``, from its YAML value.

    Raises:
        ConfigError: For another value.
    """
    word = str(setting).lower()
    check_choice("trainer.compile", word, CHOICES)
    return word


def compile_if_wanted(module: nn.Module, setting: bool | str, device: torch.device) -> bool:
    """Compile a method's forward passes if requested and possible; else warn once with the reason.

    Args:
        module: A method, with ``compile_passes``.
        setting: ``true``, ``false``, ``auto`` (true on CUDA) or ``reduce-overhead`` (CUDA graphs).
        device: The device that it runs on.

    Returns:
        Whether it was compiled.

    Raises:
        ConfigError: For another setting.
    """
    word = check_setting(setting)
    if word == "false" or (word == "auto" and device.type != "cuda"):
        return False
    reason = _obstacle(module, device)
    if reason is not None:
        _log.warning("trainer.compile=%s: %s; continuing without it", word, reason)
        return False
    module.compile_passes(mode="reduce-overhead" if word == "reduce-overhead" else None)  # type: ignore[operator]
    return True


def _obstacle(module: nn.Module, device: torch.device) -> str | None:
    """Return why the module cannot be compiled on the device; None if it can."""
    if device.type == "cpu" and breaks_in_channels_last(module):
        # The compiler chooses the memory layout itself, and channels_last corrupts memory here.
        return "a network as narrow as this one is not safe in the layout that the compiler chooses"
    if any(getattr(part, "checkpointing", False) for part in module.modules()):
        return "it cannot be combined with backbone.checkpointing"
    try:
        torch.compile(_trial, dynamic=False)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:  # a compiler or Triton is missing
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the compiler does not work here ({first})"
    return None


def _trial(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.sin() * 2 + numbers
