"""MoCo v3 (arXiv 2104.02057): in-batch keys of a momentum encoder, a predictor; also for ViTs."""

from __future__ import annotations

from lightly.models.modules import MoCoProjectionHead
from torch import Tensor

from ssl_samix.errors import check_range
from ssl_samix.losses import info_nce_in_batch
from ssl_samix.methods.base import SMALLEST, MomentumMethod, check_widths
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.distributed import gathered, offset
from ssl_samix.models.ema import momentum_at


class MoCoV3(MomentumMethod):
    """MoCo v3, symmetric, without a queue.

    Args:
        backbone: The encoder that is trained; a ViT's patch projection keeps its random weights, as
            the paper recommends for stability (section 4.2).
        hidden_dim: Hidden width of projector and predictor.
        output_dim: Embedding width.
        projector_layers: 2 for ResNets, 3 for ViTs in the paper.
        temperature: Temperature of InfoNCE.
        momentum: Momentum of the momentum encoder at the first step; rises to 1 by a cosine.
        **base: Arguments of ``BaseMethod``.
    """

    directions = ((0, 1), (1, 0))

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        projector_layers: int = 2,
        temperature: float = 0.2,
        momentum: float = 0.99,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_widths(hidden_dim=hidden_dim, output_dim=output_dim)
        check_range("method.projector_layers", projector_layers, 2, 16)
        check_range("method.temperature", temperature, SMALLEST)
        check_range("method.momentum", momentum, 0, 1)
        backbone.freeze_patches()
        heads = {"hidden_dim": hidden_dim, "output_dim": output_dim, "batch_norm": True}
        self.projector = MoCoProjectionHead(
            backbone.feature_dim, num_layers=projector_layers, **heads
        )
        self.predictor = MoCoProjectionHead(output_dim, num_layers=2, **heads)
        self.add_twin()
        self.temperature, self.momentum = temperature, momentum

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return InfoNCE (K, P) against the keys of all ranks except the query's parents."""
        others, rows = gathered(target), parents + offset(target)
        losses = info_nce_in_batch(query, others, rows, None, self.temperature)
        # 2 tau is the scale of the authors' algorithm 1, which sums both directions: theirs is the
        # sum where ours is the mean.
        return 2 * (2 * self.temperature) * losses

    contrast = pair_loss

    def momentum_now(self) -> float:
        """Return the momentum encoder's momentum of this step."""
        return momentum_at(self.global_step, self.total_steps, self.momentum, 1.0)
