"""From a run, a checkpoint or an exported file back to the encoder; strict, always."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
from ssl_samix.artifacts.run_folder import weights_file
from ssl_samix.data.images import fit, to_rgb
from ssl_samix.data.views import normalize
from ssl_samix.errors import CheckpointError
from ssl_samix.files import write_atomically
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
