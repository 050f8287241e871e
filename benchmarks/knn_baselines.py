"""What a pretrained encoder has to beat: raw pixels and the same encoder untrained.

python benchmarks/knn_baselines.py data=folder data.root=<folder> [any key of samix pretrain]
"""

from __future__ import annotations

import sys

import pytorch_lightning as pl
import torch
from torch import nn

from ssl_samix.config import build, compose


def main() -> None:
    config, _ = compose("pretrain", sys.argv[1:])
    data = build(config.data, views=build(config.views), seed=config.seed)
    monitor = build(config.callbacks.knn)
    pl.seed_everything(config.seed, verbose=False)
    backbone = build(config.backbone, image_size=data.splits.image_size)
    encoders = {"raw pixels": nn.Flatten(), "untrained encoder": backbone}
    print(f"{'':<20}{'kNN top-1 k=20':>16}{'k=200':>8}{'RankMe':>8}")
    for name, encoder in encoders.items():
        got = monitor.measure(encoder, data, torch.device("cpu"))
        cells = [got["knn/top1"], got.get("knn/top1_k200", float("nan")), got["rankme"]]
        print(f"{name:<20}{cells[0]:>16.2f}{cells[1]:>8.2f}{cells[2]:>8.1f}")


if __name__ == "__main__":
    main()
