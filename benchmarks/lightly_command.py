"""LightlyTrain's own command for any ResNet: `pip install lightly-train`, not a dependency.

Its default method, distillation, has to download a teacher; simclr and dino need nothing.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytorch_lightning as pl
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ssl_samix.data.images import ImageSet
from ssl_samix.models.resnet import ResNetTrunk

BATCH = 128  # its default
TRIALS = (1, 3)  # epochs; the first holds what is done once in a run


class Wrapped(nn.Module):
    """A ResNet with the methods that LightlyTrain asks of a model."""

    def __init__(self, trunk: ResNetTrunk, feature_dim: int) -> None:
        super().__init__()
        self.trunk, self._feature_dim = trunk, feature_dim

    def get_model(self) -> nn.Module:
        """Return the network to export."""
        return self.trunk

    def feature_dim(self) -> int:
        """Return the channels of the last maps."""
        return self._feature_dim

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the last maps, (B, C, h, w)."""
        return {"features": self.trunk.stage_maps(images)[-1]}

    def forward_pool(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the features, (B, C, 1, 1)."""
        return {"pooled_features": maps["features"].mean(dim=(2, 3), keepdim=True)}


def train(
    method: str,
    trunk: ResNetTrunk,
    feature_dim: int,
    images: ImageSet,
    seed: int,
    seconds: float,
    out: Path,
) -> tuple[int, float]:
    """Train a network for about so many CPU seconds, on one process.

    Args:
        method: ``simclr`` or ``dino``.
        trunk: The network; trained in place.
        feature_dim: Its channels.
        images: Written to picture files first, which LightlyTrain reads.
        seed: Of the run.
        seconds: CPU seconds of the run; its epochs are chosen by two trials.
        out: Folder of the run.

    Returns:
        Epochs and CPU seconds.
    """
    from lightly_train import pretrain

    pictures = out.with_name(f"{out.name}-pictures")
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    for row in range(len(images)):
        to_pil_image(images.original(row)).save(pictures / f"{row}.png")
    start_weights = {name: value.clone() for name, value in trunk.state_dict().items()}
    size = images.image_size

    def run(epochs: int) -> float:
        trunk.load_state_dict(start_weights)
        start = time.process_time()
        pretrain(
            out=out,
            data=pictures,
            model=Wrapped(trunk, feature_dim),
            method=method,
            epochs=epochs,
            batch_size=min(BATCH, len(images)),
            num_workers=0,
            accelerator="cpu",
            seed=seed,
            overwrite=True,
            transform_args={"image_size": (size, size)},
        )
        return time.process_time() - start

    first, second = (run(epochs) for epochs in TRIALS)
    each = (second - first) / (TRIALS[1] - TRIALS[0])
    epochs = max(1, 1 + round((seconds - first) / each))
    pl.seed_everything(seed, verbose=False)
    return epochs, run(epochs)
