"""A classifier on the test images: accuracy, calibration, accuracy under attack.

Of a run of ``samix supervised``, the network that was trained and its moving average (EMA); of
``samix linear``, the encoder with the logistic regression that was fitted on it. Calibration is the
expected calibration error; the attack is the fast gradient sign method.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from ssl_samix.errors import ConfigError, DataError, check_range
from ssl_samix.evaluation.accuracy import top1_top5
from ssl_samix.evaluation.classifier import TrainedClassifier, load_classifiers
from ssl_samix.evaluation.request import Request
from ssl_samix.evaluation.results import Report, Row, table
from ssl_samix.evaluation.robustness import attacked_logits, calibration_error
from ssl_samix.evaluation.task import Task, open_task


def check(config: DictConfig) -> None:
    """Refuse settings that no data could serve."""
    check_range("strength", config.strength, 0, 255)


def run(request: Request) -> Path:
    """Measure, print, and return the folder of the results."""
    path = request.origin.path
    if path is None:
        raise ConfigError("robustness needs a classifier: run=<of samix supervised or linear>")
    networks = load_classifiers(path)
    first = next(iter(networks.values()))
    task = open_task(request, first)
    task.labelled  # noqa: B018 - refuses unlabelled data before a folder is made
    check_classes(first.classes, task.splits.classes)
    report, rows = Report(request), []
    for name, network in networks.items():
        with report.timed(name):
            rows.append(measured(name, network, task, request.config.strength))
    report.write(task, rows)
    print(table(rows))
    return report.folder


def check_classes(learned: tuple[str, ...], given: tuple[str, ...]) -> None:
    """Refuse data whose classes are not those of the classifier.

    Raises:
        DataError: With both numbers, or the first name that differs.
    """
    if len(learned) != len(given):
        raise DataError(
            f"the classifier knows {len(learned)} classes and the data have {len(given)}"
        )
    for position, (name, other) in enumerate(zip(learned, given, strict=True)):
        if name != other:
            raise DataError(
                f"class {position} is {name} for the classifier and {other} in the data: "
                "measure it on data of its own classes"
            )


def measured(name: str, network: TrainedClassifier, task: Task, strength: float) -> Row:
    """Measure one network."""
    _, test = task.labelled
    network.to(task.device).requires_grad_(False)
    logits = replace(task, encoder=network).embed(test, name)
    attacked = attacked_logits(network, test, strength / 255, task.device, task.chunk)
    top1, top5 = top1_top5(logits, test.labels)
    numbers = {
        "top1": top1,
        "top5": top5,
        "ece": calibration_error(logits, test.labels),
        "fgsm_top1": top1_top5(attacked, test.labels)[0],
    }
    return Row(name, numbers, {"strength": strength})


if __name__ == "__main__":
    from ssl_samix.cli import main

    main(["robustness", *sys.argv[1:]])
