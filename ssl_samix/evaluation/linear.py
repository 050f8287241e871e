"""The linear probe on kept features: a grid of heads, and logistic regression as a check on it.

Both choose their setting on a held-out part of the training labels, train it again on all of them,
and are tested once, after the last epoch.

Legend: N training and M test images, D features of an image, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssl_samix.errors import check_range
from ssl_samix.evaluation.linear_choice import (
    Grid,
    Progress,
    Setting,
    check_labelled,
    check_values,
    choose,
    scored,
    split,
    ticks,
)
from ssl_samix.evaluation.linear_heads import Examples, Heads, Scaling, measure, train_heads
from ssl_samix.evaluation.logistic import answers, fit, folded, matrix

CS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0, 100.0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeResult:
    """What a linear classifier reaches.

    Attributes:
        top1: On the test images, after the last epoch, in percent.
        top5: Likewise; of fewer than 5 classes, over all of them.
        setting: What was chosen on the held-out images and trained again on all training images.
        held_out: Every setting with its ``top1`` in percent and its cross-entropy ``loss`` on the
            held-out images; empty if none could be held out.
    """

    top1: float
    top5: float
    setting: Setting
    held_out: list[Setting]


@dataclass(frozen=True)
class LogisticResult(ProbeResult):
    """What logistic regression reaches.

    Attributes:
        converged: Whether lbfgs reached its tolerance in the fit that was tested.
        head: That fit as one layer, from (B, D) features as they are to (B, C) logits.
    """

    converged: bool
    head: nn.Linear = field(repr=False, compare=False)


def probe(  # noqa: PLR0913 - the data, and how they are learned
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    grid: Grid | None = None,
    *,
    seed: int = 0,
    held_out_share: float = 0.1,
    progress: Progress | None = None,
) -> ProbeResult:
    """Train a grid of linear heads and test the one that ``choose`` takes on held-out images.

    The default grid was tried with 64 to 1,000 features: the best learning rate was 1 to 30 for 10
    classes, on real features, and 100 to 300 for 100 and 1,000 classes, on synthetic ones.

    Args:
        train: (N, D) features, on the CPU or a GPU; the heads are trained there.
        train_labels: (N,) int64.
        test: (M, D) features, on the same device.
        test_labels: (M,) int64.
        classes: C.
        grid: None takes ``Grid()``.
        seed: Of what is held out, of the heads' first weights, and of the order of the images.
        held_out_share: Part of N, in (0, 0.5].
        progress: Told after each epoch how many of how many are done.

    Raises:
        ConfigError: If the share is out of range.
        DataError: If a feature is not finite, a label is none of the classes, or a class has no
            training image.
    """
    check_labelled(train, train_labels, test, test_labels, classes)
    grid, labels = grid or Grid(), train_labels.to(train.device)
    kept, held = split(labels, classes, held_out_share, seed)
    kinds = grid.normalizations if len(held) else ()
    total = len(kinds) * grid.epochs_for(len(kept)) + grid.epochs_for(len(train))
    tick = ticks(progress, total)

    def trained(rows: Tensor, settings: list[Setting]) -> tuple[Heads, Scaling]:
        scaling = Scaling(settings[0]["normalization"], train, rows)
        data, epochs = Examples(train, labels, rows, scaling), grid.epochs_for(len(rows))
        pairs = [(s["learning_rate"], s["weight_decay"]) for s in settings]
        return train_heads(data, classes, pairs, epochs, grid.batch_size, seed, tick), scaling

    held_out: list[Setting] = []
    for kind in kinds:
        settings = grid.settings(kind)
        heads, scaling = trained(kept, settings)
        found = measure(heads, Examples(train, labels, held, scaling), len(heads.bias))
        held_out += scored(settings, found)
    settings = grid.settings(grid.normalizations[0])
    best = choose(held_out, settings, len(held), "learning_rate", "learning_rates")
    heads, scaling = trained(torch.arange(len(train), device=train.device), [best])
    top1, top5, _ = measure(heads, _all(test, test_labels, scaling), classes)
    setting = {**best, "epochs": grid.epochs_for(len(train))}
    return ProbeResult(top1.item(), top5.item(), setting, held_out)


def logistic_regression(  # noqa: PLR0913 - the data, and how they are learned
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    *,
    cs: Sequence[float] = CS,
    max_iter: int = 1000,
    seed: int = 0,
    held_out_share: float = 0.1,
    progress: Progress | None = None,
) -> LogisticResult:
    """Fit scikit-learn's logistic regression (lbfgs) on features of mean 0 and variance 1.

    ``choose`` takes a C on the images that ``probe`` holds out too. DINOv2's
    eval/log_regression.py does the same with 45 values of C. Makes two copies of the features.

    Args:
        train: (N, D) features.
        train_labels: (N,) int64.
        test: (M, D) features, on the same device.
        test_labels: (M,) int64.
        classes: C.
        cs: Inverse strengths of the penalty: the loss is |weights|^2 / 2 + C * sum of
            cross-entropies.
        max_iter: Iterations of a fit, at most.
        seed: Of what is held out.
        held_out_share: Part of N, in (0, 0.5].
        progress: Told after each fit how many of how many are done.

    Raises:
        ConfigError: If a value is out of range.
        DataError: As ``probe``.
    """
    from sklearn.linear_model import LogisticRegression

    check_labelled(train, train_labels, test, test_labels, classes)
    check_values("cs", cs, 1e-12)
    check_range("max_iter", max_iter, 1)
    labels = train_labels.to(train.device)
    kept, held = split(labels, classes, held_out_share, seed)
    settings: list[Setting] = [{"C": c} for c in sorted(cs)]
    tick = ticks(progress, 1 + (len(settings) if len(held) else 0))
    held_out: list[Setting] = []
    if len(held):
        scaling = Scaling("standardize", train, kept)
        learned, asked = (Examples(train, labels, rows, scaling) for rows in (kept, held))
        model = LogisticRegression(max_iter=max_iter, warm_start=True)
        held_out = _tried(model, settings, learned, asked, classes, tick)
    best = choose(held_out, settings, len(held), "C", "cs")
    every = torch.arange(len(train), device=train.device)
    scaling = Scaling("standardize", train, every)
    model = LogisticRegression(C=best["C"], max_iter=max_iter)
    converged = fit(model, *matrix(Examples(train, labels, every, scaling)))
    tick()
    if not converged:
        _log.warning("lbfgs with C=%g did not converge: raise max_iter=%d", best["C"], max_iter)
    top1, top5, _ = measure(answers(model), _all(test, test_labels, scaling), classes)
    head = folded(model, scaling)
    return LogisticResult(top1.item(), top5.item(), best, held_out, converged, head)


def _tried(
    model: Any,
    settings: Sequence[Setting],
    learned: Examples,
    asked: Examples,
    classes: int,
    tick: Callable[[], None],
) -> list[Setting]:
    """Fit each C, from the smallest up, each from where the last fit ended, and test it."""
    given = matrix(learned)
    held_out: list[Setting] = []
    for setting in settings:
        converged = fit(model.set_params(**setting), *given)
        found = measure(answers(model), asked, classes)
        held_out += scored([setting | {"converged": converged}], found)
        tick()
    return held_out


def _all(features: Tensor, labels: Tensor, scaling: Scaling) -> Examples:
    rows = torch.arange(len(features), device=features.device)
    return Examples(features, labels.to(features.device), rows, scaling)
