"""Linear probes: many heads trained as one layer, and scikit-learn's logistic regression.

Both choose their setting on a held-out part of the training labels, are retrained with it on all
of them, and are tested once, after the last epoch.

Legend: N training and M test images, D features of an image, C classes, H heads, B images in a
batch.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssl_samix.data.subsets import hold_out
from ssl_samix.errors import ConfigError, DataError, check_range
from ssl_samix.evaluation.knn import check_finite

REFERENCE_BATCH = 256  # images; learning rates refer to it (arXiv 1706.02677, section 2.1)
MOMENTUM = 0.9
INIT_STD = 0.01  # of the weights, as in DINOv2's eval/linear.py; biases start at 0

_ROWS = 4096  # rows read at once
_LOGITS = 2**23  # logits computed at once, outside of training


class Scaling:
    """Scales every feature to mean 0 and variance 1/D; constant features become 0.

    The resulting mean squared length of 1 bounds the curvature of the cross-entropy, so that one
    range of learning rates suits features of any width and scale.

    Args:
        features: (N, D).
        rows: (n,) indices of the rows that the statistics are computed from.
    """

    def __init__(self, features: Tensor, rows: Tensor) -> None:
        total, power = features.new_zeros(2, features.shape[1], dtype=torch.float64)
        for part in rows.split(_ROWS):
            chunk = features[part].double()
            total += chunk.sum(dim=0)
            power += chunk.square().sum(dim=0)
        self.shift, power = total / len(rows), power / len(rows)
        variance = power - self.shift.square()
        varies = variance > 1e-10 * power  # anything smaller is float32 rounding error
        self.factor = torch.where(varies, (variance * len(variance)).rsqrt(), 0.0)

    def __call__(self, features: Tensor) -> Tensor:
        """Return scaled (B, D) features: float64 for float64 input, else float32."""
        x = features.to(torch.promote_types(features.dtype, torch.float32))
        return (x - self.shift.to(x.dtype)) * self.factor.to(x.dtype)


@dataclass(frozen=True)
class Examples:
    """Labelled feature rows, scaled on reading, so that the features are not copied as a whole.

    Attributes:
        features: (N, D).
        labels: (N,) int64.
        rows: (n,) int64 indices of the rows in use.
        scaling: Scaling of the features.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor
    scaling: Scaling

    def read(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, D) and labels (B,) at (B,) places in ``rows``."""
        rows = self.rows[places]
        return self.scaling(self.features[rows]), self.labels[rows]

    def in_order(self, size: int = _ROWS) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all rows in order, ``size`` at a time."""
        for places in torch.arange(len(self.rows), device=self.rows.device).split(size):
            yield self.read(places)


