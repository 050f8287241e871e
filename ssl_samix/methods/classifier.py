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
INIT_STD = 0.01  # standard deviation of a head's initial weights


class LinearHeads(BaseMethod):
    """A method whose embeddings are the outputs of a linear head on the backbone.

    With two heads, mixtures that are used beside the plain images have a separate head, and the
    Mixer learns from that head's average, as in OpenMixup's models/classifiers/automix.py: a head
    that is also trained on plain images soon becomes too confident of one class for the Mixer to
    balance two. ``val/top1`` is measured with the plain images' head, which is also the exported
    one, as in ``forward_inference`` there. (OpenMixup publishes the best of both heads and both
    averages, usually the average of the mixtures' head: tools/summary/find_automix_val_median.py,
    issue 45.) The mixtures' head is measured too, and saved in the checkpoints.
    """

    twin: EMATwin
    mixed_projector: nn.Linear | None
    mixed_twin: EMATwin | None

    def add_heads(self, width: int, heads: str) -> None:
        """Create the heads and their moving averages.

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
        """Return the summed losses; the mixtures' head has a gradient in every step."""
        loss = super().training_step(batch, batch_idx)
        if self.mixed_projector is None:
            return loss
        # A zero that depends on every weight: DDP waits for a gradient of each, and PyTorch's fused
        # optimizers cannot start with gradients of only some of their parameters.
        return loss + torch.stack([p.sum() for p in self.mixed_projector.parameters()]).sum() * 0

    def mixed_query(self, images: Tensor) -> Tensor:
        """Embed mixtures (B, 3, S, S), used beside plain images, to (B, D), with gradient."""
        if self.mixed_projector is None:
            return self.query(images)
        # Not from the step's memory, which holds outputs of the plain images' head.
        return self.unit(self.read(nn.Sequential(self.backbone, self.mixed_projector), images)[0])

    def frozen_query(self, images: Tensor) -> Tensor:
        """Embed to (B, D) with the mixtures' averaged head; gradient reaches the images only."""
        if self.mixed_twin is None:
            return super().frozen_query(images)
        teacher = nn.Sequential(self.teacher_backbone, self.mixed_twin.module)
        return self.unit(self._frozen_forward(teacher, images))

    def move_averages(self, momentum: float) -> None:
        """Update the moving averages, including normalisation statistics."""
        self.twin.update(self.embedder, momentum, statistics=True)
        if self.mixed_projector is not None and self.mixed_twin is not None:
            self.mixed_twin.update(self.mixed_projector, momentum)

    def measured(self) -> dict[str, nn.Sequential]:
        """Return the trained network and its moving average, with all of their heads.

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
            "": nn.Sequential(self.backbone, _ConcatenatedHeads(online)),
            "ema_": nn.Sequential(self.teacher_backbone, _ConcatenatedHeads(average)),
        }


class _ConcatenatedHeads(nn.Module):
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
EMA_WARMUP_STEPS = 10  # in about so many first steps the average follows faster than ``ema``


class Classifier(LinearHeads):
    """Classifies images of known classes; the "embedding" is the row of logits.

    The targets of a mixture are the classes of its parents, so mixing works as in pretraining. The
    teacher is the exponential moving average (EMA) of the classifier, which is measured beside the
    trained network.

    Args:
        backbone: The encoder that is trained.
        classes: C.
        loss: ``cross_entropy`` or ``binary_cross_entropy``.
        smoothing: Label smoothing: the share that is spread evenly over all classes.
        ema: Weight of the old weights in an update of the average.
        heads: ``one`` for all images, ``two`` for plain images and for mixtures (see
            ``LinearHeads``), or ``auto``: two where a policy learns beside plain images. Mixtures
            that replace the plain images use the plain images' head.
        **base: Arguments of ``BaseMethod``.

    Raises:
        ConfigError: For a setting outside its range, and for two heads where only one would learn.
    """

    wants_sync_batchnorm = False  # batches are large enough, and papers do not use it
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
        heads: Literal["auto", "one", "two"] = "one",  # as in runs older than this key
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
        """Return the loss of a batch of one labelled view."""
        return super().training_step(self.taken(batch), batch_idx)

    def taken(self, batch: Batch) -> Batch:
        """Store the batch's labels, and return the batch with its one view as both views."""
        self._labels = batch.label
        return replace(batch, views=(batch.views[0], batch.views[0]))

    def unit(self, embedding: Tensor) -> Tensor:
        """Return logits unchanged, in float32."""
        return embedding.float()

    def targets(self, images: Tensor) -> Tensor:
        """Return the smoothed labels (B, C) of the current batch, whose images these are."""
        return soft_labels(self._labels, self.classes, self.smoothing)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return the loss of logits (K, C) for each parent's class, (K, P)."""
        return self.criterion(query, target[parents])

    contrast = pair_loss

    def likeness(
        self, query: Tensor, target: Tensor, parents: Tensor, temperature: float
    ) -> Tensor:
        """Return the logits of the parents' classes, (K, P), at temperature 1."""
        return query.gather(1, target.argmax(dim=1)[parents])

    def after_step(self) -> None:
        """Update the moving average."""
        step = self.global_step
        self.move_averages(min(self.ema, (1 + step) / (EMA_WARMUP_STEPS + step)))
