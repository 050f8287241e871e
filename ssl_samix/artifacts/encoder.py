"""Saving encoders and classifiers, and loading them from run folders, checkpoints or files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from ssl_samix.artifacts.checkpoints import (
    described_backbone,
    load_strictly,
    read_ours,
    renamed,
    write_ours,
)
from ssl_samix.artifacts.hub import is_remote
from ssl_samix.artifacts.run_folder import weights_file
from ssl_samix.data.images import fit, to_rgb
from ssl_samix.data.views import normalize
from ssl_samix.errors import CheckpointError, ConfigError, check_choice
from ssl_samix.files import expanded
from ssl_samix.models.backbone import Backbone

Channels = tuple[float, float, float]
# A supervised run has the first two, samix linear the last.
NETWORKS = ("online", "ema", "linear")
Network = Literal["online", "ema", "linear"]
# Prefix of backbone and head in a checkpoint of a supervised run -> in a classifier file.
IN_CHECKPOINT = {
    "backbone.": "online.0.",
    "projector.": "online.1.",
    "twin.module.0.": "ema.0.",
    "twin.module.1.": "ema.1.",
}


class Encoder(nn.Module):
    """A pretrained backbone with the preparation of its images.

    Attributes:
        feature_dim: Length of a feature vector.
        image_size: Side of the images it was trained on, in px.
        mean: Mean per channel that images are normalised with, for pixels in [0, 1].
        std: Standard deviation per channel, likewise.
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
        """Return any PIL image as the normalised (3, S, S) tensor that the encoder takes."""
        pixels = fit(to_rgb(image), self.image_size)
        return normalize(pixels[None], torch.tensor(self.mean), torch.tensor(self.std))[0]

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, S, S) to features (B, feature_dim)."""
        return self.backbone(images)


def save_encoder(path: Path, backbone: Backbone, meta: dict[str, Any]) -> None:
    """Write the weights of a backbone and its description as safetensors."""
    write_ours(path, backbone.state_dict(), meta)


@torch.inference_mode(False)  # weights created in inference mode cannot be trained
def load_encoder(run_or_checkpoint: str | os.PathLike[str]) -> Encoder:
    """Return a trained encoder, in eval mode.

    Args:
        run_or_checkpoint: A run folder (its ``encoder.safetensors``, or ``last.ckpt`` until the
            run ends), a checkpoint, an ``encoder.safetensors``, or ``hf://<user>/<name>``, which is
            downloaded from the Hugging Face hub.

    Returns:
        A module with ``feature_dim``, ``image_size``, ``mean`` and ``std``, mapping (B, 3, H, W) to
        (B, feature_dim).

    Raises:
        CheckpointError: If there is none, it is damaged, or its weights do not fit its description.
    """
    path = weights_file(run_or_checkpoint, "encoder.safetensors")
    meta, weights = read_ours(path, {"backbone.": ""})
    if not any(name.startswith("trunk.") for name in weights):
        raise CheckpointError(
            f"{path} holds no encoder: give the run folder, file or model that it was made from"
        )
    backbone = described_backbone(meta, path)
    load_strictly(backbone, weights, path, "backbone")
    return Encoder(backbone, meta)


class TrainedClassifier(Encoder):
    """An encoder with its linear head, its classes and the preparation of its images.

    Attributes:
        classes: Names of the classes, in the order of the logits.
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
    """Write one or more networks, each a backbone and a head, as safetensors."""
    states = {f"{name}.": network.state_dict() for name, network in networks.items()}
    weights = {prefix + key: t for prefix, state in states.items() for key, t in state.items()}
    write_ours(path, weights, meta)


def load_classifier(
    run_or_file: str | os.PathLike[str], network: Network | None = None
) -> TrainedClassifier:
    """Return a trained classifier, in eval mode.

    Args:
        run_or_file: A run folder of supervised training (its ``classifier.safetensors``, or
            ``last.ckpt`` until the run ends), a results folder of ``samix linear``, a
            checkpoint, or a ``classifier.safetensors``.
        network: The trained network (``online``), its moving average (``ema``), or the one that
            ``samix linear`` fitted (``linear``). None: the first of these in the file.

    Returns:
        A module with ``classes``, ``image_size``, ``mean`` and ``std``, mapping (B, 3, S, S) to
        logits (B, C).

    Raises:
        CheckpointError: If there is none, it is damaged, or its weights do not fit its description.
        ConfigError: For an unknown network, or one that the file does not have.
    """
    check_choice("network", network or NETWORKS[0], NETWORKS)
    path, meta, found = _networks(run_or_file)
    name: str = next(iter(found)) if network is None else network
    if name not in found:
        raise ConfigError(f"{path} holds no network={name}: it has {' and '.join(found)}")
    return _built(path, meta, name, found[name])


def load_classifiers(run_or_file: str | os.PathLike[str]) -> dict[str, TrainedClassifier]:
    """Return all networks of a classifier file, by name (``online``, ``ema``, ``linear``).

    Args:
        run_or_file: As ``load_classifier`` takes it.

    Raises:
        CheckpointError: As ``load_classifier``.
    """
    path, meta, found = _networks(run_or_file)
    return {name: _built(path, meta, name, weights) for name, weights in found.items()}


def _networks(
    given: str | os.PathLike[str],
) -> tuple[Path, dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return the classifier file, its description and the weights of each of its networks."""
    try:
        path = weights_file(given, "classifier.safetensors")
    except CheckpointError as error:
        raise _without(given) from error
    meta, weights = read_ours(path, IN_CHECKPOINT)
    found = {name: renamed(weights, {f"{name}.": ""}) for name in NETWORKS}
    found = {name: state for name, state in found.items() if state}
    if not meta.get("classes") or not found:
        raise _without(given)
    return path, meta, found


def _without(source: str | os.PathLike[str]) -> CheckpointError:
    given = source if is_remote(source) else expanded(source)
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
