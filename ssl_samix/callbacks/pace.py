"""How fast a run goes, the monitor left out."""

from __future__ import annotations

import time

import pytorch_lightning as pl


class Pace(pl.Callback):
    """Logs learning rate, seconds of training and images per second of each epoch.

    It stands before the monitor in the list of callbacks, so that the clocks stop first. Seconds of
    processor time are those of this process with all its threads: on a busy machine they say more
    of what a run costs than the clock on the wall.
    """

    def __init__(self) -> None:
        self._begin = self._begin_cpu = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        self._begin, self._begin_cpu = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clocks and log."""
        seconds = time.perf_counter() - self._begin
        cpu_seconds = time.process_time() - self._begin_cpu
        images = trainer.datamodule.batch_size * int(trainer.num_training_batches)  # type: ignore[attr-defined]
        values = {
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "images_per_second": images / seconds,
        }
        pl_module.log_dict(values, on_step=False, on_epoch=True)
