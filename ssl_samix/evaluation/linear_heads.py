"""Many linear classifiers of the same features, trained and tested as one layer.

Legend: N images, D features of an image, C classes, H heads, B images in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NORMALIZATIONS = ("standardize", "l2", "none")
REFERENCE_BATCH = 256  # images; learning rates are stated for it (arXiv 1706.02677, section 2.1)
MOMENTUM = 0.9
INIT_STD = 0.01  # of the weights, as in DINOv2's eval/linear.py; the bias is 0

_ROWS = 4096  # rows that are read at once, and
_LOGITS = 2**23  # logits that are computed at once, outside of training


class Scaling:
    """Brings features to a mean squared length of 1.

    One range of learning rates then serves features of any width and scale, because that length
    bounds the curvature of the cross-entropy.

    Args:
        kind: ``standardize`` gives every feature mean 0 and variance 1/D, or 0 if it does not
            vary; ``l2`` gives every row length 1; ``none`` divides everything by one number.
        features: (N, D).
        rows: (n,) the rows that means are taken over.
    """

    def __init__(self, kind: str, features: Tensor, rows: Tensor) -> None:
        self.kind = kind
        if kind == "l2":
            return
        total, power = features.new_zeros(2, features.shape[1], dtype=torch.float64)
        for part in rows.split(_ROWS):
            chunk = features[part].double()
            total += chunk.sum(dim=0)
            power += chunk.square().sum(dim=0)
        mean, power = total / len(rows), power / len(rows)
        if kind == "standardize":
            variance = power - mean.square()
            varies = variance > 1e-10 * power  # less is what rounding to float32 leaves
            self.shift = mean
            self.factor = torch.where(varies, (variance * len(mean)).rsqrt(), 0.0)
        else:
            self.shift = torch.zeros_like(mean)
            self.factor = power.sum().clamp_min(1e-30).rsqrt()

    def __call__(self, features: Tensor) -> Tensor:
        """Scale (B, D) features, as float64 if they are that and float32 if not."""
        x = features.to(torch.promote_types(features.dtype, torch.float32))
        if self.kind == "l2":
            return F.normalize(x, dim=1)
        return (x - self.shift.to(x.dtype)) * self.factor.to(x.dtype)


@dataclass(frozen=True)
class Examples:
    """Labelled rows of features that are scaled as they are read, so that no copy of all is made.

    Attributes:
        features: (N, D).
        labels: (N,) int64.
        rows: (n,) int64, which of them.
        scaling: Of the features.
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
        """Read all rows, ``size`` at a time."""
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
    """Yield each epoch's batches: (size,) shuffled positions each.

    What is left over when ``size`` does not divide ``n`` waits for another epoch, since a few
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
    after_epoch: Callable[[], object] = lambda: None,
) -> Heads:
    """Train heads side by side: SGD with momentum on the cross-entropy, a cosine to 0.

    The idea is DINOv2's eval/linear.py. The gradient, softmax minus one-hot, is written out here,
    so that a step of all heads is two matrix products. Heads start alike and see the same batches:
    each becomes what it would have become alone.

    Args:
        data: n rows to learn.
        classes: C.
        settings: Learning rate at batch 256, and weight decay of the weights, of each head.
        epochs: Passes over the rows.
        batch_size: B; at most n is taken. A step holds B * H * C logits and 2 * D * H * C weights.
        seed: Of the first weights and of the order.
        after_epoch: Called after each epoch.
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
        after_epoch()
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
def measure(
    classify: Callable[[Tensor], Tensor], data: Examples, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Test H classifiers.

    Args:
        classify: Maps features (B, D) to logits or log-probabilities (B, H, C).
        data: n rows to classify.
        size: Values per row that ``classify`` makes, H * C: sets how many rows are read at once.

    Returns:
        Top-1 and top-5, in percent, and cross-entropy: (H,) each. Of fewer than 5 classes, top-5
        is over all.
    """
    sums = torch.zeros(3, 1, dtype=torch.float64)
    for x, labels in data.in_order(max(1, min(_ROWS, _LOGITS // size))):
        logits = classify(x)
        target = labels[:, None, None]
        hit = logits.topk(min(5, logits.shape[2]), dim=2).indices == target
        own = logits.log_softmax(dim=2).gather(2, target.expand(-1, logits.shape[1], 1))
        parts = (hit[..., 0], hit.any(dim=2), -own[..., 0])
        sums = sums + torch.stack([part.double().sum(dim=0).cpu() for part in parts])
    top1, top5, loss = sums / len(data.rows)
    return 100 * top1, 100 * top5, loss