@dataclass(frozen=True)
class Heads:
    """H linear classifiers as one layer.

    Attributes:
        weight: (D, H * C).
        bias: (H * C,).
        classes: C.
    """

    weight: Tensor
    bias: Tensor
    classes: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, H, C)."""
        return torch.addmm(self.bias, x, self.weight).view(len(x), -1, self.classes)


def batches(n: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """Yield each epoch's batches, each of (size,) shuffled positions.

    The remainder, when ``size`` does not divide ``n``, is dropped from the epoch, because a few
    images would make as large a step as a full batch.
    """
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        yield list(order[: n // size * size].split(size))


@torch.no_grad()
def train_heads(
    data: Examples,
    classes: int,
    settings: Sequence[tuple[float, float]],
    epochs: int,
    batch_size: int,
    seed: int,
) -> Heads:
    """Train heads in parallel by SGD with momentum on the cross-entropy; cosine decay to 0.

    The idea is from DINOv2's eval/linear.py. The gradient, softmax minus one-hot, is written out,
    so that a step of all heads is two matrix products. All heads have the same initial weights and
    batches: each gives the result that it would give when trained alone.

    Args:
        data: n training rows.
        classes: C.
        settings: For each head, its learning rate at batch size 256 and its weight decay.
        epochs: Passes over the rows.
        batch_size: B, capped at n. A step holds B * H * C logits and 2 * D * H * C weights.
        seed: Seed of the initial weights and of the order of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    x, _ = data.read(torch.zeros(1, dtype=torch.int64))
    start = torch.empty(x.shape[1], classes).normal_(std=INIT_STD, generator=generator)
    weight = start.to(x).repeat(1, len(settings))
    heads = Heads(weight, x.new_zeros(weight.shape[1]), classes)
    speed = Heads(torch.zeros_like(heads.weight), torch.zeros_like(heads.bias), classes)
    rates, decays = x.new_tensor(settings).repeat_interleave(classes, dim=0).T.contiguous()
    size = min(batch_size, len(data.rows))
    steps, step = epochs * (len(data.rows) // size), 0
    for epoch in batches(len(data.rows), size, epochs, generator):
        for places in epoch:
            left = size / REFERENCE_BATCH * 0.5 * (1 + math.cos(math.pi * step / steps))
            _descend(heads, speed, data.read(places.to(x.device)), rates * left, decays)
            step += 1
    return heads


def _descend(
    heads: Heads, speed: Heads, batch: tuple[Tensor, Tensor], rates: Tensor, decays: Tensor
) -> None:
    """Take one step of SGD with momentum, in place; ``rates`` and ``decays`` are (H * C,)."""
    x, labels = batch
    error = heads(x).softmax(dim=2)
    error[torch.arange(len(x), device=x.device), :, labels] -= 1
    flat = error.flatten(1).div_(len(x))
    speed.weight.addmm_(x.T, flat, beta=MOMENTUM).addcmul_(heads.weight, decays)
    speed.bias.mul_(MOMENTUM).add_(flat.sum(dim=0))
    heads.weight.addcmul_(speed.weight, rates, value=-1)
    heads.bias.addcmul_(speed.bias, rates, value=-1)


@torch.no_grad()
def measure(heads: Heads, data: Examples, most: int = _LOGITS) -> tuple[Tensor, Tensor, Tensor]:
    """Test H classifiers on n rows, computing at most ``most`` logits at once.

    Returns:
        Top-1 and top-5, in percent, and cross-entropy, (H,) each. With fewer than 5 classes, top-5
        is over all of them.
    """
    sums = torch.zeros(3, 1, dtype=torch.float64)
    for x, labels in data.in_order(max(1, min(_ROWS, most // len(heads.bias)))):
        logits = heads(x)
        target = labels[:, None, None]
        hit = logits.topk(min(5, logits.shape[2]), dim=2).indices == target
        own = logits.log_softmax(dim=2).gather(2, target.expand(-1, logits.shape[1], 1))
        parts = (hit[..., 0], hit.any(dim=2), -own[..., 0])
        sums = sums + torch.stack([part.double().sum(dim=0).cpu() for part in parts])
    top1, top5, loss = sums / len(data.rows)
    return 100 * top1, 100 * top5, loss


STEPS, EPOCHS = 2000, 10  # the minimum of both, unless a grid sets its epochs
Setting = dict[str, Any]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """Settings of the heads that are trained in parallel.

    Attributes:
        learning_rates: At batch size 256; scaled linearly with the batch size.
        weight_decays: Applied to the weights, not to the biases.
        epochs: None for the number that 2,000 steps need, and at least 10.
        batch_size: Images per step; all images if there are fewer.

    Raises:
        ConfigError: If a value is out of range, or a pair of values would diverge.
    """

    learning_rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    weight_decays: tuple[float, ...] = (0.0, 1e-6, 1e-5, 1e-4)
    epochs: int | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_values("learning_rates", self.learning_rates, 1e-12)
        check_values("weight_decays", self.weight_decays, 0)
        check_range("batch_size", self.batch_size, 1)
        check_range("epochs", 1 if self.epochs is None else self.epochs, 1)
        rate, decay = max(self.learning_rates), max(self.weight_decays)
        # the stability limit of SGD with momentum
        if rate * decay * self.batch_size / REFERENCE_BATCH >= 2 * (1 + MOMENTUM):
            raise ConfigError(
                f"learning_rates up to {rate:g} diverge with weight_decays up to {decay:g} at "
                f"batch_size={self.batch_size}: lower one of them"
            )

    def epochs_for(self, n: int) -> int:
        """Return the number of training epochs for ``n`` images."""
        steps = n // min(self.batch_size, n)
        return self.epochs or max(EPOCHS, math.ceil(STEPS / steps))

    def settings(self) -> list[Setting]:
        """Return the settings of all heads, by their names in tables."""
        return [
            {"learning_rate": rate, "weight_decay": decay}
            for rate in self.learning_rates
            for decay in self.weight_decays
        ]


def check_values(key: str, values: Sequence[float], low: float) -> None:
    """Check that a list is not empty and holds no value below ``low``.

    Raises:
        ConfigError: If the check fails; the message names the key.
    """
    if not values:
        raise ConfigError(f"{key} needs at least one value")
    for value in values:
        check_range(key, value, low)


def check_labelled(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> None:
    """Check that a classifier can be trained and tested on features and labels.

    Raises:
        DataError: If there are fewer than 2 classes, a feature is not finite, a label is none of
            the classes, or a class has no training image.
    """
    if classes < 2:
        raise DataError(f"a linear probe needs at least 2 classes, got {classes}")
    parts = {"training": (train, train_labels), "test": (test, test_labels)}
    for name, (features, labels) in parts.items():
        if not len(features) == len(labels) > 0:
            raise DataError(f"{len(features)} {name} features cannot have {len(labels)} labels")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise DataError(
                f"the {name} labels must be 0 to {classes - 1}, got {low if low < 0 else high}"
            )
        check_finite(name, features)
    counts = torch.bincount(train_labels, minlength=classes)
    empty = torch.nonzero(counts == 0).flatten().tolist()
    if empty:
        raise DataError(
            f"{len(empty)} of {classes} classes have no training image, the first is class "
            f"{empty[0]}: give every class an image, or leave the class out"
        )


def split(labels: Tensor, classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split the training images into a training part and a held-out part for model selection.

    Args:
        labels: (N,) int64, with each class at least once.
        classes: Number of classes.
        share: Fraction of N to hold out.
        seed: Seed of the choice.

    Returns:
        int64 positions of both parts, on the labels' device. If a class would be left without a
        training image, nothing is held out, with a warning.

    Raises:
        ConfigError: If the share is not in (0, 0.5].
    """
    check_range("held_out_share", share, 1e-12, 0.5)
    kept, held = (part.to(labels.device) for part in hold_out(labels.cpu(), share, seed))
    if len(held) and len(torch.unique(labels[kept])) == classes:
        return kept, held
    _log.warning("too few images per class to hold some out: the middle of the grid is taken")
    return torch.arange(len(labels), device=labels.device), held[:0]


def scored(settings: Sequence[Setting], found: tuple[Tensor, Tensor, Tensor]) -> list[Setting]:
    """Return H settings, each extended by its results from ``measure``."""
    top1, _, loss = (values.tolist() for values in found)
    return [
        {**setting, "top1": a, "loss": b}
        for setting, a, b in zip(settings, top1, loss, strict=True)
    ]


def choose(
    held_out: Sequence[Setting], settings: Sequence[Setting], images: int, name: str, key: str
) -> Setting:
    """Return the setting with the lowest cross-entropy among those tied for the best top-1.

    Settings within one standard error of the best count as tied (The Elements of Statistical
    Learning, section 7.10), because the maximum of many accuracies on a few images is largely
    chance.

    Warns if all tied settings lie at an edge of the grid.

    Args:
        held_out: Results from ``scored``; if empty, the middle of ``settings`` is returned.
        settings: All settings.
        images: Number of held-out images.
        name: Name of the value whose edges are checked.
        key: Key for the user to widen, named in the warning.
    """
    if not held_out:
        return settings[(len(settings) - 1) // 2]
    top1 = max(row["top1"] for row in held_out)
    error = math.sqrt(top1 * (100 - top1) / images)
    good = [row for row in held_out if row["top1"] >= top1 - error]
    best = min(good, key=lambda row: row["loss"])
    values = [setting[name] for setting in settings]
    low, high = min(values), max(values)
    if low < high and all(row[name] in (low, high) for row in good):
        edge = "lowest" if best[name] == low else "highest"
        _log.warning("%s=%g won and is the %s tried: widen %s", name, best[name], edge, key)
    return {setting: best[setting] for setting in settings[0]}


def matrix(data: Examples) -> tuple[Any, Any]:
    """Return (n, D) float32 features with variance 1 and (n,) labels, for scikit-learn."""
    x, labels = (torch.cat(part) for part in zip(*data.in_order(), strict=True))
    return x.mul_(math.sqrt(x.shape[1])).cpu().numpy(), labels.cpu().numpy()


def fit(model: Any, x: Any, labels: Any) -> bool:
    """Fit a model and return whether lbfgs converged; scikit-learn itself only warns."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, labels)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def as_heads(model: Any, data: Examples) -> Heads:
    """Return a fitted model as one head on features as scaled by ``data``."""
    x, _ = data.read(torch.zeros(1, dtype=torch.int64))
    weight, bias = (torch.from_numpy(part) for part in (model.coef_, model.intercept_))
    if len(weight) == 1:  # with two classes, scikit-learn has the log-odds of the second
        weight, bias = (torch.cat([torch.zeros_like(part), part]) for part in (weight, bias))
    weight = weight.T * math.sqrt(weight.shape[1])
    return Heads(weight.to(x), bias.to(x), len(bias))


def folded(heads: Heads, scaling: Scaling) -> nn.Linear:
    """Return a single head, with its input scaling folded in, as a linear layer on the CPU."""
    weight = heads.weight.T.double() * scaling.factor
    # Skip the random initialisation, which would advance the global random state.
    head: nn.Linear = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(heads.bias - weight @ scaling.shift)
    return head


CS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class ProbeResult:
    """The result of a linear classifier.

    Attributes:
        top1: Top-1 accuracy on the test images, after the last epoch, in percent.
        top5: Top-5 accuracy likewise; with fewer than 5 classes, over all of them.
        setting: The setting chosen on held-out images and retrained on all training images.
        held_out: Every setting with its ``top1`` in percent and its cross-entropy ``loss`` on the
            held-out images; empty if no images could be held out.
    """

    top1: float
    top5: float
    setting: Setting
    held_out: list[Setting]


@dataclass(frozen=True)
class LogisticResult(ProbeResult):
    """The result of logistic regression.

    Attributes:
        converged: Whether lbfgs reached its tolerance in the final fit.
        head: The final fit as one layer, from unscaled (B, D) features to (B, C) logits.
    """

    converged: bool
    head: nn.Linear = field(repr=False, compare=False)


def probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    grid: Grid | None = None,
    *,
    seed: int = 0,
    held_out_share: float = 0.1,
) -> ProbeResult:
    """Train a grid of linear heads and test the one chosen by ``choose`` on held-out images.

    With 64 to 1,000 features, the best learning rate of the default grid was 1 to 30 for 10 classes
    (real features), and 100 to 300 for 100 and 1,000 classes (synthetic features).

    Args:
        train: (N, D) features, on the CPU or a GPU; the heads are trained there.
        train_labels: (N,) int64.
        test: (M, D) features, on the same device.
        test_labels: (M,) int64.
        classes: C.
        grid: Settings to try; None for ``Grid()``.
        seed: Seed of the held-out split, the initial weights, and the order of the images.
        held_out_share: Fraction of N to hold out, in (0, 0.5].

    Raises:
        ConfigError: If the share is out of range.
        DataError: If a feature is not finite, a label is not one of the classes, or a class has no
            training image.
    """
    check_labelled(train, train_labels, test, test_labels, classes)
    grid, labels = grid or Grid(), train_labels.to(train.device)
    kept, held = split(labels, classes, held_out_share, seed)

    def trained(rows: Tensor, settings: list[Setting]) -> tuple[Heads, Scaling]:
        scaling = Scaling(train, rows)
        data, epochs = Examples(train, labels, rows, scaling), grid.epochs_for(len(rows))
        pairs = [(s["learning_rate"], s["weight_decay"]) for s in settings]
        return train_heads(data, classes, pairs, epochs, grid.batch_size, seed), scaling

    settings, held_out = grid.settings(), []
    if len(held):
        heads, scaling = trained(kept, settings)
        held_out = scored(settings, measure(heads, Examples(train, labels, held, scaling)))
    best = choose(held_out, settings, len(held), "learning_rate", "learning_rates")
    heads, scaling = trained(torch.arange(len(train), device=train.device), [best])
    top1, top5, _ = measure(heads, _all(test, test_labels, scaling))
    setting = {**best, "epochs": grid.epochs_for(len(train))}
    return ProbeResult(top1.item(), top5.item(), setting, held_out)


def near(features: Tensor, device: torch.device) -> Tensor:
    """Return the features on a GPU, if they take less than a quarter of its free memory.

    Otherwise they are returned unchanged, and the heads are trained where they are.
    """
    if device.type != "cuda" or 4 * features.nbytes > torch.cuda.mem_get_info(device)[0]:
        return features
    return features.to(device)


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
) -> LogisticResult:
    """Fit and test scikit-learn's logistic regression (lbfgs) on standardised features.

    Features are scaled to mean 0 and variance 1. ``choose`` selects C on the same held-out images
    as in ``probe``. DINOv2's eval/log_regression.py does the same with 45 values of C. Two copies
    of the features are made.

    Args:
        train: (N, D) features.
        train_labels: (N,) int64.
        test: (M, D) features, on the same device.
        test_labels: (M,) int64.
        classes: C.
        cs: Inverse strengths of the penalty: the loss is |weights|^2 / 2 + C * sum of
            cross-entropies.
        max_iter: Maximum number of iterations of a fit.
        seed: Seed of the held-out split.
        held_out_share: Fraction of N to hold out, in (0, 0.5].

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
    held_out: list[Setting] = []
    if len(held):
        scaling = Scaling(train, kept)
        learned, asked = (Examples(train, labels, rows, scaling) for rows in (kept, held))
        given = matrix(learned)
        # In ascending order of C, each fit starting from the previous solution.
        model = LogisticRegression(max_iter=max_iter, warm_start=True)
        for setting in settings:
            converged = fit(model.set_params(**setting), *given)
            found = measure(as_heads(model, asked), asked)
            held_out += scored([setting | {"converged": converged}], found)
    best = choose(held_out, settings, len(held), "C", "cs")
    every = _all(train, labels, Scaling(train, torch.arange(len(train), device=train.device)))
    model = LogisticRegression(C=best["C"], max_iter=max_iter)
    converged = fit(model, *matrix(every))
    if not converged:
        _log.warning("lbfgs with C=%g did not converge: raise max_iter=%d", best["C"], max_iter)
    heads = as_heads(model, every)
    top1, top5, _ = measure(heads, _all(test, test_labels, every.scaling))
    head = folded(heads, every.scaling)
    return LogisticResult(top1.item(), top5.item(), best, held_out, converged, head)


def _all(features: Tensor, labels: Tensor, scaling: Scaling) -> Examples:
    rows = torch.arange(len(features), device=features.device)
    return Examples(features, labels.to(features.device), rows, scaling)
