"""Whether passes are compiled, and what a machine that cannot does instead."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ssl_samix.backbones.layout import breaks_in_channels_last
from ssl_samix.errors import check_choice

_log = logging.getLogger(__name__)
CHOICES = ("true", "false", "auto", "reduce-overhead")


def check_setting(setting: bool | str) -> str:
    """Return ``trainer.compile`` as one of ``CHOICES``.

    Raises:
        ConfigError: For another value.
    """
    word = str(setting).lower()
    check_choice("trainer.compile", word, CHOICES)
    return word


def compile_if_wanted(module: nn.Module, setting: bool | str, device: torch.device) -> bool:
    """Compile a method's passes if that is wanted and works here; else say why not, once.

    Args:
        module: A method, with ``compile_passes``.
        setting: ``true``, ``false``, ``auto`` (true on CUDA) or ``reduce-overhead`` (CUDA graphs).
        device: What it runs on.

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
        _log.warning("trainer.compile=%s: %s; the run goes on without", word, reason)
        return False
    module.compile_passes(mode="reduce-overhead" if word == "reduce-overhead" else None)  # type: ignore[operator]
    return True


def _obstacle(module: nn.Module, device: torch.device) -> str | None:
    """Say what keeps the module from being compiled on the device; None if nothing does."""
    if device.type == "cpu" and breaks_in_channels_last(module):
        # The compiler lays convolutions out as it likes, and this layout corrupts memory.
        return "a network as narrow as this one is not safe in the layout that the compiler chooses"
    if any(getattr(part, "checkpointing", False) for part in module.modules()):
        return "it does not go together with backbone.checkpointing"
    try:
        torch.compile(_trial, dynamic=False)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:  # a compiler or Triton is missing
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the compiler does not work here ({first})"
    return None


def _trial(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.sin() * 2 + numbers
