"""Logging of a run: metrics.csv, throughput, progress bar, summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ssl_samix.artifacts.results import write_rows
from ssl_samix.artifacts.run_folder import RunFolder, read_metrics
from ssl_samix.data.datamodule import DataModule
from ssl_samix.models.backbone import other_library
from ssl_samix.training.monitors import Monitor

if TYPE_CHECKING:
    from ssl_samix.artifacts.encoder import Encoder, TrainedClassifier


BEFORE = ("epoch", "step", "loss")  # columns, before the monitor's
AFTER = ("lr", "seconds", "cpu_seconds", "images_per_second", "data_wait")


class MetricsCSV(pl.Callback):
    """Writes each epoch's row of metrics.csv before the epoch's checkpoint.

    A run that is killed between the two repeats the epoch and replaces the row. Lightning's logger
    writes after the checkpoint, so that the row would be lost.

    Args:
        path: The file. Cells of values that an epoch did not measure are empty.
        monitor: Its measurements are written only in the rows of the epochs that made them.
    """

    def __init__(self, path: Path, monitor: Monitor) -> None:
        self.path, self.monitor = path, monitor
        self.rows: list[dict[str, Any]] | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the previous epoch's values, which Lightning would keep."""
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
        write_rows(self.path, (*BEFORE, *self.monitor.first, *AFTER), self.rows)


