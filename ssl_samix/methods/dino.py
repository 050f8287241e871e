"""DINO (arXiv 2104.14294): the teacher's centred, sharpened assignment as the target."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightly.models.modules.center import Center
from lightly.models.modules.heads import ProjectionHead
from torch import Tensor, nn

from ssl_samix.errors import check_range
from ssl_samix.losses import cross_entropy, scores
from ssl_samix.methods.base import SMALLEST, MomentumMethod, check_widths
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.ema import EMATwin, momentum_at


class DINO(MomentumMethod):
    """DINO, symmetric, for ResNets and transformers.

    An embedding is what enters the last layer of the published head: the L2-normalised bottleneck.
    That layer, with weights of unit length, is ``prototypes``.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of the projector.
        output_dim: Embedding width (the bottleneck).
        prototypes: Number of outputs of the last layer.
        batch_norm: Whether the projector has BatchNorm.
        temperature: Temperature of the student.
        teacher_temperature: Temperature of the teacher.
        center_momentum: Momentum of the centre of the teacher's outputs.
        momentum: Momentum of the teacher at the first step; rises to 1 by a cosine.
        freeze_epochs: Epochs at the start in which the last layer does not learn.
        **base: Arguments of ``BaseMethod``.
    """

    directions = ((0, 1), (1, 0))

    def __init__(  # noqa: PLR0913 - one argument per configuration key
        self,
        backbone: Backbone,
        *,
        hidden_dim: int = 2048,
        output_dim: int = 256,
        prototypes: int = 65536,
        batch_norm: bool = False,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_epochs: int = 1,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_widths(hidden_dim=hidden_dim, output_dim=output_dim, prototypes=prototypes)
        check_range("method.temperature", temperature, SMALLEST)
        check_range("method.teacher_temperature", teacher_temperature, SMALLEST)
        check_range("method.center_momentum", center_momentum, 0, 1)
        check_range("method.momentum", momentum, 0, 1)
        check_range("method.freeze_epochs", freeze_epochs, 0)
        self.projector = _projector(backbone.feature_dim, hidden_dim, output_dim, batch_norm)
        self.prototypes = nn.Linear(output_dim, prototypes, bias=False)
        self.add_twin()
        self.teacher_prototypes = EMATwin(self.prototypes)
        self.center = Center((1, prototypes), momentum=center_momentum)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.momentum, self.freeze_epochs = momentum, freeze_epochs
        self._new_outputs: list[Tensor] = []  # means over each view's rows

    def keys(self, images: Tensor) -> Tensor:
        """Embed with the teacher; its outputs move the centre after all losses are computed."""
        keys = self.targets(images)
        self._new_outputs.append(self._teacher_outputs(keys).mean(dim=0))
        return keys

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return the cross-entropy (K, P) of the student's assignments to each parent's."""
        predicted = scores(query, F.normalize(self.prototypes.weight, dim=1)) / self.temperature
        centred = self._teacher_outputs(target) - self.center.value
        return cross_entropy(predicted, (centred / self.teacher_temperature).softmax(1)[parents])

    @torch.no_grad()
    def _teacher_outputs(self, target: Tensor) -> Tensor:
        """Return the outputs (B, prototypes) of the teacher's last layer."""
        (weight,) = self.teacher_prototypes.parameters()
        return scores(target, F.normalize(weight, dim=1))

    def momentum_now(self) -> float:
        """Return the teacher's momentum of this step."""
        return momentum_at(self.global_step, self.total_steps, self.momentum, 1.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Keep the last layer as it is in the first epochs."""
        super().on_before_optimizer_step(optimizer)
        if self.current_epoch < self.freeze_epochs and self.prototypes.weight.grad is not None:
            self.prototypes.weight.grad.zero_()

    def after_step(self) -> None:
        """Update the teacher, its last layer too."""
        super().after_step()
        self.teacher_prototypes.update(self.prototypes, self.momentum_now())

    def after_batch(self) -> None:
        """Move the centre to the teacher's outputs of this batch, of all ranks."""
        if self._new_outputs:
            self.center.update(torch.stack(self._new_outputs))
        self._new_outputs.clear()


def _projector(width: int, hidden: int, output: int, batch_norm: bool) -> ProjectionHead:
    """Return the published head without its last layer, initialised as published."""
    sizes = ((width, hidden), (hidden, hidden))
    blocks: list[Any] = [
        (before, after, nn.BatchNorm1d(after) if batch_norm else None, nn.GELU())
        for before, after in sizes
    ]
    projector = ProjectionHead([*blocks, (hidden, output, None, None)])
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return projector
