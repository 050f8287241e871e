"""SimSiam (arXiv 2011.10566): predict the other view's embedding, whose gradient is stopped."""

from __future__ import annotations

from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor

from ssl_samix.losses import negative_cosine
from ssl_samix.methods.base import BaseMethod, check_widths
from ssl_samix.models.backbone import Backbone


class SimSiam(BaseMethod):
    """SimSiam: no negatives, no momentum encoder.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of the projector.
        output_dim: Embedding width.
        bottleneck_dim: Hidden width of the predictor.
        **base: Arguments of ``BaseMethod``.
    """

    directions = ((0, 1), (1, 0))

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: int = 2048,
        output_dim: int = 2048,
        bottleneck_dim: int = 512,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_widths(hidden_dim=hidden_dim, output_dim=output_dim, bottleneck_dim=bottleneck_dim)
        self.projector = SimSiamProjectionHead(backbone.feature_dim, hidden_dim, output_dim)
        self.predictor = SimSiamPredictionHead(output_dim, bottleneck_dim, output_dim)
        self.add_teacher()

    def targets(self, images: Tensor) -> Tensor:
        """Embed with the projector, without gradient, to (B, D)."""
        return self.online_targets(images)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return the negative cosine with each parent's embedding, (K, P)."""
        return negative_cosine(query, target[parents])
