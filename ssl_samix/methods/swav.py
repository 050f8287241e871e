"""SwAV (arXiv 2006.09882): predict the other view's assignment to prototypes."""

from __future__ import annotations

from typing import Any

import torch
from lightly.loss.swav_loss import sinkhorn
from lightly.models.modules import SwaVProjectionHead
from lightly.models.utils import normalize_weight
from torch import Tensor, nn

from ssl_samix.errors import check_range
from ssl_samix.losses import cross_entropy, scores
from ssl_samix.methods.base import SMALLEST, BaseMethod, check_widths
from ssl_samix.models.backbone import Backbone

SMALLEST_EPSILON = 0.0125  # below it, exp(1 / epsilon) overflows float32


class SwAV(BaseMethod):
    """SwAV, symmetric, with codes over the batch of all ranks.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of the projector.
        output_dim: Embedding width.
        prototypes: Number of prototypes.
        temperature: Temperature of the predicted assignment.
        epsilon: Entropy weight of the Sinkhorn-Knopp algorithm that makes the codes.
        iterations: Its iterations.
        freeze_epochs: Epochs at the start in which the prototypes do not learn.
        **base: Arguments of ``BaseMethod``.
    """

    directions = ((0, 1), (1, 0))

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        freeze_epochs: int = 1,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_widths(hidden_dim=hidden_dim, output_dim=output_dim, prototypes=prototypes)
        check_range("method.temperature", temperature, SMALLEST)
        check_range("method.epsilon", epsilon, SMALLEST_EPSILON)
        check_range("method.iterations", iterations, 1)
        check_range("method.freeze_epochs", freeze_epochs, 0)
        self.projector = SwaVProjectionHead(backbone.feature_dim, hidden_dim, output_dim)
        self.prototypes = nn.Linear(output_dim, prototypes, bias=False)
        normalize_weight(self.prototypes.weight)
        self.add_teacher()
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.freeze_epochs = freeze_epochs

    def targets(self, images: Tensor) -> Tensor:
        """Embed with the online branch, without gradient, to (B, D)."""
        return self.online_targets(images)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return the cross-entropy (K, P) of predicted assignments to each parent's code."""
        predicted = scores(query, self.prototypes.weight) / self.temperature
        return cross_entropy(predicted, self.codes(target)[parents])

    @torch.no_grad()
    def codes(self, target: Tensor) -> Tensor:
        """Return soft assignments (B, prototypes), of all ranks equally to each prototype."""
        logits = scores(target, self.prototypes.weight)
        with torch.autocast(target.device.type, enabled=False):
            return sinkhorn(logits, self.iterations, self.epsilon, gather_distributed=True)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Keep the prototypes as they are in the first epochs."""
        super().on_before_optimizer_step(optimizer)
        if self.current_epoch < self.freeze_epochs and self.prototypes.weight.grad is not None:
            self.prototypes.weight.grad.zero_()

    def after_step(self) -> None:
        """Update the teacher, and normalise the prototypes."""
        super().after_step()
        normalize_weight(self.prototypes.weight)
