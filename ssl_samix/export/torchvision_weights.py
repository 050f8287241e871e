"""The encoder as a state dict of ``torchvision.models``, without its classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from ssl_samix.backbones.resnet import ResNetTrunk
from ssl_samix.backbones.torchvision_trunk import TorchvisionTrunk
from ssl_samix.errors import ConfigError
from ssl_samix.evaluation.checkpoint import Encoder
from ssl_samix.export.weights import call, check_width, with_stem_of, write_weights


def write(encoder: Encoder, path: Path) -> list[str]:
    """Write weights that torchvision's network takes with ``strict=True``.

    A ResNet with the stem for small images takes two more lines, which are among those returned.

    Returns:
        Lines of Python that make the network, load the file and use it.

    Raises:
        ConfigError: If torchvision has no such network: a narrow ResNet, or a model of timm.
        UserError: If the features differ, or the file cannot be written.
    """
    trunk, name = encoder.backbone.trunk, encoder.backbone.name
    arguments: dict[str, Any] = {}
    if isinstance(trunk, ResNetTrunk):
        check_width(encoder, "torchvision")
    elif not isinstance(trunk, TorchvisionTrunk):
        raise ConfigError(
            f"{name} is a model of timm, whose weights torchvision does not take: "
            "choose format=timm, format=onnx or format=torch_export"
        )
    if name == "googlenet":  # the published one has classifiers inside, an encoder has none
        arguments = {"aux_logits": False, "init_weights": False}
    network = torchvision.models.get_model(name, weights=None, **arguments)
    lines = ["import torch", "import torchvision"]
    lines.append(f"model = {call(f'torchvision.models.{name}', **arguments)}")
    if isinstance(trunk, ResNetTrunk):
        lines += with_stem_of(trunk, network)
        source: nn.Module = trunk
    else:
        source = trunk.model
    lines.append(_without_classifier(network))
    return lines + write_weights(encoder, source, network, "torchvision", path)


def _without_classifier(network: nn.Module) -> str:
    """Replace the last linear layer, as the encoder's own network did, and say how."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:  # SqueezeNet
        network.classifier = nn.AdaptiveAvgPool2d(1)
        return "model.classifier = torch.nn.AdaptiveAvgPool2d(1)"
    parent, _, child = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in linear[-1].split(".")]
    return f"model{''.join(parts)} = torch.nn.Identity()"
