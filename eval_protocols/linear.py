"""Linear probe: accuracy of a linear classifier on the frozen features.

``protocol=cached`` computes the features once, trains a grid of heads together, and fits
scikit-learn's logistic regression as an independent check; the latter is saved with the backbone as
``classifier.safetensors``. ``protocol=augmented`` follows the papers: stochastic gradient descent
on random crops and flips through the frozen backbone. Both choose their setting on a held-out part
of the training labels and use the test images once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ssl_samix.artifacts.encoder import save_classifier
from ssl_samix.config.compose import plain
from ssl_samix.errors import ConfigError, check_choice, check_range
from ssl_samix.evaluation.linear import logistic_regression, near, probe
from ssl_samix.evaluation.request import ProtocolRequest
from ssl_samix.evaluation.results import Report, Row, table
from ssl_samix.evaluation.task import Task, open_task
from ssl_samix.evaluation.training import FewLabels, Recipe, augmented_probe
from ssl_samix.training.logging import RunProgress

# Rows, details for results.json, and the classification layer to save, if any.
Found = tuple[list[Row], dict[str, Any], nn.Linear | None]


def check(config: DictConfig) -> None:
    """Check the settings that can be checked without data."""
    check_choice("protocol", config.protocol, ("cached", "augmented"))
    check_range("held_out", config.held_out, 0.01, 0.5)
    if config.protocol == "augmented":
        recipe(config)
    elif config.get("preset") is not None:
        raise ConfigError("a preset says how protocol=augmented trains: give that too")


def recipe(config: DictConfig) -> Recipe:
    """Return the training recipe of the configuration."""
    if config.get("preset") is None:
        raise ConfigError("protocol=augmented trains as a paper does: give preset=moco or another")
    settings: dict[str, Any] = plain(config.preset)
    settings["lr"], settings["milestones"] = tuple(settings["lr"]), tuple(settings["milestones"])
    return Recipe(**settings)


def run(request: ProtocolRequest) -> Path:
    """Run the protocol, print its results, and return the folder of the results."""
    task = open_task(request)
    task.labelled  # noqa: B018 - raises for unlabelled data before a folder is created
    report = Report(request)
    measure = cached if request.config.protocol == "cached" else augmented
    rows, details, head = measure(request, task, report)
    report.write(task, rows, details)
    if head is not None:
        save(report.folder / "classifier.safetensors", request, task, head)
    print(table(rows))
    return report.folder


def cached(request: ProtocolRequest, task: Task, report: Report) -> Found:
    """Train a grid of heads and a logistic regression on features that are computed once."""
    (train, test), config = task.labelled, request.config
    with report.timed("features"):
        features = task.embed(train, "training"), task.embed(test, "test")
    given = (features[0], train.labels, features[1], test.labels, len(task.splits.classes))
    with report.timed("heads"):
        train_rows, test_rows = (near(part, task.device) for part in features)
        heads = probe(
            train_rows, train.labels, test_rows, test.labels, len(task.splits.classes),
            seed=config.seed, held_out_share=config.held_out,
        )  # fmt: skip
    with report.timed("lbfgs"):
        lbfgs = logistic_regression(*given, seed=config.seed, held_out_share=config.held_out)
    found = {"heads": heads, "lbfgs": lbfgs}
    rows = [Row(n, {"top1": f.top1, "top5": f.top5}, f.setting) for n, f in found.items()]
    details = {n: {k: v for k, v in vars(f).items() if k != "head"} for n, f in found.items()}
    return rows, details, lbfgs.head


def save(path: Path, request: ProtocolRequest, task: Task, head: nn.Linear) -> None:
    """Save the backbone with its logistic regression, for ``load_classifier``."""
    encoder, config = task.encoder, request.config
    meta = {
        "weights": config.weights,  # published weights have their own name in the encoder's meta
        **encoder.meta,
        "classes": list(task.splits.classes),
        "data": request.data,
        "data_settings": plain(config.data),
    }
    save_classifier(path, {"linear": nn.Sequential(encoder.backbone, head)}, meta)


def augmented(request: ProtocolRequest, task: Task, report: Report) -> Found:
    """Train heads by the recipe of the preset's paper."""
    config, every = request.config, torch.arange(len(task.labelled[0]))
    few = FewLabels(task, every, config.data, config.held_out, config.seed, [RunProgress()])
    with report.timed("training"):
        top1, top5, settings = augmented_probe(few, recipe(config))
    details = {"held_out": settings.pop("held_out", {})}
    return [Row("augmented", {"top1": top1, "top5": top5}, settings)], details, None


if __name__ == "__main__":
    from ssl_samix.cli.main import main

    main(["linear", *sys.argv[1:]])
