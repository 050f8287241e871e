"""BYOL (arXiv 2006.07733): predict the momentum encoder's embedding, without negatives."""

from __future__ import annotations

import torch
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from torch import Tensor, nn

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.errors import check_range
from ssl_samix.losses.regression import cosine_regression
from ssl_samix.methods.base import BaseMethod
from ssl_samix.modules.ema import EMATwin, momentum_at


class BYOL(BaseMethod):
    """BYOL with the symmetric loss and the cosine momentum schedule.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of projector and predictor.
        output_dim: Embedding width.
        momentum: Of the target encoder at the first step; it rises to 1 by a cosine.
        **base: Arguments of ``BaseMethod``.
    """

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
        check_range("method.hidden_dim", hidden_dim, 1)
        check_range("method.output_dim", output_dim, 1)
        self.projector = BYOLProjectionHead(backbone.feature_dim, hidden_dim, output_dim)
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.target_encoder = EMATwin(nn.Sequential(backbone, self.projector))
        self.momentum = momentum

    @property
    def online(self) -> nn.Module:
        """Backbone, projector and predictor."""
        return nn.Sequential(self.backbone, self.projector, self.predictor)

    @property
    def teacher(self) -> nn.Module:
        """The target encoder."""
        return self.target_encoder.module

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Embed with the target encoder to (B, D)."""
        return nn.functional.normalize(self.target_encoder(images).float(), dim=1)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Regression onto each parent's target: (B, P)."""
        return cosine_regression(query, target[parents])

    def own_loss(self, views: tuple[Tensor, ...]) -> Tensor:
        """Regression of each view's prediction onto the other's target, their mean, (B,)."""
        parents = torch.arange(len(views[0]), device=views[0].device)[:, None]
        forward = self.pair_loss(self.query(views[0]), self.targets(views[1]), parents)
        backward = self.pair_loss(self.query(views[1]), self.targets(views[0]), parents)
        return (forward + backward)[:, 0] / 2

    def after_step(self) -> None:
        """Move the target encoder."""
        momentum = momentum_at(self.global_step, self.total_steps, self.momentum, 1.0)
        self.target_encoder.update(nn.Sequential(self.backbone, self.projector), momentum)
