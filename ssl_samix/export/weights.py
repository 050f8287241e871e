"""State dicts that other libraries' constructors take."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_samix.backbones.resnet import ResNetTrunk
from ssl_samix.errors import ConfigError
from ssl_samix.evaluation.checkpoint import Encoder
from ssl_samix.export.same import check_same
from ssl_samix.files import write_atomically

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
