"""Encoders as a run leaves them, without a run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_samix.artifacts.encoder import save_encoder
from ssl_samix.artifacts.export import export, parse_export
from ssl_samix.config.compose import quoted
from ssl_samix.models.backbone import Backbone

# A ResNet's two stems, a transformer of timm, and a network of torchvision that is no ResNet.
ENCODERS = {
    "standard": {"name": "resnet18", "image_size": 64},
    "resnet50": {"name": "resnet50", "image_size": 64},
    "small": {"name": "resnet18", "image_size": 32},
    "small resnet10": {"name": "resnet10", "image_size": 32},
    "narrow": {"name": "resnet18", "image_size": 32, "width": 8},
    "narrow_standard": {"name": "resnet18", "image_size": 64, "width": 8},
    "wide resnet10": {"name": "resnet10", "image_size": 32, "width": 80},
    "narrow resnet50": {"name": "resnet50", "image_size": 64, "width": 16},
    "narrow resnext": {"name": "resnext50_32x4d", "image_size": 32, "width": 16},
    "vit": {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "options": {"patch_size": 8, "depth": 2},
    },
    "timm": {"name": "mobilenetv3_small_050", "image_size": 64},
    "torchvision": {"name": "mobilenet_v3_small", "image_size": 64},
    "squeezenet": {"name": "squeezenet1_1", "image_size": 64},
    "googlenet": {"name": "googlenet", "image_size": 64},
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def backbone_and_meta(kind):
    torch.manual_seed(1)
    backbone = Backbone(**ENCODERS[kind])
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that nobody can confuse with a batch's
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    meta = {
        "method": "moco",
        "backbone": backbone.settings,
        "image_size": ENCODERS[kind]["image_size"],
        "mean": MEAN,
        "std": STD,
    }
    return backbone, meta


def saved(folder, kind):
    """Write an encoder into a folder and return the folder."""
    folder.mkdir(exist_ok=True)
    save_encoder(folder / "encoder.safetensors", *backbone_and_meta(kind))
    return folder


def exported(run, name, **more):
    """Export, by the words of a command line."""
    paths = {"run": run, **more}
    words = [f"{key}={quoted(str(path))}" for key, path in paths.items()]
    return export(parse_export([f"format={name}", *words]))


@pytest.fixture
def run(tmp_path):
    """A run folder with a ResNet of a width that is no other library's."""
    return saved(tmp_path / "a run, (1)=x", "narrow")
