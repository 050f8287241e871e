"""Seeded, class-balanced choices of images, made from the labels alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

import torch
from torch import Tensor

from ssl_samix.data.images import ImageSet
from ssl_samix.errors import DataError
from ssl_samix.files import write_atomically


def stratified(labels: Tensor, n: int, seed: int) -> Tensor:
    """Return ``n`` images with each class in proportion, by largest remainder.

    Each class gets at least one image when ``n`` reaches the number of classes. Without labels
    (all -1) the choice is uniform. With the same seed, a smaller choice is part of a larger one, up
    to rounding.

    Args:
        labels: (N,) int64.
        n: Number of images; more than N gives all.
        seed: Fixes the choice.

    Returns:
        (min(n, N),) int64 positions, ascending.

    Raises:
        DataError: ``n`` is below 1.
    """
    if n < 1:
        raise DataError("data.limit must be at least 1")
    if n >= len(labels):
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    _, kind, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    share = _shares(counts, n, generator)
    order = torch.randperm(len(labels), generator=generator)
    order = order[torch.argsort(kind[order], stable=True)]  # class by class, shuffled within
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - first[kind[order]]  # (N,) place within the class
    return order[rank < share[kind[order]]].sort().values


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return positions of train and validation out of N images, each class in proportion.

    A class with a single image stays in train, since it can be learned but not checked.

    Args:
        labels: (N,) int64.
        share: Part of N that becomes validation, in (0, 0.5].
        seed: Fixes the choice.

    Returns:
        Ascending int64 positions of train and of validation; the latter is empty if no class has
        two images.
    """
    _, kind, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    eligible = torch.nonzero(counts[kind] >= 2).flatten()
    n = max(1, round(share * len(labels)))
    val = eligible[stratified(labels[eligible], n, seed)] if len(eligible) else eligible
    is_train = torch.ones(len(labels), dtype=torch.bool)
    is_train[val] = False
    return torch.nonzero(is_train).flatten(), val


def _shares(counts: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return the number of each class, (K,) int64 with sum ``n``, for (K,) counts."""
    quota = n * counts.double() / counts.sum()
    share = quota.floor().long()
    if n >= len(counts):
        share = share.clamp(min=1)
    # ties are broken at random, so that the first classes are not preferred
    wish = quota + 1e-9 * torch.rand(len(counts), generator=generator, dtype=torch.float64)
    while int(share.sum()) < n:
        share[(wish - share).masked_fill(share >= counts, -torch.inf).argmax()] += 1
    while int(share.sum()) > n:  # the at-least-one rule gave too many
        share[(share - wish).masked_fill(share <= 1, -torch.inf).argmax()] -= 1
    return share


def draw_percent(labels: Tensor, classes: Sequence[str], percent: float, seed: int) -> Tensor:
    """Choose a share of the images, each class in proportion and with at least one image.

    Args:
        labels: (N,) int64.
        classes: Their names.
        percent: In (0, 100].
        seed: Fixes the choice; a smaller share is part of a larger one, up to rounding.

    Returns:
        Positions, ascending.

    Raises:
        DataError: If a class would have no image.
    """
    count = round(len(labels) * percent / 100)
    if count >= 1:
        picks = stratified(labels, count, seed)
        if len(torch.unique(labels[picks])) == len(classes):
            return picks
    empty = _without_images(labels[picks] if count >= 1 else labels[:0], classes)
    raise DataError(
        f"percent={percent:g} leaves {count} of {len(labels)} labels and none for {empty}: "
        f"give percent={100 * len(classes) / len(labels):.2g} or more, or per_class=1"
    )


def draw_per_class(labels: Tensor, classes: Sequence[str], count: int, seed: int) -> Tensor:
    """Choose ``count`` images of each class.

    Returns:
        Positions, ascending.

    Raises:
        DataError: If a class has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    picks = []
    for label, name in enumerate(classes):
        own = order[labels[order] == label]
        if len(own) < count:
            raise DataError(f"class {name} has {len(own)} training images, per_class={count}")
        picks.append(own[:count])
    return torch.cat(picks).sort().values


def _without_images(labels: Tensor, classes: Sequence[str]) -> str:
    counts = torch.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    more = f" and {len(empty) - 3} more classes" if len(empty) > 3 else ""
    return ", ".join(empty[:3]) + more


def write_split(path: Path, images: ImageSet, picks: Tensor) -> None:
    """Write the names of images, one a line: folder and file, so that the list can move."""
    text = "\n".join(_short(images.name(i)) for i in picks.tolist()) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def _short(name: str) -> str:
    return "/".join(PurePath(name).parts[-2:])


def read_split(path: Path, images: ImageSet, classes: Sequence[str]) -> Tensor:
    """Read a list of images: ours, or the official ImageNet lists of SimCLR's repository.

    A line is a file's name, with or without its folder.

    Returns:
        Positions, ascending.

    Raises:
        DataError: If it cannot be read, names an image that is not there or stands for several,
            or has no image of some class.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read split={path}: it must be a list of image names") from error
    names = [_short(images.name(i)) for i in range(len(images))]
    counts = Counter(PurePath(name).name for name in names)
    position = {name: i for i, name in enumerate(names)}
    position |= {PurePath(n).name: i for i, n in enumerate(names) if counts[PurePath(n).name] == 1}
    unknown = [line for line in lines if _short(line) not in position]
    if unknown or not lines:
        first = f", such as {unknown[0]}" if unknown else ""
        raise DataError(
            f"split={path} names {len(unknown)} of {len(lines)} images that the data set has not "
            f"or has several of{first}"
        )
    picks = torch.tensor(sorted({position[_short(line)] for line in lines}))
    empty = _without_images(images.labels[picks], classes)
    if empty:
        raise DataError(f"split={path} has no image of {empty}")
    return picks
