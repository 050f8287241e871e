"""VICReg (arXiv 2105.04906): alike views, columns that vary, and that vary independently."""

from __future__ import annotations

from lightly.models.modules.heads import VICRegProjectionHead
from torch import Tensor

from ssl_samix.errors import check_range
from ssl_samix.losses import vicreg
from ssl_samix.methods.base import BaseMethod, check_widths
from ssl_samix.models.backbone import Backbone


class VICReg(BaseMethod):
    """VICReg, with variance and covariance over all ranks.

    Embeddings leave this method unnormalised: the criterion needs their variance.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of the projector.
        output_dim: Embedding width.
        invariance: Weight of the distance between views.
        variance: Weight of the variance term.
        covariance: Weight of the covariance term.
        **base: Arguments of ``BaseMethod``.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_widths(hidden_dim=hidden_dim, output_dim=output_dim)
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        for name, weight in self.weights.items():
            check_range(f"method.{name}", weight, 0)
        self.projector = VICRegProjectionHead(backbone.feature_dim, hidden_dim, output_dim)
        self.add_teacher()

    def unit(self, embedding: Tensor) -> Tensor:
        """Return embeddings unchanged, in float32."""
        return embedding.float()

    def targets(self, images: Tensor) -> Tensor:
        """Embed with the online branch, without gradient, to (B, D)."""
        return self.online_targets(images)

    def keys(self, images: Tensor) -> Tensor:
        """Embed with the online branch, with gradient, to (B, D)."""
        return self.query(images)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return each sample's part of the loss towards each of its parents, (K, P)."""
        return vicreg(query, target, parents, **self.weights)
