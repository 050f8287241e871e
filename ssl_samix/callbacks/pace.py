"""How fast a run goes, the monitor left out."""

from __future__ import annotations

import time

import pytorch_lightning as pl


class Pace(pl.Callback):
    """Logs learning rate, seconds of training and images per second of each epoch.

    It stands before the monitor in the list of callbacks, so that the clock stops first.
    """

    def __init__(self) -> None:
        self._begin = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock and log."""
        seconds = time.perf_counter() - self._begin
        images = trainer.datamodule.batch_size * int(trainer.num_training_batches)  # type: ignore[attr-defined]
        values = {
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": seconds,
            "images_per_second": images / seconds,
        }
        pl_module.log_dict(values, on_step=False, on_epoch=True)
