"""What a run shows while it goes: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

MOST_LINES = 12  # of a run whose output is no terminal


class RunProgress(ProgressBar):
    """One bar over the whole run with loss, quality and the time that is left.

    Without a terminal it prints at most a dozen lines instead, evenly over the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._begin, self._first_step, self._lines = 0.0, 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the bar."""
        self._begin, self._first_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero and sys.stderr.isatty():
            steps = int(trainer.estimated_stepping_batches)
            self._bar = tqdm(total=steps, initial=trainer.global_step, unit="step", leave=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how it goes."""
        if not trainer.is_global_zero:
            return
        text = describe(trainer)
        if self._bar is not None:
            self._bar.set_description(text)
            return
        epochs = trainer.max_epochs or 1
        done = trainer.current_epoch + 1
        if done in (1, epochs) or done * MOST_LINES // epochs > self._lines:
            self._lines = done * MOST_LINES // epochs
            print(f"{text}  {self._left(trainer)} left", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar away."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the bar away."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _left(self, trainer: pl.Trainer) -> str:
        done = trainer.global_step - self._first_step
        todo = int(trainer.estimated_stepping_batches) - trainer.global_step
        seconds = (time.monotonic() - self._begin) / max(1, done) * todo
        return clock(seconds)


def clock(seconds: float) -> str:
    """Write a duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(trainer: pl.Trainer) -> str:
    """Return the epoch, its loss and, if it was measured, its quality in a line."""
    metrics = trainer.callback_metrics
    parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
    names = (("loss", "loss {:.3f}"), ("knn/top1", "kNN {:.1f}%"), ("rankme", "RankMe {:.1f}"))
    parts += [text.format(float(metrics[name])) for name, text in names if name in metrics]
    return "  ".join(parts)
