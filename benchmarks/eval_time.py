"""Time the protocols on given features: kNN search and votes, heads, L-BFGS.

    python benchmarks/eval_time.py [--device cuda] [--train 50000] [--classes 10]

Features are noisy clusters, neither separable nor random. Seconds are wall-clock seconds; CPU
seconds, of all threads, depend less on other work on the machine: with one thread, they are
compared with the target.
kNN and L-BFGS (faiss, scikit-learn) compute on the CPU wherever the features are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from common import Options, print_header, print_table, progress, seconds
from goals import print_goals
from torch import Tensor

from ssl_samix.evaluation.knn import neighbours, vote_grid
from ssl_samix.evaluation.linear import (
    Examples,
    Grid,
    Scaling,
    logistic_regression,
    measure,
    probe,
    train_heads,
)

KS, TEMPERATURES = (10, 20, 100, 200), (0.07, 0.1)
HEADS = Grid(learning_rates=(0.3, 1.0, 3.0, 10.0, 30.0, 100.0))  # and 4 weight decays: 24
HEADS_ROW = "24 heads on all images"


class Features:
    """Random labelled features, on the device.

    Args:
        args: The options: counts, width, classes.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.classes = args.classes
        self.generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(args.classes, args.dim, generator=self.generator)
        self.train, self.labels = self._draw(args.train, args.device)
        self.test, self.answers = self._draw(args.test, args.device)

    def _draw(self, count: int, device: str) -> tuple[Tensor, Tensor]:
        labels = torch.randint(self.classes, (count,), generator=self.generator)
        noise = torch.randn(count, self.centres.shape[1], generator=self.generator)
        return (self.centres[labels] + 16 * noise).to(device), labels

    def knn(self) -> float:
        """Return the best top-1 of a grid of kNN settings."""
        near, rows = neighbours(self.train, self.test, max(KS))
        labels = self.labels[rows]
        votes = vote_grid(near, labels, self.answers, self.classes, KS, TEMPERATURES)
        return max(vote.top1 for vote in votes)

    def heads(self) -> float:
        """Train 24 heads on all images; return the best top-1 of the test images."""
        rows = torch.arange(len(self.train), device=self.train.device)
        scaling = Scaling(self.train, rows)
        data = Examples(self.train, self.labels.to(rows.device), rows, scaling)
        settings = HEADS.settings()
        pairs = [(s["learning_rate"], s["weight_decay"]) for s in settings]
        epochs = HEADS.epochs_for(len(rows))
        heads = train_heads(data, self.classes, pairs, epochs, HEADS.batch_size, seed=0)
        every = torch.arange(len(self.test), device=rows.device)
        test = Examples(self.test, self.answers.to(rows.device), every, scaling)
        return float(measure(heads, test)[0].max())

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Arguments of the protocols."""
        return self.train, self.labels, self.test, self.answers, self.classes


def row(name: str, work: Callable[[], float], device: str, spent: dict[str, float]) -> list[str]:
    """Return a row of the table, and store the seconds for the targets."""
    progress(name)
    top1: list[float] = []
    cpu = time.process_time()
    wall = seconds(lambda: top1.append(work()), device, wall=True)
    cpu = time.process_time() - cpu
    spent[name] = cpu if device == "cpu" and torch.get_num_threads() == 1 else wall
    return [name, f"{wall:.1f}", f"{cpu:.1f}", f"{top1[0]:.1f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    sizes = {"train": 50_000, "test": 10_000, "dim": 512, "classes": 10}
    about = {"train": "features", "test": "to be classified", "dim": "width", "classes": "classes"}
    args = Options(__doc__, cpu=sizes, cuda=sizes, about=about).read(arguments)
    print_header("Protocols, after extraction", args)
    features = Features(args)
    works = {
        HEADS_ROW: features.heads,
        "kNN, 8 settings": features.knn,
        "heads, whole grid, and the winner again on all": lambda: probe(*features.given).top1,
        "L-BFGS, all C, and the winner again on all": lambda: (
            logistic_regression(*features.given).top1
        ),
    }
    spent: dict[str, float] = {}
    rows = (row(name, work, args.device, spent) for name, work in works.items())
    print_table(("", "seconds", "CPU seconds", "top-1"), rows)
    as_stated = all(getattr(args, name) == value for name, value in sizes.items())
    print_goals({"heads": spent[HEADS_ROW]} if as_stated else {})


if __name__ == "__main__":
    main()
