"""MoCo v2 (arXiv 2003.04297): a queue of keys from a momentum encoder."""

from __future__ import annotations

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle
from lightly.utils.dist import world_size
from torch import Tensor, nn

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.errors import check_range
from ssl_samix.losses.contrastive import info_nce
from ssl_samix.methods.base import SMALLEST, BaseMethod
from ssl_samix.modules.ema import EMATwin
from ssl_samix.modules.grouped import in_groups
from ssl_samix.modules.queue import Queue


class MoCo(BaseMethod):
    """MoCo v2, on any number of devices.

    BatchNorm lets a query recognise the batch that its key was normalised with. As published, keys
    are therefore shuffled between devices; and on each device both encoders normalise in
    ``bn_groups`` groups of the batch, keys in another order than queries (as in the authors' CIFAR
    demo, which has one device).

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of the projector; the backbone's feature width if None.
        output_dim: Embedding width.
        temperature: Of InfoNCE.
        queue_size: Number of negatives.
        momentum: Of the key encoder's moving average.
        symmetric: Use each view as query and as key; doubles the cost.
        bn_groups: Groups that a batch is normalised in, per device; 1 switches this off.
        **base: Arguments of ``BaseMethod``.
    """

    wants_sync_batchnorm = False  # each device's own statistics, keys shuffled between devices

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: int | None = None,
        output_dim: int = 128,
        temperature: float = 0.2,
        queue_size: int = 1024,
        momentum: float = 0.999,
        symmetric: bool = False,
        bn_groups: int = 1,
        **base: object,
    ) -> None:
        super().__init__(backbone, **base)  # type: ignore[arg-type]
        check_range("method.bn_groups", bn_groups, 1)
        check_range("method.temperature", temperature, SMALLEST)
        check_range("method.hidden_dim", hidden_dim or backbone.feature_dim, 1)
        check_range("method.output_dim", output_dim, 1)
        check_range("method.momentum", momentum, 0, 1)
        width = backbone.feature_dim
        self.projector = MoCoProjectionHead(width, hidden_dim or width, output_dim)
        self.key_encoder = EMATwin(nn.Sequential(backbone, self.projector))
        self.queue = Queue(queue_size, output_dim)
        self.temperature, self.momentum = temperature, momentum
        self.symmetric, self.bn_groups = symmetric, bn_groups
        self._new_keys: list[Tensor] = []

    @property
    def online(self) -> nn.Module:
        """Backbone and projector."""
        return nn.Sequential(self.backbone, self.projector)

    @property
    def teacher(self) -> nn.Module:
        """The key encoder."""
        return self.key_encoder.module

    def query(self, images: Tensor) -> Tensor:
        """Embed with the query encoder to (B, D)."""
        embedding = in_groups(self.online, images, self.bn_groups)
        return nn.functional.normalize(embedding.float(), dim=1)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Embed with the key encoder, its batches shuffled, to (B, D)."""
        distributed = world_size() > 1
        if not distributed and self.bn_groups == 1:
            return nn.functional.normalize(self.key_encoder(images).float(), dim=1)
        shuffled, order = batch_shuffle(images, distributed)
        keys = in_groups(self.key_encoder, shuffled, self.bn_groups).float()
        return nn.functional.normalize(batch_unshuffle(keys, order, distributed), dim=1)

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """InfoNCE against the queue, which never holds a key of the batch at hand: (B, P)."""
        return info_nce(query, target[parents], self.queue.keys, self.temperature)

    def own_loss(self, views: tuple[Tensor, ...]) -> Tensor:
        """InfoNCE of one view's queries against the other view's keys, (B,)."""
        parents = torch.arange(len(views[0]), device=views[0].device)[:, None]
        pairs = [(views[0], views[1]), (views[1], views[0])][: 2 if self.symmetric else 1]
        losses = []
        for query_view, key_view in pairs:
            keys = self.targets(key_view)
            losses.append(self.pair_loss(self.query(query_view), keys, parents)[:, 0])
            self._new_keys.append(keys)
        return torch.stack(losses).mean(dim=0)

    def after_step(self) -> None:
        """Move the key encoder."""
        self.key_encoder.update(self.online, self.momentum)

    def after_batch(self) -> None:
        """Push the batch's keys, now that every loss has read the queue."""
        for keys in self._new_keys:
            self.queue.push(keys)
        self._new_keys.clear()
