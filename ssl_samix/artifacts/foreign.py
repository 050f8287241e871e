"""Weights from elsewhere: published ones of torchvision and timm, and files of state dicts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_samix.artifacts import layouts
from ssl_samix.artifacts.checkpoints import load_plain
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.resnet import RESNETS

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
        prefix: What its entries begin with, as ``module.encoder_q.``, or the end of that; None:
            found out.
        image_size: Side of its images, in px. Position tables of another size are interpolated.

    Raises:
        ConfigError: If the name is missing or unknown.
        CheckpointError: If the file is damaged or does not fit.
    """
    weights = read_weights(path)
    if name is None:
        raise ConfigError(
            f"{path} does not say whose weights it holds: give model=<name>{_hint(weights)}"
        )
    prefix = f"{prefix.rstrip('.')}." if prefix else None
    backbone = _empty(name, weights, prefix, image_size, path)
    fit = _the_one(path, backbone, weights, prefix)
    for what in fit.resampled:
        _log.warning("%s: %s, for images of %d px", path, what, image_size)
    load_strictly(backbone, fit.weights, str(path))
    return backbone


def _empty(
    name: str, weights: dict[str, Tensor], prefix: str | None, image_size: int, path: Path
) -> Backbone:
    """Build the model, with what its name does not say and its weights show."""
    if name in RESNETS:
        kernel = layouts.first_kernel(weights, prefix) or layouts.first_kernel(weights, None)
        if kernel is None:
            raise CheckpointError(
                f"{path} holds no ResNet: it has no conv1.weight of 3 channels{_hint(weights)}"
            )
        return Backbone(name, image_size, kernel[0], "small" if kernel[1] == 3 else "standard")
    # MoCo v3's ViT-S has twice the heads of everybody else's, which no shape shows.
    theirs = any(k.endswith("base_encoder.patch_embed.proj.weight") for k in weights)
    if theirs and name.partition(".")[0] == "vit_small_patch16_224":
        _log.info("%s: 12 heads, as MoCo v3 has them", name)
        return Backbone(name, image_size, options={"num_heads": 12})
    return Backbone(name, image_size)


def _the_one(
    path: Path, backbone: Backbone, weights: dict[str, Tensor], prefix: str | None
) -> layouts.Fit:
    found = layouts.find(_model(backbone), weights)
    fitting = [fit for fit in found if fit.problem is None]
    if not fitting:
        total = len(_model(backbone).state_dict())
        problem, matched = (found[0].problem, found[0].matched) if found else ("", 0)
        raise CheckpointError(
            f"{path} does not fit {backbone.name}: {problem or 'it has none of its names'} "
            f"({matched} of {total} found){_hint(weights)}"
        )
    asked = [fit for fit in fitting if f".{fit.prefix}".endswith(f".{prefix or ''}")]
    left = layouts.choose(asked if prefix else fitting)
    if len(left) != 1:
        problem = "several encoders" if left else f"no {backbone.name} under prefix={prefix}"
        known = " or ".join(sorted(fit.prefix for fit in left or fitting))
        raise CheckpointError(f"{path} holds {problem}: give prefix=<{known}>")
    return left[0]


def _hint(weights: dict[str, Tensor]) -> str:
    """Say what was found in a file, and which model it is."""
    some, rest = ", ".join(list(weights)[:3]), len(weights) - 3
    found = f"; the file has {some}" + (f" and {rest} more" if rest > 0 else "")
    model = layouts.model_for(weights)
    return f"{found}, which fit model={model}" if model else found


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights, of any origin, nested or not.

    Returns:
        The tensors; names of nested dicts are joined by dots.

    Raises:
        CheckpointError: If it is damaged, would run code, or holds no weights.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file") from error
    tensors = layouts.flatten(load_plain(path))
    if not tensors:
        raise CheckpointError(f"{path} holds no weights")
    return tensors


def _inside(backbone: Backbone) -> str:
    """Return what our own state has before the names of the library."""
    return "trunk." if backbone.name in RESNETS else "trunk.model."


def _model(backbone: Backbone) -> nn.Module:
    return backbone.get_submodule(_inside(backbone).rstrip("."))


def load_strictly(backbone: Backbone, weights: dict[str, Tensor], what: str) -> None:
    """Load weights under the library's names; only heads may be left over.

    Raises:
        CheckpointError: If an entry is missing, has another shape, or is unknown.
    """
    model = _model(backbone)
    state = model.state_dict()
    problem = layouts.misfit(state, weights)
    if problem is not None:
        raise CheckpointError(f"{what} does not fit {backbone.name}: {problem}")
    left = sorted(weights.keys() - state.keys())
    if left:
        _log.info("not loaded, being of heads: %s", ", ".join(left))
    # Updated, so that counters of BatchNorm, which old files are without, keep their values, and
    # the state the versions of its modules.
    state.update((k, weights[k]) for k in weights.keys() & state.keys())
    model.load_state_dict(state, strict=True)
