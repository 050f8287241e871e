"""Which parameters are optimised how."""

from __future__ import annotations

from typing import Any

from torch import nn

MIXER = "mixing."  # prefix of what mixes


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: encoder, what of it is not decayed, and mixer.

    Matrices are decayed, biases and normalisation are not, nor is the mixer. lightly's LARS also
    leaves groups without decay unscaled, as SimCLR and BYOL ask for.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    encoder = [p for name, p in trainable if not name.startswith(MIXER)]
    groups: list[dict[str, Any]] = [
        {
            "name": "encoder",
            "params": [p for p in encoder if p.ndim > 1],
            "weight_decay": weight_decay,
        },
        {"name": "no_decay", "params": [p for p in encoder if p.ndim <= 1], "weight_decay": 0.0},
        {
            "name": "mixer",
            "params": [p for name, p in trainable if name.startswith(MIXER)],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
