"""The encoder as a state dict that torchvision's or timm's constructors take."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from ssl_samix.artifacts.encoder import Encoder
from ssl_samix.artifacts.export_graph import check_same
from ssl_samix.errors import ConfigError
from ssl_samix.files import write_atomically
from ssl_samix.models.libraries import TimmTrunk, TorchvisionTrunk
from ssl_samix.models.resnet import ResNetTrunk

PUBLISHED_WIDTH = 64  # of every ResNet that the libraries build


def write_weights(
    encoder: Encoder, source: nn.Module, network: nn.Module, kind: str, path: Path
) -> list[str]:
    """Write a state dict that ``torch.load`` reads with ``weights_only=True``.

    Args:
        encoder: Whose features are compared.
        source: The part of it that has the library's parameter names.
        network: Made by the library's constructor; it takes the weights, strictly.
        kind: The format, as its user writes it.
        path: The file.

    Returns:
        Lines of Python that load the file into ``model`` and use it.

    Raises:
        UserError: If the features differ, or the file cannot be written.
    """
    buffer = io.BytesIO()
    # Not made a plain dict: some networks look for the version that an OrderedDict carries along.
    torch.save(source.state_dict(), buffer)
    content = buffer.getvalue()
    network.load_state_dict(torch.load(io.BytesIO(content), weights_only=True), strict=True)
    check_same(encoder, network.eval(), kind)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return [
        f"model.load_state_dict(torch.load({str(path)!r}, weights_only=True))",
        "features = model.eval()(images)",
    ]


def check_width(encoder: Encoder, library: str) -> None:
    """Refuse a ResNet of a width that no other library builds.

    Raises:
        ConfigError: With the formats that take it.
    """
    name, width = encoder.backbone.name, encoder.backbone.settings["width"]
    if width != PUBLISHED_WIDTH:
        raise ConfigError(
            f"{library} builds {name} with a width of {PUBLISHED_WIDTH} only, and this encoder's "
            f"is {width}: choose format=onnx or format=torch_export"
        )


def with_stem_of(trunk: ResNetTrunk, network: nn.Module) -> list[str]:
    """Give a library's ResNet the stem for small images if ``trunk`` has it, and say how."""
    if isinstance(trunk.maxpool, nn.MaxPool2d):
        return []
    network.conv1 = nn.Conv2d(3, PUBLISHED_WIDTH, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return [
        f"model.conv1 = torch.nn.Conv2d(3, {PUBLISHED_WIDTH}, 3, padding=1, bias=False)",
        "model.maxpool = torch.nn.Identity()",
    ]


def call(function: str, *positional: str, **named: Any) -> str:
    """Write a call in Python."""
    arguments = [*map(repr, positional), *(f"{key}={value!r}" for key, value in named.items())]
    return f"{function}({', '.join(arguments)})"


def write_timm(encoder: Encoder, path: Path) -> list[str]:
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


def write_torchvision(encoder: Encoder, path: Path) -> list[str]:
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
