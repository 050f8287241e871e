"""Time an epoch with views and loader: ours in Lightning's trainer, and lightly's examples.

    python benchmarks/epoch_time.py [--device cuda] [--data <folder>] [--policy samix]

lightly's side is its PIL transform in the processes of a DataLoader and the step of its example, as
shipped; ours is the data module and the trainer of `samix pretrain`, without callbacks. Both have
the same images, network and batch. Epochs of both sides alternate in one process, and every pair
but the first gives a ratio; times are medians of wall-clock seconds. `waiting` is the time of
waiting for the loader's next batch, `views` that of drawing and computing views on the device, both
as shares of the epoch. Images are random, or those of a folder: CIFAR-10 (`cifar-10-batches-py`),
or pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from common import METHODS, Options, exit_on_error, print_header, print_table, progress
from epoch_data import TimedLoader, random_splits, words
from epoch_sides import EpochTimes, LightlyEpochs
from flop_model import POLICIES
from goals import print_goals
from our_step import configuration, our_method

from ssl_samix.config.compose import build
from ssl_samix.data.datamodule import DataModule
from ssl_samix.data.datasets import Splits
from ssl_samix.trainer import PRECISIONS, choose_precision, silence_lightning

COLUMNS = ("method", "side", "epoch s", "images/s", "lightly / ours", "waiting %", "views %")


def compare(method: str, splits: Splits | None, args: argparse.Namespace) -> tuple[EpochTimes, int]:
    """Train both sides of a method; return the timings, and the number of images of an epoch."""
    chosen = [*words(args.data, args.images, args.size), f"data.batch_size={args.batch}"]
    config = configuration(
        method, args.backbone, args.width, [*POLICIES[args.policy].words, *chosen]
    )
    with ExitStack() as stack:
        if splits is not None:
            target = "ssl_samix.data.datamodule.load_splits"
            stack.enter_context(patch(target, return_value=splits))
        data: DataModule = build(config.data, views=build(config.views), seed=0)
    config.trainer.max_epochs = args.rounds + 1
    config.trainer.accelerator = {"cuda": "gpu"}.get(args.device, args.device)
    config.trainer.devices = 1
    config.trainer.precision = args.precision
    times = EpochTimes(LightlyEpochs(method, data, args), build(config.callbacks.knn))
    trainer = build(
        config.trainer,
        wants_sync_batchnorm=False,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
    )
    with patch("ssl_samix.data.datamodule.DataLoader", TimedLoader):
        trainer.fit(our_method(config, args.size, args.device), data)
    return times, trainer.num_training_batches * args.batch


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Options(
        __doc__,
        cpu={"batch": 64, "size": 32, "width": 16, "images": 512, "rounds": 2, "workers": 2},
        cuda={"batch": 256, "size": 32, "width": 64, "images": 25_600, "rounds": 3, "workers": 16},
        about={
            "batch": "images per step",
            "size": "side of the views in px",
            "width": "channels of the first stage",
            "images": "of an epoch",
            "rounds": "epochs that count",
            "workers": "processes of lightly's loader",
        },
    )
    parser.add_argument("--backbone", choices=("resnet18", "resnet50"), default="resnet18")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--policy", choices=tuple(POLICIES), default="none", help="of ours")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="ours")
    parser.add_argument("--data", metavar="FOLDER", help="of images; random ones without it")
    args = parser.read(arguments)
    args.methods = parser.names("methods", args.methods, METHODS)
    if args.precision == "auto":
        args.precision = choose_precision(args.device)
    if not 8 <= args.batch <= args.images:
        parser.error("--batch is at least 8, and at most the number of images")
    if args.data is not None and not Path(args.data).is_dir():
        parser.error(f"--data: {args.data} is not a folder")
    return args


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    silence_lightning()
    splits = None if args.data else random_splits(args.images, args.size)
    print_header("An epoch with views and loader", args)
    every: list[EpochTimes] = []

    def rows() -> Iterator[list[str]]:
        for method in args.methods:
            progress(method)
            times, images = compare(method, splits, args)
            every.append(times)
            yield from times.rows(method, images)

    try:  # print now: the next method may fail
        print_table(COLUMNS, rows())
    finally:
        print_goals(goals(every, args.device))


def goals(every: Sequence[EpochTimes], device: str) -> dict[str, float]:
    """Return the values of the targets: the worst over all methods."""
    if not every:
        return {}
    return {
        f"epoch {device}": min(times.ratio for times in every),
        "wait": max(times.waiting for times in every),
        "monitor": max(times.monitoring for times in every),
    }


if __name__ == "__main__":
    main()
