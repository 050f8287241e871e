"""The default command against lightly's examples at equal processor time, and no training.

    python benchmarks/out_of_the_box.py --minutes 5 --csv docs/results/out_of_the_box.csv \
        data=folder data.root=cifar10 data.limit=10000 data.image_size=32

The other arguments are those of `samix pretrain`: images and network, which all sides share. Every
side learns on one thread for so many minutes, views included, measuring excluded; then `samix knn`
and `samix linear` measure its encoder. A finished side has a row and is not repeated.

`default`       `samix pretrain` as shipped, its epochs chosen to fill the time
`none`          likewise, with `mixup=none`
`tuned`         likewise, with the arguments of `--tuned`
`lightly-<m>`   lightly's PyTorch example of simclr, moco or byol, its settings and views
`train-<m>`     LightlyTrain's own command, with its method simclr or dino
`pixels`        raw pixels, no network
`untrained`     the network as it is initialised
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightly_command
import pytorch_lightning as pl
import torch
from common import MEAN, METHODS, STD, Options, exit_on_error, print_header, print_table, progress
from encoders import top1
from lightly_examples import LightlySide, lightly_transform
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ssl_samix.artifacts.encoder import save_encoder
from ssl_samix.artifacts.results import read_rows, write_rows
from ssl_samix.config.compose import build, compose
from ssl_samix.data.datamodule import DataModule
from ssl_samix.models.backbone import Backbone
from ssl_samix.training.monitors import KNNMonitor
from ssl_samix.training.pretrain import train_from_words

BATCH = 256  # of lightly's examples
CALIBRATION = 3  # epochs; the last one is timed
TRAIN = ("train-simclr", "train-dino")
OURS = ("default", "none", "tuned")
COLUMNS = ("side", "minutes", "seed", "epochs", "knn_top1", "linear_top1", "cpu_seconds", "words")


def pretrain(words: Sequence[str], seed: int, seconds: float, out: Path) -> tuple[int, float]:
    """Run `samix pretrain` for about so many CPU seconds; return epochs and seconds of training."""
    quiet = ["callbacks.knn.every_n_epochs=100000", "callbacks.pictures.every_n_epochs=100000"]
    trial = out.with_name(f"{out.name}-trial")
    shutil.rmtree(trial, ignore_errors=True)
    arguments = [*words, *quiet, f"seed={seed}"]
    first = train_from_words([*arguments, f"trainer.max_epochs={CALIBRATION}", f"out={trial}"])
    epochs = max(1, round(seconds / first.metrics["cpu_seconds"]))
    run = train_from_words([*arguments, f"trainer.max_epochs={epochs}", f"out={out}"])
    rows = read_rows(run.out / "metrics.csv")
    return epochs, sum(float(row["cpu_seconds"]) for row in rows)


def data_and_network(words: Sequence[str], seed: int) -> tuple[DataModule, Backbone]:
    """Build the images and an untrained network."""
    config, _ = compose("pretrain", list(words))
    data: DataModule = build(config.data, views=build(config.views), seed=seed)
    pl.seed_everything(seed, verbose=False)
    return data, build(config.backbone, image_size=data.splits.image_size)


def lightly(method: str, words: Sequence[str], seed: int, seconds: float, out: Path) -> int:
    """Train lightly's example for so many CPU seconds; return the epochs that it has begun."""
    data, backbone = data_and_network(words, seed)
    settings, size, images = backbone.settings, data.splits.image_size, data.splits.train
    side = LightlySide(method, settings["name"], size, settings["width"], "cpu")
    transform = lightly_transform(method, size)
    batch, start, epoch = min(BATCH, len(images)), time.process_time(), 0
    while time.process_time() - start < seconds:
        epoch += 1
        order = torch.randperm(len(images))
        for first in range(0, len(images) - batch + 1, batch):
            side.step(_views(images, order[first : first + batch], transform))
            if time.process_time() - start >= seconds:
                break
    online: Any = side.model["online"]
    backbone.trunk.load_state_dict(online[0].state_dict())
    save(backbone, data, out)
    return epoch


def _views(images: Any, rows: Tensor, transform: Any) -> tuple[Tensor, ...]:
    pairs = [transform(to_pil_image(images.original(int(row)))) for row in rows]
    return tuple(torch.stack(list(view)) for view in zip(*pairs, strict=True))


