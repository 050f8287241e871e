"""NNCLR (arXiv 2104.14548): the positive is the nearest neighbour of the other view in a queue."""

from __future__ import annotations

from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead
from torch import Tensor

from ssl_samix.errors import check_range
from ssl_samix.losses import info_nce_in_batch, nearest_neighbours, nt_xent
from ssl_samix.methods.base import SMALLEST, BaseMethod, check_widths
from ssl_samix.methods.moco import Queue
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.distributed import gathered, offset


class NNCLR(BaseMethod):
    """NNCLR, symmetric, with negatives from all ranks.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of the projector.
        output_dim: Embedding width.
        predictor_dim: Hidden width of the predictor.
        temperature: Temperature of NT-Xent.
        queue_size: Number of embeddings among which neighbours are searched.
        **base: Arguments of ``BaseMethod``.
    """

    directions = ((0, 1), (1, 0))

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: int = 2048,
        output_dim: int = 256,
        predictor_dim: int = 4096,
        temperature: float = 0.1,
        queue_size: int = 98304,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_range("method.temperature", temperature, SMALLEST)
        check_widths(hidden_dim=hidden_dim, output_dim=output_dim, predictor_dim=predictor_dim)
        self.projector = NNCLRProjectionHead(backbone.feature_dim, hidden_dim, output_dim)
        self.predictor = NNCLRPredictionHead(output_dim, predictor_dim, output_dim)
        self.add_teacher()
        self.queue = Queue(queue_size, output_dim)
        self.temperature = temperature
        self._new_keys: list[Tensor] = []

    def targets(self, images: Tensor) -> Tensor:
        """Return the queue's nearest neighbours (B, D) of the online embeddings."""
        return nearest_neighbours(self.online_targets(images), self.queue.keys)

    def keys(self, images: Tensor) -> Tensor:
        """Return ``targets``; the embeddings enter the queue after all losses are computed."""
        self._new_keys.append(self.online_targets(images))
        return self.targets(images)

    def plain_loss(self, query: Tensor, key: Tensor) -> Tensor:
        """Return NT-Xent of predictions and neighbours, (B,)."""
        return nt_xent(query, key, gathered(query), gathered(key), offset(query), self.temperature)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return InfoNCE (K, P) against the neighbours of all ranks except the query's parents'."""
        others, rows = gathered(target), parents + offset(target)
        return info_nce_in_batch(query, others, rows, None, self.temperature)

    contrast = pair_loss

    def after_batch(self) -> None:
        """Push the embeddings of one view into the queue, as published."""
        for keys in self._new_keys[:1]:
            self.queue.push(keys)
        self._new_keys.clear()
