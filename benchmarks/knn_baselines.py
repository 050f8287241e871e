"""Baselines of a pretrained encoder: raw pixels, and the same encoder untrained.

    python benchmarks/knn_baselines.py [--device cuda] data=folder data.root=<folder>

The arguments are any keys of `samix pretrain`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from common import Options, exit_on_error, print_header, print_table
from torch import nn

from ssl_samix.config.compose import build, compose


def rows(words: Sequence[str], device: str) -> list[list[str]]:
    """Return kNN and RankMe of both on the chosen data."""
    config, _ = compose("pretrain", list(words))
    data = build(config.data, views=build(config.views), seed=config.seed)
    monitor = build(config.callbacks.knn)
    pl.seed_everything(config.seed, verbose=False)
    backbone = build(config.backbone, image_size=data.splits.image_size)
    encoders = {"raw pixels": nn.Flatten(), "untrained encoder": backbone}
    measured = []
    for name, encoder in encoders.items():
        got = monitor.measure_encoder(encoder.to(device), data, torch.device(device))
        keys = ("knn/top1", "knn/top1_k200", "rankme")
        measured.append([name, *(f"{got.get(key, float('nan')):.2f}" for key in keys)])
    return measured


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Options(__doc__, cpu={}, cuda={}, about={})
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="of samix pretrain")
    args = parser.read(arguments)
    measured = rows(args.words, args.device)
    print_header("Baselines of kNN", args, precision="32-true")
    print_table(("", "kNN top-1, k = 20", "k = 200", "RankMe"), measured)


if __name__ == "__main__":
    main()
