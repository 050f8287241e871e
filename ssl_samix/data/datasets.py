"""The data sets: reader, statistics and image size of each by name, and their splits."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ssl_samix.data import readers
from ssl_samix.data.decode import check_sample, memory_images, typical_side
from ssl_samix.data.images import FileImages, ImageSet, MemoryImages
from ssl_samix.data.layout import check_layout, locate
from ssl_samix.data.readers import Part, Parts, Request
from ssl_samix.data.sources import ArraySource, EncodedSource
from ssl_samix.data.subsets import hold_out, stratified
from ssl_samix.errors import DataError

_log = logging.getLogger(__name__)
Channels = tuple[float, float, float]

IN_MEMORY_UP_TO = 96  # px; larger images are decoded on demand, and cropped from the full picture
_SPLIT_SEED = 0  # of held-out images and limits; independent of a run's own seed
_SMALLEST = 8  # px

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Spec:
    """Reader, statistics and image size of a data set."""

    read: Callable[[Request], Parts]
    mean: Channels = _IMAGENET_MEAN  # per channel, of pixels in 0..1
    std: Channels = _IMAGENET_STD
    image_size: int | None = None  # px when set to auto; None: from the files
    hold_out: float = 0.0  # share of train that becomes validation if the set has none


SPECS: dict[str, Spec] = {
    # computed over all pixels of the 1,438 training images at 16 px
    "digits": Spec(
        readers.read_digits, (0.3056, 0.3056, 0.3056), (0.3190, 0.3190, 0.3190), 16, hold_out=0.2
    ),
    "folder": Spec(readers.read_folder, hold_out=0.1),
    "webdataset": Spec(readers.read_webdataset, hold_out=0.1),
    # the usual values: per channel over all pixels of the training images
    "cifar10": Spec(
        readers.read_cifar10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), image_size=32
    ),
    "cifar100": Spec(
        readers.read_cifar100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), image_size=32
    ),
    "stl10": Spec(readers.read_stl10, image_size=96),
    # the usual values, over all pixels of the 60,000 training images at 28 px
    "fashion_mnist": Spec(
        readers.read_fashion_mnist, (0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530), 32
    ),
    "tiny_imagenet": Spec(readers.read_tiny_imagenet, image_size=64),
    "imagenet": Spec(readers.read_imagenet, image_size=224),
}


@dataclass(frozen=True)
class Splits:
    """A data set, ready for training and evaluation."""

    train: ImageSet  # training images; labels may be -1
    bank: ImageSet | None  # labelled images for nearest neighbours: train if labelled
    val: ImageSet | None  # labelled validation images
    classes: tuple[str, ...]  # empty if unlabelled; bank and val are None then
    mean: Channels  # per channel, of pixels in 0..1
    std: Channels
    image_size: int  # S in pixels
    notes: tuple[str, ...] = ()  # which folders are splits or classes, and what is left out


def load_splits(
    name: str,
    root: str | os.PathLike[str] | None,
    image_size: int | Literal["auto"],
    limit: int | None,
    *,
    download: bool = False,
    labels: bool | str = "auto",
    memory_gb: float = 4.0,
    labelled: bool = False,
) -> Splits:
    """Return the splits of a data set, by its name.

    A split is held in memory as uint8 if its images are at most 96 px and together at most
    ``memory_gb``; else its images are decoded on demand, after a sample of them was checked.

    Args:
        name: One of ``SPECS``.
        root: The folder that holds it, or the shards of ``webdataset``; unused for ``digits``.
        image_size: Side in pixels, or ``"auto"``: the usual one of the data set. For a folder, from
            the median m of the shorter sides of up to 200 files: m to the nearest multiple of 8,
            at least 16, if m is at most 96; else m down to a multiple of 32, at most 224.
        limit: Train on at most this many images, class-balanced, always the same ones; chosen
            before any image is decoded. Validation images are never limited.
        download: Let torchvision download what is missing.
        labels: ``"auto"``, or whether the sub-folders of a folder of images, or the ``.cls``
            members of shards, are classes.
        memory_gb: GiB of pixels per split that may be held in memory.
        labelled: Train on the labelled images alone, where a set has others beside them (STL-10).

    Raises:
        DataError: The data set is unknown, missing, damaged or without images; too many of its
            images are unreadable (see ``decode``); a setting is out of range.
        UserError: No space for copies of remote shards.
    """
    check_layout(name, root, download)
    _check_settings(image_size, limit)
    spec = SPECS[name]
    home = locate(name, root)
    parts = _with_val(spec.read(Request(home, download, labels, str(root))), spec.hold_out)
    if labelled and parts.bank is not None:
        parts = replace(parts, train=parts.bank, bank=None)
    size = image_size if image_size != "auto" else _auto_size(spec, parts.train)
    train = _image_set(_limited(parts.train, limit), size, memory_gb)
    bank = _image_set(parts.bank, size, memory_gb) if parts.bank else None
    return Splits(
        train=train,
        bank=train if parts.classes and bank is None else bank,
        val=_image_set(parts.val, size, memory_gb) if parts.val else None,
        classes=parts.classes,
        mean=spec.mean,
        std=spec.std,
        image_size=size,
        notes=parts.notes,
    )


def _check_settings(image_size: int | str, limit: int | None) -> None:
    if image_size != "auto" and not (isinstance(image_size, int) and image_size >= _SMALLEST):
        raise DataError(
            f"data.image_size must be auto or a number of pixels from {_SMALLEST} on, "
            f"not {image_size}"
        )
    if limit is not None and limit < 1:
        raise DataError("data.limit must be at least 1")


def _with_val(parts: Parts, share: float) -> Parts:
    """Return train and validation, holding out ``share`` of a labelled set without validation."""
    if parts.val is not None or not parts.classes:
        return parts
    train, val = hold_out(parts.train.labels, share, _SPLIT_SEED)
    if len(val) == 0:  # one image per class
        note = "each class has one image: none is held out for validation"
        return replace(parts, notes=(*parts.notes, note))
    return replace(parts, train=parts.train.take(train), val=parts.train.take(val))


def _limited(part: Part, limit: int | None) -> Part:
    if limit is None or limit >= len(part.labels):
        return part
    return part.take(stratified(part.labels, limit, _SPLIT_SEED))


def _auto_size(spec: Spec, train: Part) -> int:
    if spec.image_size is not None:
        return spec.image_size
    assert isinstance(train.source, EncodedSource)
    side = typical_side(train.source)
    if side <= IN_MEMORY_UP_TO:
        return max(16, (side + 4) // 8 * 8)
    return min(224, side // 32 * 32)


def _image_set(part: Part, size: int, memory_gb: float) -> ImageSet:
    source = part.source
    if isinstance(source, ArraySource) and source.pixels.shape[1:3] == (size, size):
        names = [source.name(i) for i in range(len(source))]
        return MemoryImages(source.stacked(), part.labels, names)
    if size <= IN_MEMORY_UP_TO:
        needed = len(source) * 3 * size * size / 2**30
        if needed <= memory_gb:
            return memory_images(source, part.labels, size)
        if memory_gb > 0:  # larger images are always decoded from disk
            _log.warning(
                "%d images of %d px are %.3g GiB, more than data.memory_gb=%g: they are decoded "
                "again in every epoch",
                *(len(source), size, needed, memory_gb),
            )
    check_sample(source, size)
    return FileImages(source, part.labels, size)
