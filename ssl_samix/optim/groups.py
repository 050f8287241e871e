"""Which parameters are optimised how."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices are decayed, biases and normalisation are not.

    lightly's LARS also leaves groups without decay unscaled, as SimCLR and BYOL ask for.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": "encoder", "params": [p for p in trainable if p.ndim > 1]},
        {"name": "no_decay", "params": [p for p in trainable if p.ndim <= 1]},
    ]
    for group, decay in zip(groups, (weight_decay, 0.0), strict=True):
        group["weight_decay"] = decay
    return [group for group in groups if group["params"]]
