"""Encoders and classifiers as files, and back from a run, a checkpoint or a file; strict, always."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from ssl_samix.artifacts.checkpoints import (
    META,
    described_backbone,
    load_strictly,
    read_checkpoint,
    read_safetensors,
)
from ssl_samix.artifacts.run_folder import RunFolder, weights_file
from ssl_samix.data.images import fit, to_rgb
from ssl_samix.data.views import normalize
from ssl_samix.errors import CheckpointError, ConfigError, check_choice
from ssl_samix.files import expanded, write_atomically
from ssl_samix.models.backbone import Backbone

Channels = tuple[float, float, float]


class Encoder(nn.Module):
    """A pretrained backbone that knows how its images are prepared.

    Attributes:
        feature_dim: Width of a feature.
        image_size: Side of the images it was trained on, in px.
        mean: Per channel, of pixels in [0, 1], that images are normalised with.
        std: Likewise.
    """

    def __init__(self, backbone: Backbone, meta: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.meta = meta
        self.feature_dim: int = backbone.feature_dim
        self.image_size: int = meta["image_size"]
        self.mean: Channels = tuple(meta["mean"])
        self.std: Channels = tuple(meta["std"])
        self.eval()

    def prepare(self, image: Image.Image) -> Tensor:
        """Turn any PIL image into the (3, S, S) tensor that the encoder reads."""
        pixels = fit(to_rgb(image), self.image_size)
        return normalize(pixels[None], torch.tensor(self.mean), torch.tensor(self.std))[0]

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, S, S) to features (B, feature_dim)."""
        return self.backbone(images)


def save_encoder(path: Path, backbone: Backbone, meta: dict[str, Any]) -> None:
    """Write the backbone's weights and its description as safetensors."""
    weights = {name: t.detach().cpu().contiguous() for name, t in backbone.state_dict().items()}
    text = {META: json.dumps(meta)}
    content = save(weights, metadata=text)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


@torch.inference_mode(False)  # weights that are made in it could never be trained
def load_encoder(run_or_checkpoint: str | os.PathLike[str]) -> Encoder:
    """Load an encoder in eval mode.

    Args:
        run_or_checkpoint: A run folder (its ``encoder.safetensors``, or ``last.ckpt`` while the run
            goes on), a checkpoint, or an ``encoder.safetensors``.

    Returns:
        A module with ``feature_dim``, ``image_size``, ``mean`` and ``std``, mapping (B, 3, H, W) to
        (B, feature_dim).

    Raises:
        CheckpointError: If there is none, it is damaged, or it does not fit what it says it is.
    """
    path = weights_file(run_or_checkpoint, "encoder.safetensors")
    meta, weights = read_safetensors(path) if path.suffix == ".safetensors" else _read_ours(path)
    if not any(name.startswith("trunk.") for name in weights):
        raise CheckpointError(
            f"{path} holds no encoder: give the run folder, file or model that it was made from"
        )
    backbone = described_backbone(meta, path)
    load_strictly(backbone, weights, path, "backbone")
    return Encoder(backbone, meta)


