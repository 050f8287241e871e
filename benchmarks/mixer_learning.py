"""Train Mixers on a frozen encoder, and compare their losses with those of flat masks.

    python benchmarks/mixer_learning.py --epochs 3 runs/simclr mixup.mask=anchored mixup.stage=2

The encoder, its projector and its data are those of a run of `samix pretrain`. Each argument
(several settings of one Mixer: in quotes) is one Mixer, trained from its first step on by the run's
optimizer; without arguments it is that of `mixup=samix`. All values are means over the last epoch.
Flat masks, plain mixup, use the same pairs and ratios in every step: a Mixer whose losses are not
below theirs has learned nothing useful by its own loss.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from common import Options, exit_on_error, print_header, print_table, progress
from torch import Tensor

from ssl_samix.artifacts.checkpoints import read_checkpoint
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import build, compose
from ssl_samix.data.datamodule import DataModule
from ssl_samix.errors import CheckpointError
from ssl_samix.methods.base import BaseMethod
from ssl_samix.mixup.objective import parent_losses, weighted
from ssl_samix.mixup.plan import blend, flat, share
from ssl_samix.mixup.samix_objective import SAMixObjective, local_loss
from ssl_samix.trainer import memory_format
from ssl_samix.training.run import build_optimizer
from ssl_samix.types import Batch, MixPlan

NAMES = ("local", "flat local", "global", "flat global", "slope", "mask_std", "one_sided")


class OnFrozenEncoder(pl.LightningModule):
    """Trains only the Mixer of a method.

    Args:
        method: Pretrained, with an untrained Mixer.
    """

    def __init__(self, method: BaseMethod) -> None:
        super().__init__()
        self.method = method.requires_grad_(False)
        self.mixing: SAMixObjective = method.mixing  # type: ignore[assignment]
        self.mixing.requires_grad_(True)
        self.seen: dict[str, list[float]] = {}

    def configure_optimizers(self) -> Any:
        """Return the run's optimizer and schedule."""
        steps = int(self.trainer.estimated_stepping_batches)
        epochs = self.trainer.max_epochs or 1
        batch: int = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return self.method.recipe.build(
            self.method,
            batch_size=batch,
            total_steps=steps,
            steps_per_epoch=steps // epochs,
            mixer=self.mixing.optimizer,
        )

    def on_train_epoch_start(self) -> None:
        """Reset the means."""
        self.seen = defaultdict(list)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the Mixer's loss, and record its losses and those of flat masks."""
        done = self.global_step / int(self.trainer.estimated_stepping_batches)
        plan = self.mixing.draw(batch.views[0])
        with self.method.memory.step(), patch.object(self.mixing, "draw", lambda images: plan):
            terms = self.mixing.learn(self.method, batch, done)
            numbers = {name.removeprefix("mixer/"): value for name, value in terms.logs.items()}
            numbers |= self.compared(batch, plan)
        for name, value in numbers.items():
            self.seen[name].append(float(value))
        return terms.losses["mixer"]

    @torch.no_grad()
    def compared(self, batch: Batch, plan: MixPlan) -> dict[str, Tensor]:
        """Return the losses of flat masks, and the slope of the Mixer's masks on the ratio."""
        method, mixing = self.method, self.mixing
        images, partners = mixing.sources(method, batch, 0, 1)
        size = images.shape[-1]
        uniform = blend(images, partners, plan, flat(plan.lam, size), plan.lam)
        query = method.frozen_query(uniform.images)
        targets = mixing.targets_of_parents(method, batch, method.targets(batch.views[1]))
        like = parent_losses(
            partial(method.likeness, temperature=mixing.temperature), query, targets, plan.parents
        )
        contrast = parent_losses(method.contrast, query, targets, plan.parents)
        maps = mixing.maps(method, images, partners)
        assert maps is not None
        ratio, own = plan.lam, share(mixing.policy.masks(plan, maps, size))
        off = ratio - ratio.mean()
        return {
            "flat local": local_loss(like, ratio).mean(),
            "flat global": weighted(contrast, ratio).mean(),
            "slope": (off * (own - own.mean())).sum() / off.square().sum(),
        }


def pretrained(config: Any, weights: dict[str, Tensor], mixup: Any) -> BaseMethod:
    """Return the method of a run with its weights and a new Mixer."""
    pl.seed_everything(config.seed, verbose=False)
    backbone = build(config.backbone, image_size=config.data.image_size)
    mixing = build(mixup, backbone=backbone)
    optimizer = build_optimizer(config)
    method: BaseMethod = build(config.method, backbone=backbone, optimizer=optimizer, mixing=mixing)
    kept = {name: w for name, w in weights.items() if not name.startswith("mixing.")}
    method.load_state_dict(kept, strict=False)
    if not any(name.startswith("twin.") for name in kept):
        method.teacher.load_state_dict(method.embedder.state_dict())
    return method.to(memory_format=memory_format(method))  # type: ignore[call-overload, no-any-return]


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Train each Mixer, and print a row for each."""
    default = {"epochs": 3}
    parser = Options(__doc__, cpu=default, cuda=default, about={"epochs": "of each Mixer"})
    parser.add_argument("run", help="folder of a run of samix pretrain")
    parser.add_argument("settings", nargs="*", help="of a Mixer, such as mixup.mask=anchored")
    args = parser.read(arguments)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    folder = RunFolder(args.run)
    config, _ = folder.load_config()
    if not folder.last.exists():
        raise CheckpointError(f"{folder.path} holds no last.ckpt")
    weights = read_checkpoint(folder.last)["state_dict"]
    data: DataModule = build(
        config.data, views=build(config.views), seed=config.seed, labelled=False
    )
    config.data.image_size = data.splits.image_size
    config.trainer.accelerator = "gpu" if args.device == "cuda" else "cpu"
    words = args.settings or ["mixup=samix"]
    mixers = [compose("pretrain", ["mixup=samix", *each.split()])[0].mixup for each in words]
    print_header("What a Mixer learns on a frozen encoder", args)

    def row(setting: str, mixup: Any) -> list[str]:
        progress(f"{setting} ...")
        learner = OnFrozenEncoder(pretrained(config, weights, mixup))
        trainer: pl.Trainer = build(
            config.trainer,
            wants_sync_batchnorm=False,
            max_epochs=args.epochs,
            callbacks=[],
            logger=False,
            enable_checkpointing=False,
        )
        trainer.fit(learner, data)
        means = {name: fmean(values) for name, values in learner.seen.items()}
        return [setting, *(f"{means[name]:.3f}" for name in NAMES)]

    print_table(("Mixer", *NAMES), map(row, words, mixers))


if __name__ == "__main__":
    main(sys.argv[1:])
