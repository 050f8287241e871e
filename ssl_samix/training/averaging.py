"""The moving average (EMA) of an encoder that a run exports, if asked."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from ssl_samix.errors import ConfigError, check_range
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.ema import EMATwin

TEACHER = "teacher"


class ExportedAverage(pl.Callback):
    """Averages the encoder after each optimizer step; BatchNorm statistics as the weights.

    Lightning's ``EMAWeightAveraging`` averages the whole module, queue and Mixer included. It
    overwrites both with the average at the end, and the trained weights in checkpoints.

    Args:
        momentum: Weight of the old weights, in [0, 1]; ``teacher``: the method's own momentum
            encoder is exported, and nothing else is averaged.

    Raises:
        ConfigError: For another momentum.
    """

    def __init__(self, momentum: float | str) -> None:
        if momentum != TEACHER:
            check_range("callbacks.ema", momentum, 0, 1)
        self.momentum = momentum
        self._twin: EMATwin | None = None
        self._saved: dict[str, Tensor] | None = None
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Save the average."""
        return {} if self._twin is None else {"average": self._twin.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the average until the encoder is on its device."""
        self._saved = state_dict.get("average")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start from the encoder's weights, or from the saved average.

        Raises:
            ConfigError: If the method has no momentum encoder that could be exported.
        """
        self._step = trainer.global_step
        if self.momentum != TEACHER:
            self._twin = EMATwin(pl_module.backbone)
            if self._saved is not None:
                self._twin.load_state_dict(self._saved)
        elif pl_module.twin is None:
            raise ConfigError(
                "callbacks.ema=teacher: this method has no momentum encoder without a Mixer; give "
                "a momentum, such as callbacks.ema=0.99"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Update the average, if the batch ended with an optimizer step."""
        if self._twin is not None and trainer.global_step != self._step:
            self._twin.update(pl_module.backbone, float(self.momentum), statistics=True)
        self._step = trainer.global_step

    def backbone(self, module: Any) -> Backbone:
        """Return the encoder to export."""
        averaged: Any = module.teacher_backbone if self._twin is None else self._twin.module
        return averaged
