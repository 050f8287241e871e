"""What a training step costs in processor time, several configurations by turns.

Short fits by Lightning, as a run makes them, with the clock of a run's own metrics.csv.
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

# Of a fit: a Mixer that learns in every 2nd, 4th or 8th step does so as often as in a run.
STEPS = 8
ROUNDS = 5  # that count, after one that does not
ALWAYS, NEVER = (0.0, 1.0), (1.0, 1.0)  # parts of a run in which images are mixed
MODES: dict[str, type[Mode]] = {"pretrain": Pretraining, "supervised": Supervised}


class _Clustering(Recluster):
    """Clusters as in a run, and times itself: a run does so once in many steps."""

    cpu_seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cluster, and note the processor time."""
        begin = time.process_time()
        super().on_train_epoch_start(trainer, pl_module)
        self.cpu_seconds += time.process_time() - begin


class Candidate:
    """One configuration, ready to be trained for a few steps.

    Args:
        mode: Of training.
        words: ``key=value`` words.
        data: Data modules of other candidates, by their configuration.
    """

    def __init__(self, mode: Mode, words: Sequence[str], data: dict[str, DataModule]) -> None:
        self.config, choices = compose(mode.command, quote_paths([*words, "trainer.max_epochs=1"]))
        absolute(self.config)
        pl.seed_everything(self.config.seed, workers=True, verbose=False)
        self.data = _data(mode, self.config, data)
        resolve_auto(self.config, choices, len(self.data.images), known_of(self.data))
        backbone = build(self.config.backbone, image_size=self.data.splits.image_size)
        mixing = build_mixing(self.config, backbone, self.data)
        nowhere = RunFolder("nowhere")  # a run that has no checkpoint
        self.module: BaseMethod = mode.module(self.config, self.data, nowhere, backbone, mixing)
        self.module.to(memory_format=memory_format(self.module))
        self.window = ALWAYS if mixing is None else (mixing.begin, mixing.end)
        self.steps_per_epoch = 0

    def step_cost(self) -> float:
        """Return the CPU seconds of a step, in the mean over a run."""
        mixing = self.module.mixing
        if mixing is None or self.window == ALWAYS:
            return self._mean_of_few()
        costs = []  # of both kinds of steps: so few steps cannot hold the window's share of them
        for window in (ALWAYS, NEVER):
            mixing.begin, mixing.end = window
            costs.append(self._mean_of_few())
        share = self.window[1] - self.window[0]
        return share * costs[0] + (1 - share) * costs[1]

    def _mean_of_few(self) -> float:
        """Train a few steps and return the CPU seconds of one."""
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
    """Return the data module of a configuration; policies of a study share one."""
    views = config.get("views", config.get("augment"))
    key = OmegaConf.to_yaml(OmegaConf.create({"data": config.data, "views": views}))
    if key not in made:
        made[key] = build(
            config.data, views=mode.views(config), seed=config.seed, labelled=mode.labelled
        )
    return made[key]


def measured(command: str, words: Sequence[Sequence[str]], rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure configurations by turns.

    Args:
        command: ``pretrain`` or ``supervised``.
        words: Of each configuration.
        rounds: How often each is measured, after once that does not count.

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
