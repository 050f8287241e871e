"""What methods with a momentum encoder share: targets are its embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_samix.methods.base import BaseMethod
from ssl_samix.modules.ema import EMATwin
from ssl_samix.modules.passes import Passed


class MomentumMethod(BaseMethod):
    """A method whose queries are compared with the embeddings of its momentum encoder.

    A subclass calls ``add_twin`` when its heads are there.
    """

    twin: EMATwin

    def add_twin(self) -> None:
        """Copy backbone and projector to the momentum encoder."""
        self.twin = EMATwin(self.embedder)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Embed with the momentum encoder to (B, D)."""
        return self.memory.once("teacher", images, lambda: self._teacher(images)).embedding

    def _teacher(self, images: Tensor) -> Passed:
        embedding, *maps = self.embed_targets(images)
        return Passed(self.unit(embedding), None, *maps)

    def embed_targets(self, images: Tensor) -> tuple[Tensor, ...]:
        """Make the pass of the momentum encoder."""
        return self.read(self.teacher, images)

    def momentum_now(self) -> float:
        """Return the momentum of this step."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Move the momentum encoder."""
        self.twin.update(self.embedder, self.momentum_now())
