"""What a run says at its beginning and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from ssl_samix.callbacks.monitor import Monitor
from ssl_samix.data.datamodule import DataModule
from ssl_samix.run_folder import RunFolder, read_metrics

if TYPE_CHECKING:
    from ssl_samix.evaluation.checkpoint import Encoder
    from ssl_samix.evaluation.classifier import TrainedClassifier


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
        from ssl_samix.evaluation.checkpoint import load_encoder

        return load_encoder(self.out)

    @property
    def classifier(self) -> TrainedClassifier:
        """The trained classifier, in eval mode; of a run of ``train_supervised``."""
        from ssl_samix.evaluation.classifier import load_classifier

        return load_classifier(self.out)


def announce(
    trainer: pl.Trainer,
    config: DictConfig,
    choices: dict[str, str],
    folder: RunFolder,
    module: Any,
    data: DataModule,
    lines: dict[str, str],
) -> None:
    """Say, in a few lines, what is about to happen, and what was chosen for the user."""
    if not trainer.is_global_zero:
        return
    splits, backbone = data.splits, module.backbone.settings
    classes = len(splits.classes)
    batch = data.batch_size * trainer.accumulate_grad_batches
    weights = sum(p.numel() for p in module.backbone.parameters())
    device = trainer.strategy.root_device.type
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    rows = {
        "data": f"{choices['data']}: {len(splits.train)} images at {splits.image_size} px, "
        + (f"{classes} classes, {lines['labels']}" if classes else "no labels"),
        "encoder": f"{backbone['name']}, width {backbone['width']}, {backbone['stem']} stem, "
        f"{weights / 1e6:.1f} M weights",
        "method": f"{lines['method']}, mixup {choices['mixup']}, {config.trainer.max_epochs} "
        f"epochs, batch {batch}, learning rate {module.recipe.scaled_lr(batch):.3g}",
        "machine": f"{trainer.world_size} x {device}{threads}, precision {trainer.precision}",
        "out": f"{folder.path}" + (", continued from last.ckpt" if folder.last.exists() else ""),
    }
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
    lines = [*found, ("images/s", f"{images / max(seconds, 1e-9):.0f}")]
    lines.append(("encoder", str(folder.encoder)))
    if folder.best.exists():
        lines.append(("best", str(folder.best)))
    lines.append(("curves", f"{folder.metrics}, tensorboard --logdir {folder.path}"))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in lines)
