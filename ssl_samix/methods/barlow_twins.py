"""Barlow Twins (arXiv 2103.03230): make the views' cross-correlation matrix the identity."""

from __future__ import annotations

import torch
from lightly.loss import BarlowTwinsLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from torch import Tensor

from ssl_samix.errors import check_range
from ssl_samix.losses import cross_correlation
from ssl_samix.methods.base import BaseMethod, check_widths
from ssl_samix.models.backbone import Backbone


class BarlowTwins(BaseMethod):
    """Barlow Twins, with the cross-correlation matrix summed over all ranks.

    Embeddings leave this method unnormalised: the criterion standardises them over the batch.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of the projector.
        output_dim: Embedding width.
        redundancy: Weight of the off-diagonal elements.
        **base: Arguments of ``BaseMethod``.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        redundancy: float = 5e-3,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_widths(hidden_dim=hidden_dim, output_dim=output_dim)
        check_range("method.redundancy", redundancy, 0)
        self.projector = BarlowTwinsProjectionHead(backbone.feature_dim, hidden_dim, output_dim)
        self.add_teacher()
        self.redundancy = redundancy
        self.criterion = BarlowTwinsLoss(redundancy, gather_distributed=True)

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
        return cross_correlation(query, target[parents], self.redundancy)

    def plain_loss(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the loss of two views, (B,), the same for each sample of the batch."""
        with torch.autocast(query.device.type, enabled=False):  # the matrix product would be halved
            return self.criterion(query, key).expand(len(query))
