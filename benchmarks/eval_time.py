"""What the protocols cost once the features are there: kNN search and votes, heads, L-BFGS.

python benchmarks/eval_time.py [--train 50000] [--test 10000] [--dim 512] [--classes 10]

Features are clusters with noise, so that nothing is separable and nothing is lost. Seconds are
printed as wall clock and as process CPU time, which other work on the machine weighs on less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ssl_samix.evaluation.knn import neighbours, vote_grid
from ssl_samix.evaluation.linear import logistic_regression, probe

KS, TEMPERATURES = (10, 20, 100, 200), (0.07, 0.1)


def features(count: int, centres: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw (count, D) features and their (count,) labels."""
    labels = torch.randint(len(centres), (count,), generator=generator)
    noise = torch.randn(count, centres.shape[1], generator=generator)
    return centres[labels] + 16 * noise, labels


def timed(name: str, work: Callable[[], float]) -> None:
    """Print a row."""
    wall, cpu = time.perf_counter(), time.process_time()
    top1 = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"| {name} | {wall:.1f} | {cpu:.1f} | {top1:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"train": 50_000, "test": 10_000, "dim": 512, "classes": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(options.classes, options.dim, generator=generator)
    train, labels = features(options.train, centres, generator)
    test, answers = features(options.test, centres, generator)

    def knn() -> float:
        near, rows = neighbours(train, test, max(KS))
        votes = vote_grid(near, labels[rows], answers, options.classes, KS, TEMPERATURES)
        return max(vote.top1 for vote in votes)

    print(f"{options.train} x {options.dim} features, {options.classes} classes, ", end="")
    print(f"{options.test} test images, {torch.get_num_threads()} threads\n")
    print("| | seconds | CPU seconds | top-1 |\n|---|---|---|---|", flush=True)
    timed("kNN, 8 settings", knn)
    given = (train, labels, test, answers, options.classes)
    timed("heads, whole grid, and the winner again on all", lambda: probe(*given).top1)
    timed("L-BFGS, all C, and the winner again on all", lambda: logistic_regression(*given).top1)


if __name__ == "__main__":
    main()
