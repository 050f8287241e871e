"""The base of every method: it steps and logs; a method only computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.modules.ema import frozen_forward
from ssl_samix.optim.recipe import OptimizerRecipe
from ssl_samix.types import Batch

SMALLEST = 1e-4  # temperature: below it, similarities of unit vectors overflow float16


class BaseMethod(pl.LightningModule, ABC):
    """What all methods share.

    A method gives ``own_loss`` for the plain views and the contract of ``ssl_samix.types.Method``
    for whoever mixes images. Embeddings are L2-normalised wherever they leave a method.

    Args:
        backbone: The encoder that is trained.
        optimizer: How it is optimised.
        mixing: The mixing objective, or None.
    """

    wants_sync_batchnorm = True  # statistics over all devices, as SimCLR's and BYOL's papers have

    def __init__(
        self, backbone: Backbone, optimizer: OptimizerRecipe, mixing: MixObjective | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.mixing = mixing
        self.recipe = optimizer

    @property
    @abstractmethod
    def online(self) -> nn.Module:
        """The branch that learns, images (B, 3, S, S) to unnormalised embeddings (B, D)."""

    @property
    def teacher(self) -> nn.Module:
        """The branch that ``frozen_query`` reads; the online one where there is no other."""
        return self.online

    @abstractmethod
    def own_loss(self, views: tuple[Tensor, ...]) -> Tensor:
        """Return the method's loss of the plain views, (B,)."""

    @abstractmethod
    def targets(self, images: Tensor) -> Tensor:
        """Embed images to what queries are compared with: (B, D), no gradient."""

    @abstractmethod
    def pair_loss(self, query: Tensor, target: Tensor, parents: Tensor) -> Tensor:
        """Compare (B, D) queries with their parents (B, P) among the targets: (B, P)."""

    def after_step(self) -> None:
        """Update what follows the encoder (EMA twin); called after each optimizer step."""

    def after_batch(self) -> None:
        """Store what the next batch compares with (queue); called when all losses are done."""

    def query(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) with the online branch to (B, D), with gradient."""
        return nn.functional.normalize(self.online(images).float(), dim=1)

    def frozen_query(self, images: Tensor) -> Tensor:
        """Embed with frozen weights to (B, D); gradient reaches the images only."""
        return nn.functional.normalize(frozen_forward(self.teacher, images).float(), dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum the named loss terms of one batch and log each."""
        terms = {"own": self.own_loss(batch.views).mean()}
        if self.mixing is not None:
            terms.update(self.mixing(self, batch.views))
        loss = torch.stack(list(terms.values())).sum()
        self._log_terms(loss.detach(), terms)
        return loss

    def _log_terms(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        values = {"loss": loss}
        if len(terms) > 1:
            values.update({f"loss/{name}": value.detach() for name, value in terms.items()})
        # Means over the epoch only: a value per step would make the device wait for the host.
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the twin follow."""
        super().optimizer_step(*args, **kwargs)
        self.after_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the method store its keys."""
        self.after_batch()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule from the recipe."""
        epochs = self.trainer.max_epochs or 1
        global_batch: int = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return self.recipe.build(
            self,
            batch_size=global_batch * self.trainer.accumulate_grad_batches,
            total_steps=self.total_steps,
            steps_per_epoch=max(1, self.total_steps // epochs),
        )
