"""Supervised training: a linear classifier on the backbone, learned together with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_samix.errors import ConfigError, check_choice, check_range
from ssl_samix.losses import binary_cross_entropy, cross_entropy, soft_labels
from ssl_samix.methods.base import BaseMethod
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.ema import EMATwin
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


LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}
EMA_WARMUP_STEPS = 10  # steps; the average of a younger network follows it faster than ``ema`` says


class Classifier(LinearHeads):
    """Classifies images of known classes; the "embedding" is the row of logits.

    What a mixture is compared with, its targets, are the classes of its parents, and so all of
    mixing works here as in pretraining. The teacher is the exponential moving average (EMA) of the
    classifier, a network that is measured beside the one that is trained.

    Args:
        backbone: The encoder that is trained.
        classes: C.
        loss: ``cross_entropy`` or ``binary_cross_entropy``.
        smoothing: Share of a label that all classes have in equal parts.
        ema: Share of the old weights in a step of the average.
        heads: ``one`` for all images, ``two`` for plain images and for mixtures (see
            ``LinearHeads``), or ``auto``: two where a policy learns beside plain images. Mixtures
            that replace the plain images have the plain images' head.
        **base: Arguments of ``BaseMethod``.

    Raises:
        ConfigError: For a setting outside its range, and for two heads where only one would learn.
    """

    wants_sync_batchnorm = False  # batches are large enough, and papers do without
    keeps_plain_views = False
    mixer_weights = (0.0, 1.0)

    def __init__(
        self,
        backbone: Backbone,
        *,
        classes: int,
        loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy",
        smoothing: float = 0.0,
        ema: float = 0.999,
        heads: Literal["auto", "one", "two"] = "one",  # as runs from before the key existed
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_range("classes", classes, 2)
        check_choice("classifier.loss", loss, LOSSES)
        check_range("classifier.smoothing", smoothing, 0, 0.99)
        check_range("classifier.ema", ema, 0, 1)
        self.add_heads(classes, heads)
        self.classes, self.smoothing, self.ema = classes, smoothing, ema
        self.criterion = LOSSES[loss]
        self._labels = torch.empty(0, dtype=torch.int64)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Learn from a batch of one labelled view."""
        return super().training_step(self.taken(batch), batch_idx)

    def taken(self, batch: Batch) -> Batch:
        """Take the labels of a batch; mixing finds partners in the same view."""
        self._labels = batch.label
        return replace(batch, views=(batch.views[0], batch.views[0]))

    def unit(self, embedding: Tensor) -> Tensor:
        """Leave logits as they are, in float32."""
        return embedding.float()

    def targets(self, images: Tensor) -> Tensor:
        """Return the classes of the batch at hand, whose images these are, (B, C)."""
        return soft_labels(self._labels, self.classes, self.smoothing)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Compare logits (K, C) with the classes of each parent, (K, P)."""
        return self.criterion(query, target[parents])

    contrast = pair_loss

    def likeness(
        self, query: Tensor, target: Tensor, parents: Tensor, temperature: float
    ) -> Tensor:
        """Return the logits of the parents' classes, (K, P); their temperature is 1."""
        return query.gather(1, target.argmax(dim=1)[parents])

    def after_step(self) -> None:
        """Move the average."""
        step = self.global_step
        self.move_averages(min(self.ema, (1 + step) / (EMA_WARMUP_STEPS + step)))
