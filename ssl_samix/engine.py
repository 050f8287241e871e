"""PyTorch Lightning's trainer, with what the hardware offers."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from ssl_samix.backbones.layout import breaks_in_channels_last
from ssl_samix.compiling import check_setting
from ssl_samix.errors import ConfigError, check_range, nearest

MOST_EPOCHS = 10**6
PRECISIONS = ("auto", "32", "32-true", "bf16-mixed", "16-mixed")  # weights are always float32


def choose_precision(accelerator: str = "auto") -> str:
    """Return the fastest precision that the hardware has units for.

    On a CPU without bfloat16 instructions autocast would be slower than float32, by far.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(False) else "16-mixed"
    if accelerator in ("auto", "mps", "gpu") and torch.backends.mps.is_available():
        return "32-true"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16-mixed" if native else "32-true"


def memory_format(module: nn.Module) -> torch.memory_format:
    """Return the faster layout that is safe for the module: channels_last, or contiguous."""
    return torch.contiguous_format if breaks_in_channels_last(module) else torch.channels_last


def build_trainer(
    *,
    precision: str,
    accelerator: str,
    devices: int | str | list[int],
    sync_batchnorm: bool | str,
    wants_sync_batchnorm: bool,
    compile: bool | str = False,
    **arguments: Any,
) -> pl.Trainer:
    """Build the trainer from its configuration.

    Args:
        precision: Lightning's name of it, or ``auto``.
        accelerator: Lightning's.
        devices: Lightning's.
        sync_batchnorm: true, false or ``auto``.
        wants_sync_batchnorm: What ``auto`` means for this method; only GPUs can do it.
        compile: Checked here; ``compiling.compile_if_wanted`` does it.
        **arguments: Further arguments of ``pytorch_lightning.Trainer``.

    Raises:
        ConfigError: If Lightning does not know the settings, or the hardware is not there.
    """
    quieten()
    check_range("trainer.max_epochs", arguments["max_epochs"], 1, MOST_EPOCHS)
    for key in ("accumulate_grad_batches", "num_nodes"):
        check_range(f"trainer.{key}", arguments.get(key, 1), 1, MOST_EPOCHS)
    if arguments.get("gradient_clip_val") is not None:
        check_range("trainer.gradient_clip_val", arguments["gradient_clip_val"], 0)
    check_setting(compile)
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
            sync_batchnorm=bool(sync_batchnorm),
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            **arguments,
        )
    except (
        ValueError,
        TypeError,
        RuntimeError,  # as for SLURM's variables that do not fit
        pl.utilities.exceptions.MisconfigurationException,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the trainer's settings do not work here: {reason}") from error


def quieten() -> None:
    """Keep Lightning's hints off the screen: what a user needs is said once, by this package."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\..*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
