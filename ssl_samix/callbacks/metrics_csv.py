"""metrics.csv: one row per epoch, whole at any time, continued by a resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ssl_samix.callbacks.monitor import Monitor
from ssl_samix.files import write_atomically
from ssl_samix.run_folder import read_metrics

BEFORE = ("epoch", "step", "loss")  # columns, before the monitor's
AFTER = ("lr", "seconds", "cpu_seconds", "images_per_second")


class MetricsCSV(pl.Callback):
    """Writes each epoch's row before its checkpoint is written.

    A run that is killed between the two repeats the epoch and replaces the row; written by a logger
    of Lightning's, after the checkpoint, the row would be lost.

    Args:
        path: The file. Cells of what an epoch did not measure stay empty.
        monitor: Whose measurements stand in the rows of the epochs that made them.
    """

    def __init__(self, path: Path, monitor: Monitor) -> None:
        self.path, self.monitor = path, monitor
        self.rows: list[dict[str, Any]] | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the epoch before, of which Lightning keeps what this one does not measure."""
        metrics = trainer.callback_metrics
        for name in [n for n in metrics if not n.startswith(self.monitor.columns)]:
            del metrics[name]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the row."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        stale = self.monitor.columns
        row = {k: v for k, v in metrics.items() if not k.startswith(stale)} | self.monitor.fresh
        if trainer.is_global_zero:
            self.write(trainer.current_epoch, trainer.global_step, row)

    def write(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Append the row of an epoch; rows of this and later epochs are dropped first."""
        if self.rows is None:
            self.rows = list(read_metrics(self.path))
        self.rows = [row for row in self.rows if int(row["epoch"]) < epoch]
        values = {name: f"{value:.10g}" for name, value in metrics.items()}
        self.rows.append({"epoch": epoch, "step": step, **values})
        write_rows(self.path, self.rows, (*BEFORE, *self.monitor.first, *AFTER))


def write_rows(path: Path, rows: list[dict[str, Any]], first: Sequence[str]) -> None:
    """Write rows with the columns of all of them, these first."""
    columns = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    lines = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    text = "".join(",".join(line) + "\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_text(text))
