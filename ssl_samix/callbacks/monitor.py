"""What watches a network while it trains: when it measures, and what becomes of the numbers."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl

from ssl_samix.data.datamodule import DataModule
from ssl_samix.errors import check_range

SHARE = 0.05  # of the training cost; the automatic interval keeps a monitor below it


class Monitor(pl.Callback, ABC):
    """Every n epochs, and after the first and the last: a measurement, logged.

    ``fresh`` holds what this epoch has measured, nothing if it was not this epoch's turn.

    Args:
        every_n_epochs: The interval; ``auto`` chooses the shortest one that is expected to cost at
            most 5% of the training, counted in passes of the network.

    Raises:
        ConfigError: For an interval below 1.
    """

    name: ClassVar[str]  # of its group of measurements, and of its key under ``callbacks``
    columns: ClassVar[tuple[str, ...]]  # what the names of its measurements begin with
    first: ClassVar[tuple[str, ...]]  # what of them stands in the first columns of metrics.csv
    shown: ClassVar[dict[str, str]]  # what of them the progress shows, and how
    step_cost: ClassVar[int]  # passes of the network per image and epoch of the cheapest training

    def __init__(self, every_n_epochs: int | Literal["auto"] = "auto") -> None:
        if every_n_epochs != "auto":
            check_range(f"callbacks.{self.name}.every_n_epochs", every_n_epochs, 1)
        self.every_n_epochs = every_n_epochs
        self.best: float | None = None
        self.fresh: dict[str, float] = {}

    @property
    def quality(self) -> str:
        """The measurement of which the best checkpoint is kept."""
        return f"{self.columns[0]}top1"

    @abstractmethod
    def passes(self, data: DataModule) -> int:
        """Return the images that one measurement sends through a network."""

    @abstractmethod
    def look(self, module: Any, data: DataModule) -> dict[str, float]:
        """Measure what is being trained."""

    @abstractmethod
    def table(self, newest: dict[str, float]) -> list[tuple[str, str]]:
        """Return the lines about quality of a finished run's table."""

    def state_dict(self) -> dict[str, Any]:
        """Keep the best over a resume."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best back."""
        self.best = state_dict["best"]

    def interval(self, data: DataModule) -> int:
        """Return the epochs between two measurements."""
        if self.every_n_epochs != "auto":
            return int(self.every_n_epochs)
        cost = SHARE * self.step_cost * len(data.splits.train)
        return max(1, math.ceil(self.passes(data) / cost))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure, if it is time, and log."""
        self.fresh = {}
        epoch, last = trainer.current_epoch, (trainer.max_epochs or 0) - 1
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        if epoch % self.interval(data) and epoch != last:
            return
        start = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            measured = self.look(module, data)
        group = self.columns[0]
        if self.quality in measured:
            self.best = max(self.best or 0.0, measured[self.quality])
            measured[f"{group}best_top1"] = self.best
        measured[f"{group}seconds"] = time.perf_counter() - start
        self.fresh = measured
        module.log_dict(measured, on_step=False, on_epoch=True)
