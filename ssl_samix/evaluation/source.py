"""Loading the encoder to evaluate: one of this package, a foreign, published or untrained one."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ssl_samix.artifacts import foreign
from ssl_samix.artifacts.checkpoints import is_ours
from ssl_samix.artifacts.description import check_images
from ssl_samix.artifacts.encoder import Encoder, load_encoder
from ssl_samix.errors import ConfigError
from ssl_samix.evaluation.request import Origin
from ssl_samix.models.backbone import Backbone


def load_source(
    origin: Origin, config: DictConfig, image_size: int, mean: Any, std: Any
) -> Encoder:
    """Load the encoder named by a configuration.

    Args:
        origin: Origin of the encoder.
        config: Keys ``weights``, ``model``, ``prefix``, ``image_size``, ``mean``, ``std`` and
            ``seed``.
        image_size: Image side of the data in px, used for a model without weights.
        mean: Mean of the data, likewise.
        std: Standard deviation of the data, likewise.

    Raises:
        UserError: If the encoder does not exist or is damaged, or its input format is unknown.
    """
    own = {k: config[k] for k in ("image_size", "mean", "std") if config[k] is not None}
    check_images(own)
    if origin.path is None:
        encoder = _model(origin.given, config, {"image_size": image_size, "mean": mean, "std": std})
    elif origin.path.is_dir() or is_ours(origin.path):
        encoder = load_encoder(origin.path)
    else:
        encoder = _from_file(origin, config, own)
    if origin.path is not None and config.weights == "pretrained":
        raise ConfigError("weights=pretrained is for the name of a model, and run names a file")
    if origin.path is not None and config.weights == "random":
        encoder = untrained(encoder, config.seed)
    return _with(encoder, own)


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """Return the same network with random initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Backbone(image_size=encoder.image_size, **encoder.meta["backbone"])
    return Encoder(fresh, encoder.meta)


def _with(encoder: Encoder, own: dict[str, Any]) -> Encoder:
    """Return the encoder with the user's image settings, where they differ from its own."""
    changed = {k: v if k == "image_size" else list(v) for k, v in own.items()}
    if all(encoder.meta.get(k) == v for k, v in changed.items()):
        return encoder
    meta = {**encoder.meta, **changed}
    backbone = Backbone(image_size=meta["image_size"], **meta["backbone"])
    try:
        backbone.load_state_dict(encoder.backbone.state_dict(), strict=True)
    except RuntimeError as error:  # a transformer's position embedding
        raise ConfigError(
            f"these weights take images of {encoder.image_size} px only, not {meta['image_size']}"
        ) from error
    return Encoder(backbone, meta)


def _from_file(origin: Origin, config: DictConfig, own: dict[str, Any]) -> Encoder:
    assert origin.path is not None
    unknown = [key for key in ("image_size", "mean", "std") if key not in own]
    if config.model is not None and unknown:
        raise ConfigError(
            f"{origin.path} does not say which images it was trained on: give "
            "image_size=<px> mean=[r,g,b] std=[r,g,b] (of pixels in 0..1)"
        )
    backbone = foreign.from_file(
        origin.path, config.model, config.prefix, int(own.get("image_size", 224))
    )
    return Encoder(backbone, _meta(backbone, own, origin.path.name))


def _model(name: str, config: DictConfig, data: dict[str, Any]) -> Encoder:
    if config.weights == "pretrained":
        backbone, meta = foreign.published(name, config.image_size)
        return Encoder(backbone, {**_meta(backbone, meta, name), "weights": meta["weights"]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        size = config.image_size or data["image_size"]
        backbone = Backbone(name, size)
    return Encoder(backbone, _meta(backbone, {**data, "image_size": size}, name))


def _meta(backbone: Backbone, images: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "method": name,
        "backbone": backbone.settings,
        "feature_dim": backbone.feature_dim,
        "image_size": images["image_size"],
        "mean": list(images["mean"]),
        "std": list(images["std"]),
    }


def fingerprint(module: nn.Module) -> str:
    """Return a fingerprint of the weights and statistics: 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
