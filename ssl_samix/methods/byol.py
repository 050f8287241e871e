"""BYOL (arXiv 2006.07733): predict the momentum encoder's embedding, without negatives."""

from __future__ import annotations

from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from torch import Tensor

from ssl_samix.errors import check_range
from ssl_samix.losses import cosine_regression
from ssl_samix.methods.base import MomentumMethod, check_widths
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.ema import momentum_at


class BYOL(MomentumMethod):
    """BYOL with the symmetric loss and the cosine momentum schedule.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of projector and predictor.
        output_dim: Embedding width.
        momentum: Momentum of the target encoder at the first step; rises to 1 by a cosine.
        **base: Arguments of ``BaseMethod``.
    """

    directions = ((0, 1), (1, 0))

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        momentum: float = 0.99,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_range("method.momentum", momentum, 0, 1)
        check_widths(hidden_dim=hidden_dim, output_dim=output_dim)
        self.projector = BYOLProjectionHead(backbone.feature_dim, hidden_dim, output_dim)
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.add_twin()
        self.momentum = momentum

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return the regression loss towards each parent's target, (K, P)."""
        return cosine_regression(query, target[parents])

    def momentum_now(self) -> float:
        """Return the target encoder's momentum of this step."""
        return momentum_at(self.global_step, self.total_steps, self.momentum, 1.0)
