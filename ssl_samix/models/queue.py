"""The queue of keys (MoCo, arXiv 1911.05722, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.models.utils import concat_all_gather
from lightly.utils.dist import world_size
from torch import Tensor, nn

from ssl_samix.errors import check_memory, check_range


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
