"""MoCo v2 (arXiv 2003.04297): a queue of keys from a momentum encoder."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle, concat_all_gather
from lightly.utils.dist import world_size
from torch import Tensor, nn

from ssl_samix.errors import check_memory, check_range
from ssl_samix.losses import info_nce
from ssl_samix.methods.base import SMALLEST, MomentumMethod, check_widths
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.distributed import in_groups

_log = logging.getLogger(__name__)


class MoCo(MomentumMethod):
    """MoCo v2, on any number of devices.

    With BatchNorm, a query and its key could share batch statistics, which give the positive away.
    Both encoders therefore normalise in ``bn_groups`` groups of the whole batch, keys in another
    order than queries: in groups on each device (as in the authors' CIFAR demo on one device), or,
    if each device is one group, with keys shuffled between devices, as published.

    Args:
        backbone: The encoder that is trained.
        hidden_dim: Hidden width of the projector; the backbone's feature width if None.
        output_dim: Embedding width.
        temperature: Temperature of InfoNCE.
        queue_size: Number of negatives.
        momentum: Momentum of the key encoder.
        symmetric: Use each view as query and as key; doubles the cost.
        bn_groups: Number of BatchNorm groups of a batch, over all devices, at least one on each;
            1 on one device switches this off.
        **base: Arguments of ``BaseMethod``.
    """

    wants_sync_batchnorm = False  # statistics per device, keys shuffled between devices

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
        check_range("method.momentum", momentum, 0, 1)
        hidden = backbone.feature_dim if hidden_dim is None else hidden_dim
        check_widths(hidden_dim=hidden, output_dim=output_dim)
        self.projector = MoCoProjectionHead(backbone.feature_dim, hidden, output_dim)
        self.add_twin()
        self.queue = Queue(queue_size, output_dim)
        self.temperature, self.momentum, self.bn_groups = temperature, momentum, bn_groups
        self.directions = ((0, 1), (1, 0)) if symmetric else ((0, 1),)
        self._new_keys: list[Tensor] = []

    def on_train_start(self) -> None:
        """Warn if BatchNorm's groups cannot be as configured."""
        ranks = self.trainer.world_size
        here = self.trainer.datamodule.batch_size // ranks  # type: ignore[attr-defined]
        groups = max(1, min(self.groups_here, here // 2))
        sizes = sorted({here // groups, -(-here // groups)})
        exact = groups * ranks == self.bn_groups and len(sizes) == 1
        if self.trainer.is_global_zero and not exact:
            _log.warning(
                "method.bn_groups=%d: BatchNorm sees %d groups of %s images",
                self.bn_groups, groups * ranks, " or ".join(map(str, sizes)),
            )  # fmt: skip

    @property
    def groups_here(self) -> int:
        """Number of BatchNorm groups on this device."""
        return max(1, self.bn_groups // world_size())

    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the query encoder."""
        return in_groups(lambda part: self.read(self.embedder, part), images, self.groups_here)

    def embed_targets(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the key encoder on the shuffled batch."""
        # Images move between devices only if each device is a single group.
        groups = self.groups_here
        distributed = groups == 1 and world_size() > 1
        if not distributed and groups == 1:
            return self.read(self.teacher, images)
        shuffled, order = batch_shuffle(images, distributed)
        given = in_groups(lambda part: self.read(self.teacher, part), shuffled, groups)
        return tuple(batch_unshuffle(rows, order, distributed) for rows in given)

    def keys(self, images: Tensor) -> Tensor:
        """Embed with the key encoder; the keys enter the queue after all losses are computed."""
        keys = self.targets(images)
        self._new_keys.append(keys)
        return keys

    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Return InfoNCE (K, P) against the queue, which holds no key of the current batch."""
        return info_nce(query, target[parents], self.queue.keys, self.temperature)

    contrast = pair_loss

    def momentum_now(self) -> float:
        """Return the key encoder's momentum, which is constant."""
        return self.momentum

    def after_batch(self) -> None:
        """Push the batch's keys into the queue, after every loss has read it."""
        for keys in self._new_keys:
            self.queue.push(keys)
        self._new_keys.clear()


class Queue(nn.Module):
    """A ring buffer of the newest keys; unlike lightly's memory bank it is saved in checkpoints.

    Args:
        size: Number of keys, shared by all ranks: each rank holds the same queue.
        dim: Width of a key.

    Raises:
        ConfigError: If ``size`` is below 1.
    """

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        check_range("method.queue_size", size, 1)
        check_memory(f"method.queue_size={size}", size * dim)
        # Random unit vectors until real keys have filled the buffer.
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by ``keys`` (B, D) of all ranks, in rank order."""
        if world_size() > 1:
            keys = concat_all_gather(keys.contiguous())
        size = len(self.keys)
        keys = keys[-size:].to(self.keys.dtype)
        # The pointer stays a tensor: reading it would synchronise host and device.
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, rows, keys)
        self.pointer.copy_((self.pointer + len(keys)) % size)