def _read_ours(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    checkpoint = read_checkpoint(path)
    prefix = "backbone."
    state: dict[str, Tensor] = checkpoint["state_dict"]
    weights = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    return checkpoint[META], weights


# Of a supervised run the first two, of samix linear the last.
NETWORKS = ("online", "ema", "linear")
Network = Literal["online", "ema", "linear"]
# Where both parts of a network are in a checkpoint of a supervised run.
IN_CHECKPOINT = {
    "online": {"backbone.": "0.", "projector.": "1."},
    "ema": {"twin.module.0.": "0.", "twin.module.1.": "1."},
}


class TrainedClassifier(Encoder):
    """An encoder with its linear head; it knows its classes and how its images are prepared.

    Attributes:
        classes: Their names, in the order of the logits.
        network: ``online``, the network that was trained, ``ema``, its moving average, or
            ``linear``, a frozen encoder with the logistic regression fitted on its features.
    """

    def __init__(self, backbone: Backbone, head: nn.Linear, meta: dict[str, Any]) -> None:
        super().__init__(backbone, meta)
        self.head = head.eval()
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.network: str = meta["network"]

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, S, S) to logits (B, C)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def save_classifier(path: Path, networks: dict[str, nn.Module], meta: dict[str, Any]) -> None:
    """Write networks of backbone and head, by their names, as safetensors."""
    weights = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    content = save(weights, metadata={META: json.dumps(meta)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_classifier(
    run_or_file: str | os.PathLike[str], network: Network | None = None
) -> TrainedClassifier:
    """Load a classifier in eval mode.

    Args:
        run_or_file: A run folder of supervised training (its ``classifier.safetensors``, or
            ``last.ckpt`` while the run goes on), a results folder of ``samix linear``, a
            checkpoint, or a ``classifier.safetensors``.
        network: The one that was trained (``online``), its moving average (``ema``), or the one
            that ``samix linear`` fitted (``linear``). None: the first of them that is there.

    Returns:
        A module with ``classes``, ``image_size``, ``mean`` and ``std``, mapping (B, 3, S, S) to
        logits (B, C).

    Raises:
        CheckpointError: If there is none, it is damaged, or it does not fit what it says it is.
        ConfigError: For an unknown network, or one that the file does not have.
    """
    check_choice("network", network or NETWORKS[0], NETWORKS)
    path, meta, found = _read(expanded(run_or_file))
    name: str = next(iter(found)) if network is None else network
    if name not in found:
        raise ConfigError(f"{path} holds no network={name}: it has {' and '.join(found)}")
    return _built(path, meta, name, found[name])


def load_classifiers(run_or_file: str | os.PathLike[str]) -> dict[str, TrainedClassifier]:
    """Load every network of a classifier, by its name.

    Args:
        run_or_file: As ``load_classifier`` takes it.

    Raises:
        CheckpointError: As ``load_classifier``.
    """
    path, meta, found = _read(expanded(run_or_file))
    return {name: _built(path, meta, name, weights) for name, weights in found.items()}


def _read(given: Path) -> tuple[Path, dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Find the file, and read its description and the weights of each of its networks."""
    path = given
    if path.is_dir():
        run = RunFolder(path)
        path = run.classifier if run.classifier.exists() else run.last
        if not path.exists():
            raise _without(given)
    meta, found = _from_file(path) if path.suffix == ".safetensors" else _from_checkpoint(path)
    if not meta.get("classes") or not found:
        raise _without(given)
    return path, meta, found


def _without(given: Path) -> CheckpointError:
    return CheckpointError(
        f"{given} holds no classifier: fit one on its encoder with samix linear run={given}, then "
        "give run=<the results folder that it prints>"
    )


def _built(
    path: Path, meta: dict[str, Any], name: str, weights: dict[str, Tensor]
) -> TrainedClassifier:
    backbone = described_backbone(meta, path)
    head = nn.Linear(backbone.feature_dim, len(meta["classes"]))
    load_strictly(nn.Sequential(backbone, head), weights, path, "classifier")
    return TrainedClassifier(backbone, head, {**meta, "network": name})


def _from_file(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    meta, weights = read_safetensors(path)
    return meta, _by_network(weights, {name: {f"{name}.": ""} for name in NETWORKS})


def _from_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    checkpoint = read_checkpoint(path)
    return checkpoint[META], _by_network(checkpoint["state_dict"], IN_CHECKPOINT)


def _by_network(
    weights: dict[str, Tensor], names: dict[str, dict[str, str]]
) -> dict[str, dict[str, Tensor]]:
    """Sort weights by network, and leave out the networks that are not there."""
    found = {name: _renamed(weights, parts) for name, parts in names.items()}
    return {name: state for name, state in found.items() if state}


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Take the weights whose names begin in one way, and let them begin in another."""
    return {
        new + key.removeprefix(old): tensor
        for old, new in names.items()
        for key, tensor in weights.items()
        if key.startswith(old)
    }
