"""SimCLR (arXiv 2002.05709): the other images of the batch are the negatives."""

from __future__ import annotations

from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor

from ssl_samix.errors import check_range
from ssl_samix.losses import info_nce_in_batch, nt_xent
from ssl_samix.methods.base import SMALLEST, BaseMethod, check_widths
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.distributed import gathered, offset


class SimCLR(BaseMethod):
    """SimCLR with negatives from all ranks, with gradient to each of them.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of the projector; the backbone's feature width if None.
        output_dim: Embedding width.
        temperature: Temperature of NT-Xent.
        **base: Arguments of ``BaseMethod``.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: int | None = None,
        output_dim: int = 128,
        temperature: float = 0.5,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_range("method.temperature", temperature, SMALLEST)
        hidden = backbone.feature_dim if hidden_dim is None else hidden_dim
        check_widths(hidden_dim=hidden, output_dim=output_dim)
        self.projector = SimCLRProjectionHead(backbone.feature_dim, hidden, output_dim)
        self.add_teacher()
        self.temperature = temperature

    def targets(self, images: Tensor) -> Tensor:
        """Embed with the online branch, without gradient, to (B, D)."""
        return self.online_targets(images)

    def keys(self, images: Tensor) -> Tensor:
        """Embed with the online branch, with gradient, to (B, D)."""
        return self.query(images)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return InfoNCE (K, P) against the targets of all ranks except the query's parents."""
        others, rows = gathered(target), parents + offset(target)
        return info_nce_in_batch(query, others, rows, None, self.temperature)

    contrast = pair_loss

    def plain_loss(self, query: Tensor, key: Tensor) -> Tensor:
        """Return NT-Xent of two views, the mean of both directions, (B,)."""
        return nt_xent(query, key, gathered(query), gathered(key), offset(query), self.temperature)
