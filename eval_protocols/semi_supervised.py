"""Semi-supervised evaluation: three ways to train on a fraction of the labels.

They are fine-tuning the whole network from the encoder; fine-tuning the same network from random
weights, as the baseline without pretraining; and logistic regression on the frozen features, which
is often the best of the three at 1% of the labels. Learning rates and C are chosen within the
labels that are kept; the test images are used once per way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from ssl_samix.config.compose import plain
from ssl_samix.data.subsets import (
    draw_per_class,
    draw_percent,
    read_split,
    write_split,
)
from ssl_samix.errors import ConfigError, check_range
from ssl_samix.evaluation.linear import logistic_regression
from ssl_samix.evaluation.request import ProtocolRequest
from ssl_samix.evaluation.results import Report, Row, table
from ssl_samix.evaluation.source import untrained
from ssl_samix.evaluation.task import Task, open_task
from ssl_samix.evaluation.training import FewLabels, Recipe, finetuned
from ssl_samix.files import expanded
from ssl_samix.training.logging import RunProgress


def check(config: DictConfig) -> None:
    """Check the settings that can be checked without data."""
    check_range("percent", config.percent, 1e-6, 100)
    check_range("held_out", config.held_out, 0.01, 0.5)
    if config.per_class is not None:
        check_range("per_class", config.per_class, 1)
    if config.per_class is not None and config.split is not None:
        raise ConfigError("per_class and split both say which labels are kept: give one")
    recipes(config)


def recipes(config: DictConfig) -> tuple[Recipe, ...]:
    """Return one recipe per pair of learning rates."""
    shared: dict[str, Any] = plain(config.finetune)
    trunk, factors = shared.pop("backbone_lr"), shared.pop("head_factor")
    if not trunk or not factors:
        raise ConfigError("finetune.backbone_lr and finetune.head_factor need at least one value")
    for value in (*trunk, *factors):
        check_range("finetune.backbone_lr and finetune.head_factor", value, 1e-12)
    shared["milestones"] = tuple(shared["milestones"])
    return tuple(Recipe(lr=(lr * f,), backbone_lr=lr, **shared) for lr in trunk for f in factors)


def run(request: ProtocolRequest) -> Path:
    """Run the protocol, print its results, and return the folder of the results."""
    config, task = request.config, open_task(request)
    picks = labelled(config, task)
    train = task.labelled[0]
    report = Report(request)
    write_split(report.folder / "split.txt", train, picks)
    print(f"{len(picks)} of {len(train)} training images keep their labels: split.txt", flush=True)
    bars = [RunProgress()] if sys.stderr.isatty() else []
    few = FewLabels(task, picks, config.data, config.held_out, config.seed, bars)

    def tuned(variant: str, backbone: Any) -> Row:
        print(variant, flush=True)
        with report.timed(variant):
            top1, top5, settings = finetuned(few, backbone, recipes(config), print)
        held_out[variant] = settings.pop("held_out", {})
        return Row(variant, {"top1": top1, "top5": top5}, settings)

    held_out: dict[str, Any] = {}
    share = kept(config)
    rows = [tuned(f"fine-tuned {share}", task.encoder.backbone)]
    if config.baselines:
        fresh = untrained(task.encoder, config.seed).backbone.to(task.device)
        rows.append(tuned(f"from random weights {share}", fresh))
        with report.timed("linear"):
            rows.append(linear(task, picks, config.seed, f"linear {share}"))
    report.write(task, rows, {"labels": len(picks), "held_out": held_out})
    print(table(rows))
    return report.folder


def kept(config: DictConfig) -> str:
    """Return a short name of the kept labels; results of different ones are not comparable."""
    if config.split is not None:
        return Path(str(config.split)).name
    if config.per_class is not None:
        return f"{config.per_class} per class"
    return f"{config.percent:g}%"


def labelled(config: DictConfig, task: Task) -> Tensor:
    """Return the positions of the training images that keep their labels."""
    train, classes = task.labelled[0], task.splits.classes
    if config.split is not None:
        return read_split(expanded(str(config.split)), train, classes)
    if config.per_class is not None:
        return draw_per_class(train.labels, classes, config.per_class, config.seed)
    return draw_percent(train.labels, classes, config.percent, config.seed)


def linear(task: Task, picks: Tensor, seed: int, variant: str) -> Row:
    """Return the result of logistic regression on frozen features of the labelled images."""
    train, test = task.labelled
    features = task.embed(train, "training", picks.tolist()), task.embed(test, "test")
    found = logistic_regression(
        features[0],
        train.labels[picks],
        features[1],
        test.labels,
        len(task.splits.classes),
        seed=seed,
    )
    return Row(variant, {"top1": found.top1, "top5": found.top5}, found.setting)


if __name__ == "__main__":
    from ssl_samix.cli.main import main

    main(["semi", *sys.argv[1:]])
