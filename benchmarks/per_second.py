"""What gives the better encoder at equal processor time: variants of the default command.

    python benchmarks/per_second.py --variants base,size67,same67 --minutes 5 --seeds 0 \
        --csv docs/results/per_second.csv \
        data=folder data.root=cifar10 data.limit=10000 data.image_size=24

The other arguments are those of `samix pretrain`. Every run learns on one thread for so many CPU
minutes, views included, measuring excluded; its epochs are chosen by a trial of the first seed.
`samix knn` and `samix linear` measure its encoder as it was exported, the moving average of its
weights (`ema`, momentum 0.99), and the encoder with normalisation statistics of whole, plain
images (`bn`). A finished run has a row and is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import Options, exit_on_error, print_header, print_table, progress
from encoders import top1
from torch import Tensor, nn

from ssl_samix.artifacts.encoder import save_encoder
from ssl_samix.artifacts.results import read_rows, write_rows
from ssl_samix.data.datamodule import StepData
from ssl_samix.data.views import normalize
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.models.ema import EMATwin
from ssl_samix.training import run as fitting
from ssl_samix.training.pretrain import Pretraining, train_from_words
from ssl_samix.types import Batch, MixPlan

MOMENTUM = 0.99  # of the moving average, per step
STATISTICS = (20, 256)  # batches and images of each, for the normalisation statistics
CALIBRATION = 5  # epochs of the trial
SMALL_UNTIL = 0.6  # share of the run at two thirds of the side
SMALL = 2 / 3
VARIANTS = {
    "base": ["mixup.size=1.0"],
    "none": ["mixup=none"],
    "mixup": ["mixup=mixup", "mixup.size=1.0"],
    "size50": ["mixup.size=0.5"],
    "size67": ["mixup.size=0.67"],
    "same67": ["mixup=mixup", "mixup.size=0.67"],  # control: lam = 1, no mixing
    "progressive": ["mixup.size=1.0"],
    "progressive_none": ["mixup=none"],
    "first_half": ["mixup.size=1.0", "mixup.during=[0,0.5]"],
    "second_half": ["mixup.size=1.0", "mixup.during=[0.5,1]"],
    "fraction": ["mixup.size=1.0", "mixup.fraction=0.5"],
    "batch128": ["mixup.size=1.0", "data.batch_size=128"],
    "adamw": ["mixup.size=1.0", "optimizer=adamw"],
    "lars": ["mixup.size=1.0", "optimizer=lars", "optimizer.lr=2.0"],
}
COLUMNS = (
    "variant", "seed", "epochs", "cpu_seconds", "knn", "linear", "knn_ema", "linear_ema", "knn_bn",
    "linear_bn", "minutes", "words",
)  # fmt: skip


class Average(pl.Callback):
    """Keeps a moving average of the encoder's weights and statistics."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Copy the encoder."""
        self.twin = EMATwin(module.backbone)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Follow it."""
        self.twin.update(module.backbone, MOMENTUM, statistics=True)


@contextlib.contextmanager
def watched(variant: str) -> Iterator[None]:
    """Train a variant, with its encoders beside the exported one in `ema/` and `bn/`."""
    average, build_trainer = Average(), fitting._trainer
    save, draw = Pretraining.save, MixObjective.draw
    views = StepData.on_after_batch_transfer

    def trainer_with_average(*arguments: Any) -> pl.Trainer:
        trainer = build_trainer(*arguments)
        trainer.callbacks.insert(0, average)  # type: ignore[attr-defined]
        return trainer

    def save_all(self: Pretraining, folder: Any, module: Any, meta: dict[str, Any]) -> None:
        save(self, folder, module, meta)
        save_encoder(made(folder.path / "ema"), average.twin.module, meta)
        renew_statistics(module.backbone, module.trainer.datamodule)
        save_encoder(made(folder.path / "bn"), module.backbone, meta)

    def unmixed(self: MixObjective, images: Tensor) -> MixPlan:
        plan = draw(self, images)
        return MixPlan(lam=torch.ones_like(plan.lam), partner=plan.partner, rows=plan.rows)

    def small_at_first(self: StepData, batch: Any, index: int) -> Batch:
        drawn = views(self, batch, index)
        trainer: Any = self.trainer
        if trainer.global_step >= SMALL_UNTIL * trainer.estimated_stepping_batches:
            return drawn
        side = round(SMALL * drawn.views[0].shape[-1])
        small = (
            F.interpolate(v, (side, side), mode="bilinear", antialias=True) for v in drawn.views
        )
        return Batch(views=tuple(small), label=drawn.label, index=drawn.index)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(fitting, "_trainer", trainer_with_average))
        stack.enter_context(patch.object(Pretraining, "save", save_all))
        if variant.startswith("same"):
            stack.enter_context(patch.object(MixObjective, "draw", unmixed))
        if variant.startswith("progressive"):
            stack.enter_context(patch.object(StepData, "on_after_batch_transfer", small_at_first))
        yield


def made(folder: Path) -> Path:
    """Create a folder; return the encoder file in it."""
    folder.mkdir(exist_ok=True)
    return folder / "encoder.safetensors"


@torch.no_grad()
def renew_statistics(backbone: nn.Module, data: Any) -> None:
    """Replace the normalisation statistics by those of whole images, over some batches."""
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
    backbone.train()
    batches, size = STATISTICS
    order = torch.randperm(len(data.images))[: batches * size]
    mean, std = torch.tensor(data.splits.mean), torch.tensor(data.splits.std)
    for rows in order.split(size):
        backbone(normalize(data.images.load(rows.tolist()), mean, std))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def pretrain(variant: str, words: Sequence[str], seed: int, epochs: int, out: Path) -> float:
    """Train; return the CPU seconds of training."""
    quiet = ["callbacks.knn.every_n_epochs=100000", "callbacks.pictures.every_n_epochs=100000"]
    shutil.rmtree(out, ignore_errors=True)
    words = [*words, *quiet, *VARIANTS[variant], f"seed={seed}", f"trainer.max_epochs={epochs}"]
    with watched(variant):
        run = train_from_words([*words, f"out={out}"])
    return sum(float(row["cpu_seconds"]) for row in read_rows(run.out / "metrics.csv"))


def trial(variant: str, words: Sequence[str], seconds: float, out: Path) -> int:
    """Return how many epochs of a variant fill so many CPU seconds."""
    spent = pretrain(variant, words, 0, CALIBRATION, out) / CALIBRATION
    return max(1, round(seconds / spent))


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure each variant that has no row yet, and print the table."""
    parser = Options(__doc__, cpu={}, cuda={}, about={})
    parser.add_argument("--variants", default="base,none", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--minutes", type=float, default=5, help="CPU minutes of training")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--out", default="runs/per_second", help="folder of the runs")
    parser.add_argument("--csv", default="per_second.csv", help="table of the rows")
    parser.add_argument("words", nargs="+", help="arguments of samix pretrain")
    args: argparse.Namespace = parser.read(arguments)
    names = parser.names("variants", args.variants, list(VARIANTS))
    print_header("Encoder per processor time", args)
    path = Path(args.csv)
    rows: list[Any] = read_rows(path) if path.exists() else []
    shown = " ".join(word for word in args.words if not word.startswith("data.root="))
    same = {"minutes": f"{args.minutes:g}", "words": shown}
    for seed in args.seeds.split(","):
        for variant in names:
            done = [r for r in rows if {**same, "variant": variant}.items() <= r.items()]
            if any(row["seed"] == seed for row in done):
                continue
            progress(f"{variant}, seed {seed} ...")
            out = Path(args.out) / f"{variant}-s{seed}"
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for the table
                epochs = (
                    int(done[0]["epochs"])
                    if done
                    else trial(variant, args.words, 60 * args.minutes, out)
                )
                seconds = pretrain(variant, args.words, int(seed), epochs, out)
                given = [word for word in args.words if word.startswith("data")]
                tops = [
                    top1(run, protocol, given)
                    for run in (out, out / "ema", out / "bn")
                    for protocol in ("knn", "linear")
                ]
            cells = [variant, seed, str(epochs), f"{seconds:.0f}", *tops, same["minutes"], shown]
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
            write_rows(path, COLUMNS, rows)
    print_table(COLUMNS[:-1], ([row[name] for name in COLUMNS[:-1]] for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