class Pace(pl.Callback):
    """Logs learning rate, seconds of training, images per second and data wait of each epoch.

    It is before the monitor in the list of callbacks, so that the clocks stop first. CPU seconds
    are those of this process with all its threads: on a busy machine they are a better measure of
    a run's cost than wall-clock time. ``data_wait`` is the share of the time in which the process
    waited for the next batch: reading, decoding and, in workers, augmenting.
    """

    def __init__(self) -> None:
        self._begin = self._begin_cpu = self._waited = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks."""
        self._begin, self._begin_cpu = time.perf_counter(), time.process_time()
        self._waited = _waited(trainer)

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
            "data_wait": (_waited(trainer) - self._waited) / seconds,
        }
        pl_module.log_dict(values, on_step=False, on_epoch=True)


def _waited(trainer: pl.Trainer) -> float:
    loader: Any = trainer.train_dataloader
    return float(loader.waited)


EVERY = 5.0  # seconds between two readings: each waits for the device


class Readings(pl.Callback):
    """Reads loss, learning rate and speed every few seconds, for the trackers and the screen.

    Only then does it wait for the device. The loss is that of the last step, without the Mixer's.

    Attributes:
        newest: ``loss``, ``lr`` and ``images_per_second`` of the last reading; empty before it.
    """

    def __init__(self) -> None:
        self.newest: dict[str, float] = {}
        self._when, self._batch = 0.0, 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; what is between two epochs does not count."""
        self._when, self._batch = time.monotonic(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read if due."""
        seconds = time.monotonic() - self._when
        if seconds < EVERY or not trainer.is_global_zero:
            return
        images = (batch_idx + 1 - self._batch) * trainer.datamodule.batch_size  # type: ignore[attr-defined]
        self.newest = {
            "loss": float(pl_module.last_loss),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": images / seconds,
        }
        for logger in trainer.loggers:
            values = {f"step/{name}": value for name, value in self.newest.items()}
            logger.log_metrics(values, trainer.global_step)
        self._when, self._batch = time.monotonic(), batch_idx + 1

    def __str__(self) -> str:
        now = self.newest
        text = "loss {loss:.3f}  lr {lr:.3g}  {images_per_second:.0f} images/s"
        return text.format(**now) if now else ""


ESTIMATED_AFTER = 20  # steps
LONG_RUN = 60  # seconds; shorter runs soon print the time that is left
MOST_LINES = 12  # at most, about; of a run without a terminal


class RunProgress(pl.Callback):
    """One progress bar over the whole run with loss, speed, quality and remaining time.

    Without a terminal it prints about a dozen lines at most, evenly over the run.

    Args:
        monitor: Its measurements are shown as quality; None if nothing is measured.
        readings: Shown between two epochs; they come before this callback.
    """

    def __init__(self, monitor: Monitor | None = None, readings: Readings | None = None) -> None:
        super().__init__()
        self._shown = {} if monitor is None else monitor.shown
        self._readings = readings or Readings()
        self._bar: tqdm[Any] | None = None
        self._above = ExitStack()  # while it is open, warnings are printed above the bar
        self._begin, self._first_step, self._line = 0.0, 0, 0
        self._printed, self._printed_step = 0.0, 0  # when and after which step a line was printed
        self._quality: dict[str, float] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Print a note if all epochs are done; Lightning rejects fewer epochs than are done."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        done, wanted = progress["current"]["processed"], trainer.max_epochs or 0
        if done < wanted:
            return
        trainer.fit_loop.max_epochs = done
        if trainer.is_global_zero:
            print(
                f"nothing is left to do: {done} epochs are done and trainer.max_epochs={wanted}; "
                "give a larger number to continue",
                flush=True,
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the bar."""
        self._begin, self._first_step = time.monotonic(), trainer.global_step
        self._printed, self._printed_step = self._begin, self._first_step
        if trainer.is_global_zero and sys.stderr.isatty():
            steps = int(trainer.estimated_stepping_batches)
            self._bar = tqdm(total=steps, initial=trainer.global_step, unit="step", leave=False)
            self._above.enter_context(logging_redirect_tqdm())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar; without one, print how long a long run takes, and how it goes on."""
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.set_postfix_str(str(self._readings), refresh=False)
            return
        if not trainer.is_global_zero:
            return
        due = trainer.global_step == self._first_step + ESTIMATED_AFTER
        if due and self._seconds_left(trainer) > LONG_RUN:
            print(f"{'time':<10}about {self._left(trainer)} for the run", flush=True)
        if self._silent_for_long(trainer):
            done = f"{(batch_idx + 1) / int(trainer.num_training_batches):.0%}"
            self._print(trainer, f"{describe(trainer, {}, done)}  {self._readings}")

    def _silent_for_long(self, trainer: pl.Trainer) -> bool:
        """Return whether a line within an epoch is due: in a run of few and long epochs."""
        if (trainer.max_epochs or 1) >= MOST_LINES or not self._readings.newest:
            return False
        steps = trainer.global_step - self._printed_step
        seldom = steps * MOST_LINES >= int(trainer.estimated_stepping_batches)
        return seldom and time.monotonic() - self._printed > LONG_RUN

    def _print(self, trainer: pl.Trainer, text: str) -> None:
        self._printed, self._printed_step = time.monotonic(), trainer.global_step
        print(f"{text}  {self._left(trainer)} left", flush=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show loss and quality of the epoch."""
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
            self._print(trainer, describe(trainer, self._shown if fresh else {}))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bar."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._above.close()
            self._bar.close()
            self._bar = None

    def _left(self, trainer: pl.Trainer) -> str:
        return str(tqdm.format_interval(self._seconds_left(trainer)))

    def _seconds_left(self, trainer: pl.Trainer) -> float:
        done = trainer.global_step - self._first_step
        todo = max(0, int(trainer.estimated_stepping_batches) - trainer.global_step)
        return (time.monotonic() - self._begin) / max(1, done) * todo


def describe(trainer: pl.Trainer, quality: dict[str, str], done: str = "") -> str:
    """Return one line: the epoch, its loss and the given measures; or how much of it is done."""
    metrics = trainer.callback_metrics
    parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
    if done:
        return f"{parts[0]}, {done}"
    names = {"loss": "loss {:.3f}", **quality}
    parts += [text.format(float(metrics[n])) for n, text in names.items() if n in metrics]
    return "  ".join(parts)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        out: Its folder.
        metrics: The newest value of each column of ``metrics.csv``.
    """

    out: Path
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def encoder(self) -> Encoder:
        """The trained encoder, in eval mode."""
        from ssl_samix.artifacts.encoder import load_encoder

        return load_encoder(self.out)

    @property
    def classifier(self) -> TrainedClassifier:
        """The trained classifier, in eval mode; of a run of ``train_supervised``."""
        from ssl_samix.artifacts.encoder import load_classifier

        return load_classifier(self.out)


def announce(
    trainer: pl.Trainer,
    config: DictConfig,
    folder: RunFolder,
    module: Any,
    data: DataModule,
    meta: dict[str, Any],
    purpose: str,
    automatic: Mapping[str, Any],
) -> None:
    """Print what the run will do, with automatic settings and an export format it cannot have."""
    if not trainer.is_global_zero:
        return
    splits, backbone = data.splits, module.backbone.settings
    classes = len(splits.classes)
    batch = data.batch_size * trainer.accumulate_grad_batches
    weights = sum(p.numel() for p in module.backbone.parameters())
    device = trainer.strategy.root_device.type
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    per_epoch = len(splits.train) // data.batch_size  # Lightning has not counted them yet
    steps = config.trainer.max_epochs * per_epoch // trainer.accumulate_grad_batches
    rows = {
        "data": f"{meta['data']}: {len(splits.train)} images at {splits.image_size} px, "
        + (f"{classes} classes, {purpose}" if classes else "no labels"),
        "encoder": f"{backbone['name']}, width {backbone['width']}, {backbone['stem']} stem, "
        f"{weights / 1e6:.1f} M weights",
        "method": f"{meta['method']}, mixup {meta['mixup']}, {config.trainer.max_epochs} "
        f"epochs, {steps} steps, batch {batch}, learning rate {module.recipe.scaled_lr(batch):.3g}",
        "machine": f"{trainer.world_size} x {device}{threads}, precision {trainer.precision}",
        "out": f"{folder.path}" + (", resumed from last.ckpt" if folder.last.exists() else ""),
    }
    if other := other_library(backbone["name"]):
        rows["export"] = f"every format of samix export but {other}, which has no such model"
    if automatic:
        rows["auto"] = ", ".join(
            f"{key}={value:.4g}" for key, value in automatic.items() if key[:8] != "views.b."
        )
    said = [*rows.items(), *(("note", note) for note in splits.notes)]
    print("\n".join(f"{name:<10}{text}" for name, text in said), flush=True)


def finish(trainer: pl.Trainer, folder: RunFolder, monitor: Monitor) -> Run:
    """Print the run's table and return the run."""
    rows = read_metrics(folder.metrics)
    newest = {k: float(v) for row in rows for k, v in row.items() if v}
    if trainer.is_global_zero:
        print(_table(rows, monitor.table(newest), folder), flush=True)
    return Run(folder.path, newest)


def _table(rows: list[dict[str, Any]], found: list[tuple[str, str]], folder: RunFolder) -> str:
    timed = [r for r in rows if r.get("images_per_second") and r.get("seconds")]
    images = sum(float(r["images_per_second"]) * float(r["seconds"]) for r in timed)
    seconds = sum(float(r["seconds"]) for r in timed)
    waited = sum(float(r.get("data_wait") or 0) * float(r["seconds"]) for r in timed)
    loss = [("loss", f"{float(rows[-1]['loss']):.3f}")] if rows and rows[-1].get("loss") else []
    speed = f"{images / max(seconds, 1e-9):.0f}, {waited / max(seconds, 1e-9):.0%} of the time"
    lines = [*loss, *found, ("images/s", f"{speed} waiting for data")]
    lines.append(("encoder", str(folder.encoder)))
    if folder.best.exists():
        lines.append(("best", str(folder.best)))
    board = f", tensorboard --logdir {folder.path}" if folder.tensorboard.is_dir() else ""
    lines.append(("curves", f"{folder.metrics}{board}"))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in lines)
