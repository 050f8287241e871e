"""kNN evaluation of the frozen features, without training.

Neighbours are found by cosine similarity and vote with weight exp(similarity / T) (InstDisc, arXiv
1805.01978, section 3.4). All settings of a grid of k and T are computed from one exact search. The
setting is chosen by leave-one-out on the training images; test labels are used only to compute the
results.
"""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from pandas import DataFrame
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from torch import Tensor

from ssl_samix.data.images import ImageSet
from ssl_samix.data.subsets import stratified
from ssl_samix.errors import ConfigError, DataError, check_range
from ssl_samix.evaluation.knn import Vote, leave_one_out, neighbours, vote_grid
from ssl_samix.evaluation.request import ProtocolRequest
from ssl_samix.evaluation.results import Report, Row, table
from ssl_samix.evaluation.task import Task, open_task
from ssl_samix.files import write_atomically
from ssl_samix.pictures import paint, write_png

_log = logging.getLogger(__name__)
ASKED = 5000  # at most so many training images choose the setting by leave-one-out
SHOWN = 8  # test images in the picture, and neighbours of each
MOST_NAMED = 30  # up to so many classes, the confusion matrix shows names and numbers


def check(config: DictConfig) -> None:
    """Check the settings that can be checked without data."""
    for key in ("k", "temperature"):
        if not config[key]:
            raise ConfigError(f"{key} needs at least one value")
    for k in config.k:
        check_range("k", k, 1)
    for temperature in config.temperature:
        check_range("temperature", temperature, 1e-3)


def run(request: ProtocolRequest) -> Path:
    """Run the protocol, print its results, and return the folder of the results."""
    config, task = request.config, open_task(request)
    train, test = task.labelled
    ks, temperatures = _fitting(list(config.k), len(train)), list(config.temperature)
    shown, report = _shown(config, len(test)), Report(request)
    with report.timed("features"):
        bank, query = task.embed(train, "training"), task.embed(test, "test")
    with report.timed("neighbours"):
        near, rows = neighbours(bank, query, max(*ks, min(SHOWN, len(train))))
        votes = vote_grid(
            near, train.labels[rows], test.labels, len(task.splits.classes), ks, temperatures
        )
        chosen = votes[_choose(config, ks, bank, train.labels, len(task.splits.classes))]
    results = [_row("chosen", chosen, {"k": chosen.k, "temperature": chosen.temperature})]
    results += [_row(f"k{v.k}-T{v.temperature:g}", v, {}) for v in votes]
    confusion = _confusion(test.labels, chosen.predictions, task.splits.classes, report.folder)
    if shown:
        picture = _neighbours(task, (train, test), shown, (near, rows), chosen.predictions)
        write_png(report.folder / "neighbours.png", picture)
    report.write(task, results, {"confusion": confusion})
    print(table(results))
    return report.folder


def _fitting(ks: list[int], images: int) -> list[int]:
    """Return the values of k that are possible in leave-one-out on so many training images.

    Raises:
        DataError: If no value is possible.
    """
    fitting = [k for k in ks if k < images]
    if not fitting:
        raise DataError(
            f"k={min(ks)} needs more than {min(ks)} training images, got {images}: "
            + (f"give k=[{images - 1}] or less" if images > 1 else "add images")
        )
    if len(fitting) < len(ks):
        left_out = ", ".join(str(k) for k in ks if k >= images)
        _log.warning("k=%s left out: there are %d training images", left_out, images)
    return fitting


def _row(variant: str, vote: Vote, settings: dict[str, Any]) -> Row:
    return Row(variant, {"top1": vote.top1, "top5": vote.top5}, settings)


def _choose(config: DictConfig, ks: list[int], bank: Tensor, labels: Tensor, classes: int) -> int:
    """Return the grid position of the best setting by leave-one-out on the training images."""
    asked = stratified(labels, ASKED, config.seed)
    near, rows = leave_one_out(bank, asked, max(ks))
    votes = vote_grid(near, labels[rows], labels[asked], classes, ks, list(config.temperature))
    return max(range(len(votes)), key=lambda i: votes[i].top1)


def _shown(config: DictConfig, tests: int) -> list[int]:
    """Return the indices of the test images whose neighbours are shown."""
    if config.show is not None:
        for i in config.show:
            check_range("show", i, 0, tests - 1)
        return list(config.show)
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(tests, generator=generator)[:SHOWN].tolist()


def _confusion(
    labels: Tensor, predictions: Tensor, classes: tuple[str, ...], folder: Path
) -> list[list[int]]:
    """Write the confusion matrix as confusion.csv and confusion.png, and return it."""
    counts = confusion_matrix(labels, predictions, labels=range(len(classes)))
    table = DataFrame(counts, index=list(classes), columns=list(classes))
    table.to_csv(folder / "confusion.csv", index_label="true class")
    few = len(classes) <= MOST_NAMED
    side = min(12.0, 3 + 0.4 * len(classes))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # Matplotlib would parse a dollar sign as the start of a formula.
    names = [name.replace("$", r"\$") for name in classes]
    ConfusionMatrixDisplay(counts, display_labels=names).plot(
        ax=axes, include_values=few, colorbar=False, cmap="Blues", xticks_rotation="vertical"
    )
    if not few:
        axes.set(xticks=[], yticks=[])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters that the font lacks
        write_atomically(folder / "confusion.png", partial(figure.savefig, format="png"))
    return counts.tolist()


def _neighbours(
    task: Task,
    sets: tuple[ImageSet, ImageSet],
    shown: list[int],
    found: tuple[Tensor, Tensor],
    predictions: Tensor,
) -> Any:
    """Return a picture of test images, each with its nearest training images."""
    (train, test), (near, rows), names = sets, found, task.splits.classes
    count = min(SHOWN, rows.shape[1])
    tiles, captions = [], []
    for i in shown:
        tiles.append([test.load([i])[0], *train.load(rows[i, :count])])
        right = "right" if predictions[i] == test.labels[i] else f"voted {names[predictions[i]]}"
        same = int((train.labels[rows[i, :count]] == test.labels[i]).sum())
        captions.append(
            f"#{i}: {names[test.labels[i]]}\n{right}\n{same} of {count} alike\n"
            f"cos {near[i, 0]:.2f} to {near[i, count - 1]:.2f}"
        )
    return paint(["test image", *(str(n + 1) for n in range(count))], tiles, captions)


if __name__ == "__main__":
    import sys

    from ssl_samix.cli.main import main

    main(["knn", *sys.argv[1:]])
