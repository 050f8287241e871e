"""Linear heads with a moving average: one for all images, or one of them for mixtures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_samix.errors import ConfigError, check_choice
from ssl_samix.methods.base import BaseMethod
from ssl_samix.modules.ema import EMATwin
from ssl_samix.types import Batch

HEADS = ("auto", "one", "two")
INIT_STD = 0.01  # of a head's weights


class LinearHeads(BaseMethod):
    """A method whose embeddings are the outputs of a linear head on the backbone.

    With two heads, mixtures that come beside the plain images have a head of their own, and the
    Mixer learns from its average, as in OpenMixup's models/classifiers/automix.py: a head that
    learns plain images too is soon too sure of one class for the Mixer to balance two. The plain
    images' head is the one that ``val/top1`` is of and that is exported, as in
    ``forward_inference`` there. (OpenMixup publishes the best of both heads and both averages,
    usually the average of the mixtures' head: tools/summary/find_automix_val_median.py, issue 45.)
    The mixtures' head is measured beside it, and is in the checkpoints.
    """

    twin: EMATwin
    mixed_projector: nn.Linear | None
    mixed_twin: EMATwin | None

    def add_heads(self, width: int, heads: str) -> None:
        """Make the heads and their averages.

        Args:
            width: D, outputs of a head.
            heads: ``one``, ``two``, or ``auto``: two where a policy learns beside plain images.

        Raises:
            ConfigError: For another choice, and for two heads where only one would learn.
        """
        check_choice("classifier.heads", heads, HEADS)
        beside = self.mixing is not None and not self.mixing.replaces(self)
        if heads == "two" and not beside:
            raise ConfigError(
                "classifier.heads=two needs mixtures beside the plain images: choose a mixup and "
                "mixup.placement=add, or classifier.heads=auto"
            )
        self.projector = _head(self.backbone.feature_dim, width)
        self.twin = EMATwin(self.embedder)
        self.mixed_projector = self.mixed_twin = None
        learns = beside and self.mixing is not None and self.mixing.learns
        if heads == "two" or (heads == "auto" and learns):
            self.mixed_projector = _head(self.backbone.feature_dim, width)
            self.mixed_twin = EMATwin(self.mixed_projector)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum the losses; in a step without mixtures their head has one too."""
        loss = super().training_step(batch, batch_idx)
        if self.mixed_projector is None:
            return loss
        # Zero, but a loss of every weight: processes wait for each other's gradients of it. And
        # PyTorch's fused optimizers cannot begin with a part of their parameters.
        return loss + torch.stack([p.sum() for p in self.mixed_projector.parameters()]).sum() * 0

    def mixed_query(self, images: Tensor) -> Tensor:
        """Embed mixtures that come beside plain images (B, 3, S, S), with gradient, (B, D)."""
        if self.mixed_projector is None:
            return self.query(images)
        # Not remembered: what the step remembers of an image went through the plain head.
        return self.unit(self.read(nn.Sequential(self.backbone, self.mixed_projector), images)[0])

    def frozen_query(self, images: Tensor) -> Tensor:
        """Embed with the average of the mixtures' head, (B, D); gradient to the images only."""
        if self.mixed_twin is None:
            return super().frozen_query(images)
        teacher = nn.Sequential(self.teacher_backbone, self.mixed_twin.module)
        return self.unit(self._frozen_forward(teacher, images))

    def move_averages(self, momentum: float) -> None:
        """Let the averages follow, statistics of the normalisation included."""
        self.twin.update(self.embedder, momentum, statistics=True)
        if self.mixed_projector is not None and self.mixed_twin is not None:
            self.mixed_twin.update(self.mixed_projector, momentum)

    def measured(self) -> dict[str, nn.Sequential]:
        """Return the network that is trained and its average, with all of their heads.

        Returns:
            By prefix, ``""`` and ``ema_``: images (B, 3, S, S) to outputs, (B, D) with one head and
            (B, 2 D) with two, the plain images' first.
        """
        online: list[nn.Module] = [self.projector]
        average = [self.teacher[1]]
        if self.mixed_projector is not None and self.mixed_twin is not None:
            online.append(self.mixed_projector)
            average.append(self.mixed_twin.module)
        return {
            "": nn.Sequential(self.backbone, _SideBySide(online)),
            "ema_": nn.Sequential(self.teacher_backbone, _SideBySide(average)),
        }


class _SideBySide(nn.Module):
    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([head(features) for head in self.heads], dim=1)


def _head(features: int, width: int) -> nn.Linear:
    head = nn.Linear(features, width)
    nn.init.normal_(head.weight, std=INIT_STD)
    nn.init.zeros_(head.bias)
    return head
