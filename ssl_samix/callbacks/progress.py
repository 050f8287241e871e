"""What a run shows while it goes: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ssl_samix.callbacks.monitor import Monitor

MOST_LINES = 12  # of a run whose output is no terminal, more or less


class RunProgress(pl.Callback):
    """One bar over the whole run with loss, quality and the time that is left.

    Without a terminal it prints at most a dozen lines instead, evenly over the run.

    Args:
        monitor: Whose measurements are the quality; None if nothing is measured.
    """

    def __init__(self, monitor: Monitor | None = None) -> None:
        super().__init__()
        self._shown = {} if monitor is None else monitor.shown
        self._bar: tqdm[Any] | None = None
        self._above = ExitStack()  # while it is open, warnings are printed above the bar
        self._begin, self._first_step, self._line = 0.0, 0, 0
        self._quality: dict[str, float] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so, if no epoch is left to do; Lightning refuses fewer than are done."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        done, wanted = progress["current"]["processed"], trainer.max_epochs or 0
        if done < wanted:
            return
        trainer.fit_loop.max_epochs = done
        if trainer.is_global_zero:
            print(
                f"nothing is left to do: {done} epochs are done and trainer.max_epochs={wanted}; "
                "a larger one goes on",
                flush=True,
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the bar."""
        self._begin, self._first_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero and sys.stderr.isatty():
            steps = int(trainer.estimated_stepping_batches)
            self._bar = tqdm(total=steps, initial=trainer.global_step, unit="step", leave=False)
            self._above.enter_context(logging_redirect_tqdm())

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
        if self._bar is not None:
            self._bar.set_description(describe(trainer, self._shown))
            return
        quality = {name: float(trainer.callback_metrics.get(name, -1)) for name in self._shown}
        fresh = quality != self._quality
        self._quality = quality
        epochs, done = trainer.max_epochs or 1, trainer.current_epoch + 1
        since = (done - self._line) * MOST_LINES / epochs
        if done in (1, epochs) or (fresh and since > 0.8) or since > 2:
            self._line = done
            text = describe(trainer, self._shown if fresh else {})
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
            self._above.close()
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


def describe(trainer: pl.Trainer, quality: dict[str, str]) -> str:
    """Return the epoch, its loss and these measures in a line."""
    metrics = trainer.callback_metrics
    parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
    names = {"loss": "loss {:.3f}", **quality}
    parts += [text.format(float(metrics[n])) for n, text in names.items() if n in metrics]
    return "  ".join(parts)
