"""Supervised training: a linear classifier on the backbone, learned together with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.errors import check_choice, check_range
from ssl_samix.losses.classification import binary_cross_entropy, cross_entropy, soft_labels
from ssl_samix.methods.linear_heads import LinearHeads
from ssl_samix.types import Batch

LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}
YOUNG = 10  # steps; the average of a younger network follows it faster than ``ema`` says


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
        self.move_averages(min(self.ema, (1 + step) / (YOUNG + step)))
