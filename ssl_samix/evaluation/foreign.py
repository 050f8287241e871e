"""Weights from elsewhere: published ones of torchvision and timm, and files of state dicts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.backbones.resnet import RESNETS
from ssl_samix.checkpoint_io import load_plain
from ssl_samix.errors import CheckpointError, ConfigError

NESTED = ("state_dict", "model", "model_state_dict", "teacher", "net")  # keys that hold weights
CLASSIFIER = ("fc.", "head.", "heads.", "classifier.")  # what an encoder does without
TWINS = ("encoder_k.", "momentum_", "teacher.", "target_", "key_encoder")  # averaged copies
UNPUBLISHED = "no published weights are known for '{}': give weights=random"
_log = logging.getLogger(__name__)


def published(name: str, image_size: int | None) -> tuple[Backbone, dict[str, Any]]:
    """Build a model with its published weights, downloaded if they are not on this machine.

    Returns:
        The backbone, and what describes it: image_size, mean and std of its own evaluation.

    Raises:
        ConfigError: If nobody publishes weights under that name.
        CheckpointError: If they cannot be fetched.
    """
    try:
        weights, meta = (_torchvisions if name in RESNETS else _timms)(name)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"the weights of {name} cannot be fetched: {reason}") from error
    meta["image_size"] = image_size or meta["image_size"]
    backbone = Backbone(name, meta["image_size"], stem="standard")
    load_strictly(backbone, weights, f"the published {name}")
    return backbone, meta


def _torchvisions(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import torchvision

    if name not in torchvision.models.list_models():
        raise ConfigError(UNPUBLISHED.format(name))
    weights = torchvision.models.get_model_weights(name).DEFAULT
    shown = weights.transforms()
    meta = {
        "image_size": shown.crop_size[0],
        "mean": list(shown.mean),
        "std": list(shown.std),
        "weights": str(weights),
    }
    return dict(weights.get_state_dict(progress=True, check_hash=True)), meta


def _timms(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import timm

    if not timm.is_model(name) or not timm.is_model_pretrained(name):
        raise ConfigError(UNPUBLISHED.format(name))
    model = timm.create_model(name, pretrained=True, num_classes=0)
    shown = model.pretrained_cfg
    meta = {
        "image_size": shown["input_size"][-1],
        "mean": list(shown["mean"]),
        "std": list(shown["std"]),
        "weights": shown.get("hf_hub_id") or shown.get("url") or name,
    }
    return model.state_dict(), meta


def from_file(path: Path, name: str | None, prefix: str | None, image_size: int) -> Backbone:
    """Build a model and load a file of its weights, with torchvision's or timm's names in it.

    Args:
        path: Written by ``torch.save`` or as safetensors.
        name: The model's name.
        prefix: What its entries begin with, as ``module.encoder_q.``; None: found out.
        image_size: Side of its images, in px.

    Raises:
        ConfigError: If the name is missing or unknown.
        CheckpointError: If the file is damaged or does not fit.
    """
    weights = read_weights(path)
    if name is None:
        raise ConfigError(f"{path} does not say whose weights it holds: give model=<name>")
    if name not in RESNETS:
        backbone = Backbone(name, image_size)
        load_strictly(backbone, _without_prefix(backbone, weights, prefix, path), str(path))
        return backbone
    # A ResNet's first kernel says how wide it is, and which stem it has.
    width, side = _first_kernel(weights, prefix, path)
    backbone = Backbone(name, image_size, width, "small" if side == 3 else "standard")
    load_strictly(backbone, _without_prefix(backbone, weights, prefix, path), str(path))
    return backbone


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights, of any origin.

    Raises:
        CheckpointError: If it is damaged, would run code, or holds no weights.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file") from error
    found = load_plain(path)
    while isinstance(found, Mapping):
        inner = next((found[k] for k in NESTED if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    tensors = isinstance(found, Mapping) and {
        k: v for k, v in found.items() if isinstance(v, torch.Tensor)
    }
    if not tensors:
        raise CheckpointError(f"{path} holds no weights")
    return tensors


def _first_kernel(weights: dict[str, Tensor], prefix: str | None, path: Path) -> tuple[int, int]:
    kernels = [k for k in weights if k.endswith("conv1.weight") and "layer" not in k]
    own = [k for k in kernels if k.startswith(prefix or "")]
    if not own:
        raise CheckpointError(f"{path} holds no ResNet: it has no conv1.weight")
    return weights[own[0]].shape[0], weights[own[0]].shape[-1]


def _inside(backbone: Backbone) -> str:
    """Return what our own state has before the names of the library."""
    return "trunk." if backbone.name in RESNETS else "trunk.model."


def _without_prefix(
    backbone: Backbone, weights: dict[str, Tensor], prefix: str | None, path: Path
) -> dict[str, Tensor]:
    wanted = {k.removeprefix(_inside(backbone)) for k in backbone.state_dict()}
    if prefix is None:
        first = sorted(wanted)[0]
        complete = [k.removesuffix(first) for k in weights if k.endswith(first)]
        complete = [p for p in complete if all(p + k in weights for k in wanted)]
        if len(complete) > 1:  # a momentum encoder is saved beside the encoder
            complete = [p for p in complete if not any(t in p for t in TWINS)] or complete
        if len(complete) > 1:
            raise CheckpointError(
                f"{path} holds several encoders: give prefix=<{' or '.join(sorted(complete))}>"
            )
        prefix = complete[0] if complete else ""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def load_strictly(backbone: Backbone, weights: dict[str, Tensor], what: str) -> None:
    """Load weights under the library's names; only a classifier may be left over.

    Raises:
        CheckpointError: If an entry is missing, has another shape, or is unknown.
    """
    inside = _inside(backbone)
    wanted = {k.removeprefix(inside): v for k, v in backbone.state_dict().items()}
    missing = sorted(wanted.keys() - weights.keys())
    unknown = sorted(k for k in weights.keys() - wanted.keys() if not k.startswith(CLASSIFIER))
    other = sorted(k for k in wanted.keys() & weights.keys() if wanted[k].shape != weights[k].shape)
    for names, problem in ((missing, "lacks"), (unknown, "also has"), (other, "has another")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{what} does not fit {backbone.name}: it {problem} {names[0]}{more}"
            )
    left = sorted(weights.keys() - wanted.keys())
    if left:
        _log.info("not loaded, being a classifier's: %s", ", ".join(left))
    backbone.load_state_dict({inside + k: weights[k] for k in wanted}, strict=True)
