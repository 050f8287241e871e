"""The encoder as a state dict of ``timm.create_model``, without its classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

from ssl_samix.backbones.resnet import ResNetTrunk
from ssl_samix.backbones.timm_trunk import TimmTrunk
from ssl_samix.errors import ConfigError
from ssl_samix.evaluation.checkpoint import Encoder
from ssl_samix.export.weights import call, check_width, with_stem_of, write_weights


def write(encoder: Encoder, path: Path) -> list[str]:
    """Write weights that timm's network takes with ``strict=True``.

    timm's ResNets have torchvision's parameter names. None of their stems is the one for small
    images: it takes two more lines, which are among those returned.

    Returns:
        Lines of Python that make the network, load the file and use it.

    Raises:
        ConfigError: If timm has no such network: a narrow ResNet, or a model of torchvision.
        UserError: If the features differ, or the file cannot be written.
    """
    trunk, name = encoder.backbone.trunk, encoder.backbone.name
    arguments: dict[str, Any] = {"num_classes": 0}
    if isinstance(trunk, TimmTrunk):
        arguments |= encoder.backbone.settings["options"]
        if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
            arguments["img_size"] = encoder.image_size
    elif not isinstance(trunk, ResNetTrunk):
        raise ConfigError(
            f"{name} is a model of torchvision, which timm does not have: "
            "choose format=torchvision, format=onnx or format=torch_export"
        )
    else:
        check_width(encoder, "timm")
    network = timm.create_model(name, pretrained=False, **arguments)
    lines = ["import timm", "import torch"]
    lines.append(f"model = {call('timm.create_model', name, **arguments)}")
    if isinstance(trunk, ResNetTrunk):
        lines += with_stem_of(trunk, network)
        source: nn.Module = trunk
    else:
        source = trunk.model
    return lines + write_weights(encoder, source, network, "timm", path)