def save(backbone: Backbone, data: DataModule, out: Path) -> None:
    """Write a network as `samix pretrain` does, normalised as in lightly's transforms."""
    meta = {
        "backbone": backbone.settings,
        "feature_dim": backbone.feature_dim,
        "image_size": data.splits.image_size,
        "mean": list(MEAN),
        "std": list(STD),
    }
    out.mkdir(parents=True, exist_ok=True)
    save_encoder(out / "encoder.safetensors", backbone, meta)


def pixels(words: Sequence[str], seed: int) -> list[str]:
    """Return kNN of raw pixels, and a logistic regression on them, in percent."""
    data, _ = data_and_network(words, seed)
    monitor = KNNMonitor(k=20)
    near = monitor.measure_encoder(nn.Flatten(), data, torch.device("cpu"))["knn/top1"]
    splits = data.splits
    assert splits.bank is not None
    assert splits.val is not None
    sets = [
        (images.load(range(len(images))).flatten(1).numpy() / 255, images.labels.numpy())
        for images in (splits.bank, splits.val)
    ]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    (x, y), (x_val, y_val) = sets
    return [f"{near:.2f}", f"{100 * model.fit(x, y).score(x_val, y_val):.2f}"]


def measured(side: str, args: argparse.Namespace, seed: int, minutes: float) -> list[str]:
    """Train and measure one side; return the cells from ``epochs`` on."""
    words, out = list(args.words), Path(args.out) / f"{side}-{minutes:g}min-s{seed}"
    if side == "pixels":
        return ["", *pixels(words, seed), ""]
    shutil.rmtree(out, ignore_errors=True)
    if side in OURS:
        words += {"none": ["mixup=none"], "tuned": args.tuned.split()}.get(side, [])
        epochs, seconds = pretrain(words, seed, 60 * minutes, out)
        tops = [top1(out, protocol) for protocol in ("knn", "linear")]
        return [str(epochs), *tops, f"{seconds:.0f}"]
    if side == "untrained":
        data, backbone = data_and_network(words, seed)
        save(backbone, data, out)
        spent = ["", ""]
    elif side in TRAIN:
        data, backbone = data_and_network(words, seed)
        method, trunk = side.removeprefix("train-"), backbone.trunk
        images, width = data.splits.train, backbone.feature_dim
        epochs, seconds = lightly_command.train(
            method,
            trunk,
            width,
            images,
            seed,
            60 * minutes,
            out,  # type: ignore[arg-type]
        )
        save(backbone, data, out)
        spent = [str(epochs), f"{seconds:.0f}"]
    else:
        start = time.process_time()
        epochs = lightly(side.removeprefix("lightly-"), words, seed, 60 * minutes, out)
        spent = [str(epochs), f"{time.process_time() - start:.0f}"]
    given = [word for word in words if word.startswith("data")]
    tops = [top1(out, protocol, given) for protocol in ("knn", "linear")]
    return [spent[0], *tops, spent[1]]


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure each side that has no row yet, and print the table."""
    sides = [*OURS, *(f"lightly-{method}" for method in METHODS), *TRAIN, "untrained", "pixels"]
    parser = Options(__doc__, cpu={}, cuda={}, about={})
    parser.add_argument("--sides", default=",".join(s for s in sides if s not in ("tuned", *TRAIN)))
    parser.add_argument("--minutes", default="5", help="CPU minutes of training, comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--tuned", default="", help="arguments of the side tuned, in quotes")
    parser.add_argument("--out", default="runs/out_of_the_box", help="folder of the runs")
    parser.add_argument("--csv", default="out_of_the_box.csv", help="table of the rows")
    parser.add_argument("words", nargs="+", help="arguments of samix pretrain: images and network")
    args = parser.read(arguments)
    names = parser.names("sides", args.sides, sides)
    print_header("Out of the box, at equal processor time", args)
    path = Path(args.csv)
    rows = read_rows(path) if path.exists() else []
    shown = " ".join(word for word in args.words if not word.startswith("data.root="))
    for seed, minutes in itertools.product(args.seeds.split(","), args.minutes.split(",")):
        for side in names:
            key = {"side": side, "minutes": minutes, "seed": seed, "words": shown}
            if side in ("untrained", "pixels"):
                key["minutes"] = "0"
            if any(key.items() <= row.items() for row in rows):
                continue
            progress(f"{side}, {minutes} minutes, seed {seed} ...")
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for the table
                cells = measured(side, args, int(seed), float(minutes))
            rows.append({**key, **dict(zip(COLUMNS[3:-1], cells, strict=True))})
            write_rows(path, COLUMNS, rows)
    print_table(COLUMNS[:-1], ([row[name] for name in COLUMNS[:-1]] for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
