"""Accuracy and calibration of a classifier, and its accuracy under attack and corruptions.

For a run of ``samix supervised``, these are measured for the trained network and its moving average
(EMA); for ``samix linear``, for the encoder with its logistic regression. Calibration is the
expected calibration error; the attack is the fast gradient sign method; ``corruptions=true`` adds
noise, blur, contrast and JPEG.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import DictConfig

from ssl_samix.artifacts.encoder import TrainedClassifier, load_classifiers
from ssl_samix.errors import ConfigError, DataError, check_range
from ssl_samix.evaluation.measures import top1_top5
from ssl_samix.evaluation.request import ProtocolRequest
from ssl_samix.evaluation.results import Report, Row, table
from ssl_samix.evaluation.robustness import (
    CorruptedImages,
    attacked_logits,
    calibration_error,
    strengths_for,
)
from ssl_samix.evaluation.task import Task, open_task


def check(config: DictConfig) -> None:
    """Check the settings that can be checked without data."""
    check_range("strength", config.strength, 0, 255)


def run(request: ProtocolRequest) -> Path:
    """Run the protocol, print its results, and return the folder of the results."""
    path = request.origin.path
    if path is None:
        raise ConfigError("robustness needs a classifier: run=<of samix supervised or linear>")
    networks = load_classifiers(path)
    first = next(iter(networks.values()))
    task = open_task(request, first)
    task.labelled  # noqa: B018 - raises for unlabelled data before a folder is created
    check_classes(first.classes, task.splits.classes)
    report, rows, details = Report(request), [], {}
    for name, network in networks.items():
        with report.timed(name):
            rows.append(measured(name, network, task, request.config.strength))
        if request.config.corruptions:
            with report.timed(f"{name} corrupted"):
                rows[-1], details[name] = corrupted(rows[-1], network, task)
    report.write(task, rows, {"corruptions": details} if details else None)
    print(table(rows))
    if details:
        print(means(rows))
    return report.folder


def check_classes(learned: tuple[str, ...], given: tuple[str, ...]) -> None:
    """Check that the data have the classes of the classifier.

    Raises:
        DataError: If not, with both numbers of classes, or the first name that differs.
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
    """Return the results of one network."""
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


def corrupted(row: Row, network: TrainedClassifier, task: Task) -> tuple[Row, dict[str, Any]]:
    """Return a row extended by the network's mean accuracies under corruptions.

    Returns:
        The row, and the accuracy at each strength: ``strengths`` and ``top1`` by corruption.
    """
    _, test = task.labelled
    source, strengths = strengths_for(test.image_size)
    measuring, found = replace(task, encoder=network), {}
    for corruption, values in strengths.items():
        top1 = []
        for value in values:
            images = CorruptedImages(test, corruption, value)
            logits = measuring.embed(images, f"{row.variant} {corruption} {value:g}")
            top1.append(top1_top5(logits, test.labels)[0])
        found[corruption] = {"strengths": list(values), "top1": top1}
    by_corruption = {f"{name}_top1": fmean(f["top1"]) for name, f in found.items()}
    numbers = {**row.numbers, "corrupted_top1": fmean(by_corruption.values()), **by_corruption}
    return replace(row, numbers=numbers, settings={**row.settings, "corruptions": source}), found


def means(rows: list[Row]) -> str:
    """Return the mean accuracy over strengths of each corruption, as text for the screen."""
    lines = ["top-1 under corruptions, mean over five strengths:"]
    width = max(len(row.variant) for row in rows) + 2
    labels = {"gaussian_noise": "noise", "gaussian_blur": "blur", "contrast": "contrast"}
    labels |= {"jpeg": "JPEG"}
    for row in rows:
        numbers = (f"{text} {row.numbers[f'{k}_top1']:.2f}%" for k, text in labels.items())
        lines.append(f"{row.variant:<{width}}{'  '.join(numbers)}")
    return "\n".join(lines)


if __name__ == "__main__":
    from ssl_samix.cli.main import main

    main(["robustness", *sys.argv[1:]])
