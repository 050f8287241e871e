"""An online linear probe: a classifier that learns from an encoder's features while it trains.

Legend: B images, D features, C classes.
"""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_samix.data.datamodule import DataModule
from ssl_samix.errors import ConfigError
from ssl_samix.evaluation.measures import top1_top5
from ssl_samix.models.distributed import gathered

LR, MOMENTUM = 8.0, 0.9  # of SGD; divided by D, the squared norm of standardised features
UNLABELLED = -1
_log = logging.getLogger(__name__)


class OnlineProbe(pl.Callback):
    """Trains a linear classifier on detached features of each step; the encoder is not affected.

    Features are standardised by BatchNorm without weights, as in MAE's linear probe (arXiv
    2111.06377), so that one learning rate suits all encoders. The features are those of the step's
    first plain view; the forward passes are the training's own.
    """

    def __init__(self) -> None:
        self.head: nn.Sequential | None = None
        self.learned = False
        self._optimizer: torch.optim.SGD | None = None
        self._saved: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Save the classifier and its optimizer."""
        assert self.head is not None
        assert self._optimizer is not None
        states = {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict()}
        return {**states, "learned": self.learned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the classifier is on its device."""
        self._saved = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Create the classifier, or continue with the saved one.

        Raises:
            ConfigError: If no training image has a label.
        """
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        classes = len(data.splits.classes)
        if not classes or not bool((data.splits.train.labels != UNLABELLED).any()):
            raise ConfigError("callbacks.probe=true needs labels, and these images have none")
        width = pl_module.backbone.feature_dim
        # Zeros, which draw no random number: the problem is convex.
        linear = nn.utils.skip_init(nn.Linear, width, classes)
        for weights in linear.parameters():
            nn.init.zeros_(weights)
        head = nn.Sequential(nn.BatchNorm1d(width, affine=False), linear)
        self.head = head.to(pl_module.device)
        self._optimizer = torch.optim.SGD(head.parameters(), lr=LR / width, momentum=MOMENTUM)
        if self._saved is not None:
            self.head.load_state_dict(self._saved["head"])
            self._optimizer.load_state_dict(self._saved["optimizer"])
            self.learned = self._saved["learned"]
        pl_module.on_features = self.learn

    def learn(self, features: Tensor, labels: Tensor) -> None:
        """Take one step; all ranks take the same one, on the images of all.

        Args:
            features: (B, D) of this rank.
            labels: (B,), -1 where there is none.
        """
        assert self.head is not None
        assert self._optimizer is not None
        features, labels = gathered(features.float()), gathered(labels)
        with torch.autocast(features.device.type, enabled=False), torch.enable_grad():
            logits = self.head(features)
            loss = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
        self._optimizer.zero_grad()
        (loss / len(labels)).backward()
        self._optimizer.step()
        self.learned = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Warn after an epoch without plain views, from which the probe could have learned."""
        if not self.learned and trainer.is_global_zero:
            _log.warning(
                "callbacks.probe: mixtures replaced all plain views of the encoder in epoch %d, so "
                "the probe did not learn; mixup.placement=add keeps them", trainer.current_epoch + 1
            )  # fmt: skip

    @torch.no_grad()
    def top1(self, features: Tensor, labels: Tensor) -> float:
        """Return the accuracy in percent on features (N, D) with labels (N,), in eval mode."""
        assert self.head is not None
        self.head.eval()
        logits = self.head(features.to(self.head[1].weight.device)).cpu()  # type: ignore[arg-type]
        self.head.train()
        return top1_top5(logits, labels)[0]
