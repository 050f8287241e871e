"""CPU time per training step of several configurations, measured in turns.

Uses short Lightning fits, set up as in a run, and the clock of a run's metrics.csv.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import absolute, build, compose, quote_paths
from ssl_samix.data.datamodule import DataModule
from ssl_samix.methods.base import BaseMethod
from ssl_samix.trainer import memory_format
from ssl_samix.training.defaults import known_of, resolve_auto
from ssl_samix.training.logging import Pace
from ssl_samix.training.monitors import Recluster
from ssl_samix.training.pretrain import Pretraining
from ssl_samix.training.run import Mode, build_mixing
from ssl_samix.training.supervised import Supervised

# Steps per fit. A Mixer that learns every 2nd, 4th or 8th step does so as often as in a run.
STEPS = 8
ROUNDS = 5  # measured rounds, after a warm-up round
ALWAYS, NEVER = (0.0, 1.0), (1.0, 1.0)  # fractions of a run between which images are mixed
MODES: dict[str, type[Mode]] = {"pretrain": Pretraining, "supervised": Supervised}


class _Clustering(Recluster):
    """Clusters as in a run and records its CPU time, because a run clusters only rarely."""

    cpu_seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cluster, and record the CPU time in seconds."""
        begin = time.process_time()
        super().on_train_epoch_start(trainer, pl_module)
        self.cpu_seconds += time.process_time() - begin


class Candidate:
    """A configuration that is ready to be trained for a few steps.

    Args:
        mode: Training mode.
        words: ``key=value`` arguments.
        data: Data modules of other candidates, by configuration, for sharing.
    """

    def __init__(self, mode: Mode, words: Sequence[str], data: dict[str, DataModule]) -> None:
        self.config, choices = compose(mode.command, quote_paths([*words, "trainer.max_epochs=1"]))
        absolute(self.config)
        pl.seed_everything(self.config.seed, workers=True, verbose=False)
        self.data = _data(mode, self.config, data)
        resolve_auto(self.config, choices, len(self.data.images), known_of(self.data))
        backbone = build(self.config.backbone, image_size=self.data.splits.image_size)
        mixing = build_mixing(self.config, backbone, self.data)
        nowhere = RunFolder("nowhere")  # a run without checkpoints
        self.module: BaseMethod = mode.module(self.config, self.data, nowhere, backbone, mixing)
        self.module.to(memory_format=memory_format(self.module))
        self.window = ALWAYS if mixing is None else (mixing.begin, mixing.end)
        self.steps_per_epoch = 0

    def step_cost(self) -> float:
        """Return the CPU seconds per step, averaged over a run."""
        mixing = self.module.mixing
        if mixing is None or self.window == ALWAYS:
            return self._mean_of_few()
        costs = []  # of mixed and plain steps, since a short fit cannot have the same share of them
        for window in (ALWAYS, NEVER):
            mixing.begin, mixing.end = window
            costs.append(self._mean_of_few())
        share = self.window[1] - self.window[0]
        return share * costs[0] + (1 - share) * costs[1]

    def _mean_of_few(self) -> float:
        """Train for a few steps and return the CPU seconds per step."""
        clusters = _Clustering()
        trainer: pl.Trainer = build(
            self.config.trainer,
            wants_sync_batchnorm=self.module.wants_sync_batchnorm,
            limit_train_batches=STEPS,
            callbacks=[clusters, Pace()],
            logger=False,
            enable_checkpointing=False,
        )
        trainer.fit(self.module, self.data)
        self.steps_per_epoch = len(self.data.train_dataloader())
        step = float(trainer.callback_metrics["cpu_seconds"]) / int(trainer.num_training_batches)
        every = getattr(self.module.mixing, "cluster_every", 1)
        return step + clusters.cpu_seconds / (every * self.steps_per_epoch)


def _data(mode: Mode, config: DictConfig, made: dict[str, DataModule]) -> DataModule:
    """Return the data module of a configuration; configurations with equal data share one."""
    views = config.get("views", config.get("augment"))
    key = OmegaConf.to_yaml(OmegaConf.create({"data": config.data, "views": views}))
    if key not in made:
        made[key] = build(
            config.data, views=mode.views(config), seed=config.seed, labelled=mode.labelled
        )
    return made[key]


def measured(command: str, words: Sequence[Sequence[str]], rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the CPU time per step of configurations, measured in turns.

    Args:
        command: ``pretrain`` or ``supervised``.
        words: Arguments of each configuration.
        rounds: Number of measurements of each, after one warm-up.

    Returns:
        ``cpu_seconds_per_step`` (rounds, configurations) and ``steps_per_epoch``.

    Raises:
        UserError: As training does.
    """
    mode = MODES[command]()
    data: dict[str, DataModule] = {}
    candidates = [Candidate(mode, each, data) for each in words]
    times = [[each.step_cost() for each in candidates] for _ in range(rounds + 1)]
    return {
        "cpu_seconds_per_step": times[1:],
        "steps_per_epoch": [each.steps_per_epoch for each in candidates],
    }
