"""A trained classifier, as a file and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor, nn

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.checkpoint_io import META, read_checkpoint, read_safetensors
from ssl_samix.errors import CheckpointError, check_choice
from ssl_samix.evaluation.checkpoint import Encoder
from ssl_samix.files import write_atomically
from ssl_samix.run_folder import RunFolder

NETWORKS = ("online", "ema")
# Where both parts of a network are in a checkpoint of a run.
IN_CHECKPOINT = {
    "online": {"backbone.": "0.", "projector.": "1."},
    "ema": {"twin.module.0.": "0.", "twin.module.1.": "1."},
}


class TrainedClassifier(Encoder):
    """An encoder with its linear head; it knows its classes and how its images are prepared.

    Attributes:
        classes: Their names, in the order of the logits.
        network: ``online``, the network that was trained, or ``ema``, its moving average.
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
    run_or_file: str | os.PathLike[str], network: Literal["online", "ema"] = "online"
) -> TrainedClassifier:
    """Load a classifier in eval mode.

    Args:
        run_or_file: A run folder of supervised training (its ``classifier.safetensors``, or
            ``last.ckpt`` while the run goes on), a checkpoint, or a ``classifier.safetensors``.
        network: The one that was trained, or its moving average.

    Returns:
        A module with ``classes``, ``image_size``, ``mean`` and ``std``, mapping (B, 3, S, S) to
        logits (B, C).

    Raises:
        CheckpointError: If there is none, it is damaged, or it does not fit what it says it is.
        ConfigError: For an unknown network.
    """
    check_choice("network", network, NETWORKS)
    path = Path(run_or_file)
    if path.is_dir():
        run = RunFolder(path)
        path = run.classifier if run.classifier.exists() else run.last
        if not path.exists():
            raise CheckpointError(f"{run.path} holds no classifier.safetensors and no last.ckpt")
    ours = path.suffix == ".safetensors"
    meta, weights = _from_file(path, network) if ours else _from_checkpoint(path, network)
    if "classes" not in meta or not weights:
        raise CheckpointError(
            f"{path} holds no classifier: samix supervised trains one, samix linear fits one on "
            "an encoder"
        )
    backbone = Backbone(image_size=meta["image_size"], **meta["backbone"])
    whole = nn.Sequential(backbone, nn.Linear(backbone.feature_dim, len(meta["classes"])))
    try:
        whole.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit the classifier it names: {reason}") from error
    return TrainedClassifier(backbone, whole[1], {**meta, "network": network})  # type: ignore[arg-type]


def _from_file(path: Path, network: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    meta, weights = read_safetensors(path)
    return meta, _renamed(weights, {f"{network}.": ""})


def _from_checkpoint(path: Path, network: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    checkpoint = read_checkpoint(path)
    return checkpoint[META], _renamed(checkpoint["state_dict"], IN_CHECKPOINT[network])


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Take the weights whose names begin in one way, and let them begin in another."""
    return {
        new + key.removeprefix(old): tensor
        for old, new in names.items()
        for key, tensor in weights.items()
        if key.startswith(old)
    }
