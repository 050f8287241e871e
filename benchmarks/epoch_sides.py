"""Epochs of lightly's example, and a callback that times ours and alternates with it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytorch_lightning as pl
from common import progress, seconds, synchronize
from epoch_data import PILImages, TimedLoader
from lightly_examples import LightlySide, lightly_transform

from ssl_samix.data.datamodule import DataModule
from ssl_samix.training.monitors import KNNMonitor


class LightlyEpochs:
    """Epochs of lightly's example.

    Args:
        method: Name of the method.
        data: Our data module, whose images it uses.
        args: The options.
    """

    def __init__(self, method: str, data: DataModule, args: argparse.Namespace) -> None:
        self.device = args.device
        self.side = LightlySide(method, args.backbone, args.size, args.width, args.device)
        self.loader = TimedLoader(
            PILImages(data.splits.train, lightly_transform(method, args.size)),
            batch_size=args.batch,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
        )

    def run(self) -> None:
        """Train for an epoch, as the examples do."""
        for views, _ in self.loader:
            self.side.step(tuple(view.to(self.device) for view in views))


class EpochTimes(pl.Callback):
    """Times the epochs of our trainer, and runs one of lightly's after each.

    Args:
        lightly: lightly's side.
        monitor: The kNN monitor, which measures once, at the end.
    """

    def __init__(self, lightly: LightlyEpochs, monitor: KNNMonitor) -> None:
        self.lightly, self.monitor = lightly, monitor
        self.ours: list[tuple[float, float]] = []  # seconds per epoch, and of waiting in it
        self.theirs: list[tuple[float, float]] = []
        self.views = self.measured = 0.0  # seconds of an epoch's views, of a measurement
        self.start = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        trainer.train_dataloader.waited = 0.0
        synchronize(module.device.type)
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop the clock, and run an epoch of lightly's."""
        device = module.device.type
        synchronize(device)
        spent = time.perf_counter() - self.start
        self.ours.append((spent, trainer.train_dataloader.waited))
        self.lightly.loader.waited = 0.0
        spent = seconds(self.lightly.run, device, wall=True)
        self.theirs.append((spent, self.lightly.loader.waited))
        progress(f"epoch {len(self.ours)} of {trainer.max_epochs}")
        if len(self.ours) == trainer.max_epochs:
            self._look(trainer, module)

    def _look(self, trainer: pl.Trainer, module: Any) -> None:
        """Time the views of an epoch and one measurement of the monitor, separately."""
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        device = module.device.type
        if data.views.per_image is None:
            pixels = data.splits.train.load(range(data.batch_size)).to(module.device)
            times = [seconds(lambda: data.views(pixels), device, wall=True) for _ in range(4)]
            self.views = median(times[1:]) * trainer.num_training_batches
        with trainer.precision_plugin.forward_context():
            self.measured = seconds(
                lambda: self.monitor.measure_encoder(module.backbone, data, module.device),
                device,
                wall=True,
            ) / self.monitor.interval(data)

    def rows(self, method: str, images: int) -> list[list[str]]:
        """Return lightly's and our row of the table."""
        rows = []
        for side, epochs in (("lightly as shipped", self.theirs), ("ours", self.ours)):
            spent, waiting = median(e for e, _ in epochs[1:]), share(epochs)
            ours = side == "ours"
            views = f"{100 * self.views / spent:.2f}" if ours else ""
            ratio = f"{self.ratio:.2f}" if ours else ""
            cells = [f"{spent:.2f}", f"{images / spent:.0f}", ratio, f"{waiting:.2f}", views]
            rows.append([method, side, *cells])
        return rows

    @property
    def ratio(self) -> float:
        """lightly's time divided by ours."""
        pairs = zip(self.theirs[1:], self.ours[1:], strict=True)
        return median(theirs[0] / ours[0] for theirs, ours in pairs)

    @property
    def waiting(self) -> float:
        """Share of waiting in our epoch, in percent."""
        return share(self.ours)

    @property
    def monitoring(self) -> float:
        """Share of the monitor in training time at its automatic interval, in percent."""
        return 100 * self.measured / median(spent for spent, _ in self.ours[1:])


def share(epochs: Sequence[tuple[float, float]]) -> float:
    return 100 * median(waited / spent for spent, waited in epochs[1:])
