"""Data sets: reader, statistics and image size of each by name, and their splits."""

from __future__ import annotations

import gzip
import logging
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_samix.data.decode import check_sample, memory_images, typical_side
from ssl_samix.data.folder import Files, class_folders, require_same_classes, scan
from ssl_samix.data.images import FileImages, ImageSet, MemoryImages
from ssl_samix.data.layout import DATASETS, check_layout, locate
from ssl_samix.data.shards import index, numbered
from ssl_samix.data.sources import ArraySource, EncodedSource, PathSource, ShardSource, Source
from ssl_samix.data.subsets import hold_out, stratified
from ssl_samix.errors import DataError, check_range

_log = logging.getLogger(__name__)
Channels = tuple[float, float, float]

IN_MEMORY_UP_TO = 96  # px; larger images are decoded on demand, and cropped from the full picture
_SPLIT_SEED = 0  # of held-out images and limits; independent of a run's own seed
_SMALLEST = 8  # px

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


_STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck"


@dataclass(frozen=True)
class ReadRequest:
    """Arguments of a reader."""

    root: Path  # torchvision's root: the parent of the data set's own folder
    download: bool  # torchvision may download what is missing
    labels: bool | str  # whether sub-folders or .cls members are classes, or auto
    given: str = ""  # data.root as given; may be a pattern or a URL


@dataclass(frozen=True)
class Part:
    """N pictures with labels."""

    source: Source
    labels: Tensor  # (N,) int64, -1 where there is no label

    def take(self, indices: Tensor) -> Part:
        """Return the pictures at these positions, (n,) int64."""
        return Part(self.source.take(indices.tolist()), self.labels[indices])


@dataclass(frozen=True)
class Parts:
    """The splits of a data set."""

    train: Part
    val: Part | None
    classes: tuple[str, ...]  # empty if unlabelled
    bank: Part | None = None  # labelled images beside an unlabelled train split
    notes: tuple[str, ...] = ()  # which folders are splits or classes, and what is left out


def read_digits(request: ReadRequest) -> Parts:
    """Read scikit-learn's 1,797 digits, 8 x 8 gray in 0..16, scaled to 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Parts(_array(pixels, digits.target, "digits"), None, tuple("0123456789"))


def read_stl10(request: ReadRequest) -> Parts:
    """Read STL-10, 96 px: 100,000 unlabelled, 5,000 labelled as bank, 8,000 test images."""
    from torchvision.datasets import STL10

    class Verified(STL10):
        def _check_integrity(self) -> bool:
            return True  # already verified: hashing 3 GB again is slow

    with _sound("stl10", request):
        train = STL10(request.root, split="unlabeled", download=request.download)
        bank = Verified(request.root, split="train")
        test = Verified(request.root, split="test")
        parts = [
            _array(split.data.transpose(0, 2, 3, 1), split.labels, f"stl10 {name}")
            for name, split in (("unlabeled", train), ("test", test), ("train", bank))
        ]
    return Parts(parts[0], parts[1], tuple(_STL10_CLASSES.split()), parts[2])


def read_fashion_mnist(request: ReadRequest) -> Parts:
    """Read Fashion-MNIST: 60,000 and 10,000 gray images of 28 px, gzipped files or plain ones."""
    from torchvision.datasets import FashionMNIST

    if request.download:
        with _sound("fashion_mnist", request):
            FashionMNIST(request.root, download=True)
    raw = request.root / DATASETS["fashion_mnist"].folder
    with _sound("fashion_mnist", request):
        train, test = (
            _array(
                _idx(raw / f"{part}-images-idx3-ubyte"),
                _idx(raw / f"{part}-labels-idx1-ubyte"),
                f"fashion_mnist {name}",
            )
            for part, name in (("train", "train"), ("t10k", "test"))
        )
    return Parts(train, test, tuple(FashionMNIST.classes))


def read_tiny_imagenet(request: ReadRequest) -> Parts:
    """Read Tiny ImageNet, 64 px: ``val`` as published (one list of labels) or in class folders."""
    home = request.root / DATASETS["tiny_imagenet"].folder
    listing, pictures = home / "val" / "val_annotations.txt", home / "val" / "images"
    lines = listing.read_text().splitlines() if listing.is_file() else []
    rows = [line.split("\t")[:2] for line in lines if line.strip()]
    if not rows or not (pictures / rows[0][0]).is_file():
        return read_imagenet(replace(request, root=home))
    train, classes = class_folders(home / "train")
    require_same_classes(classes, tuple(sorted({name for _, name in rows})), str(listing))
    paths, labels = [str(pictures / file) for file, _ in rows], [classes.index(n) for _, n in rows]
    return Parts(_files(train), _files(Files(paths, labels)), classes)


def read_imagenet(request: ReadRequest) -> Parts:
    """Read ``train`` and ``val``, each with one folder per class."""
    train, classes = class_folders(request.root / "train")
    val, val_classes = class_folders(request.root / "val")
    require_same_classes(classes, val_classes, str(request.root / "val"))
    return Parts(_files(train), _files(val), classes)


def read_folder(request: ReadRequest) -> Parts:
    """Read a folder of images, see ``ssl_samix.data.folder``."""
    index = scan(request.root, request.labels)
    val = _files(index.val) if index.val else None
    return Parts(_files(index.train), val, index.classes, notes=index.notes)


def read_webdataset(request: ReadRequest) -> Parts:
    """Read tar shards, see ``ssl_samix.data.shards``; the .cls members name the classes."""
    indexed = index(request.given)
    found = [label for _, members in indexed for label in members.labels]
    labels, classes = numbered(found, request.labels)
    return Parts(Part(ShardSource.of(indexed), torch.tensor(labels)), None, classes)


def _cifar(kind: str, request: ReadRequest) -> Parts:
    """Read CIFAR-10, or CIFAR-100 with its fine classes: 50,000 and 10,000 images of 32 px."""
    from torchvision import datasets

    read, title = getattr(datasets, kind), kind.lower()
    with _sound(title, request):
        train = read(request.root, train=True, download=request.download)
        test = read(request.root, train=False)
        return Parts(
            _array(train.data, train.targets, f"{title} train"),
            _array(test.data, test.targets, f"{title} test"),
            tuple(train.classes),
        )


def _array(
    pixels: np.ndarray[Any, Any], labels: Sequence[int] | np.ndarray[Any, Any], title: str
) -> Part:
    """Return a split from (N, h, w[, 3]) pixels and N labels."""
    if len(pixels) != len(labels):
        raise ValueError(f"{len(pixels)} images and {len(labels)} labels")
    source = ArraySource(pixels, title, range(len(pixels)))
    return Part(source, torch.from_numpy(np.array(labels, dtype=np.int64)))


def _files(files: Files) -> Part:
    return Part(PathSource(files.paths), torch.tensor(files.labels, dtype=torch.int64))


def _idx(path: Path) -> np.ndarray[Any, Any]:
    """Read an IDX file of bytes: two zeros, the type, the number of axes, their lengths, data."""
    zipped = path.with_name(f"{path.name}.gz")
    data = path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    axes = data[3]
    shape = np.frombuffer(data, ">i4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


@contextmanager
def _sound(name: str, request: ReadRequest) -> Iterator[None]:
    """Convert exceptions of a damaged or unreachable data set into ``DataError``."""
    try:
        yield
    except (
        OSError,  # includes connection errors
        RuntimeError,  # torchvision: wrong checksum
        EOFError,
        LookupError,
        ValueError,
        pickle.UnpicklingError,
        zlib.error,
    ) as error:
        if request.download:
            raise DataError(
                f"'{name}' could not be downloaded to {request.root} or is damaged there ({error}):"
                " check the connection and the free space, or delete it and try again"
            ) from error
        raise DataError(
            f"'{name}' under {request.root} is incomplete or damaged: delete it there and add "
            "data.download=true"
        ) from error


@dataclass(frozen=True)
class Spec:
    """Reader, statistics and image size of a data set."""

    read: Callable[[ReadRequest], Parts]
    mean: Channels = _IMAGENET_MEAN  # per channel, of pixels in 0..1
    std: Channels = _IMAGENET_STD
    image_size: int | None = None  # px when set to auto; None: from the files
    hold_out: float = 0.0  # share of train that becomes validation if the set has none


SPECS: dict[str, Spec] = {
    # computed over all pixels of the 1,438 training images at 16 px
    "digits": Spec(
        read_digits, (0.3056, 0.3056, 0.3056), (0.3190, 0.3190, 0.3190), 16, hold_out=0.2
    ),
    "folder": Spec(read_folder, hold_out=0.1),
    "webdataset": Spec(read_webdataset, hold_out=0.1),
    # the usual values: per channel over all pixels of the training images
    "cifar10": Spec(
        partial(_cifar, "CIFAR10"),
        *((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32),
    ),
    "cifar100": Spec(
        partial(_cifar, "CIFAR100"),
        *((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 32),
    ),
    "stl10": Spec(read_stl10, image_size=96),
    # the usual values, over all pixels of the 60,000 training images at 28 px
    "fashion_mnist": Spec(
        read_fashion_mnist, (0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530), 32
    ),
    "tiny_imagenet": Spec(read_tiny_imagenet, image_size=64),
    "imagenet": Spec(read_imagenet, image_size=224),
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
        root: Its folder; for ``webdataset`` also a pattern or a URL; unused for ``digits``.
        image_size: Side in pixels, or ``"auto"``: the usual one of the data set. For a folder, from
            the median m of the shorter sides of up to 200 files: m to the nearest multiple of 8,
            at least 16, if m is at most 96; else m down to a multiple of 32, at most 224.
        limit: Train on at most this many images, class-balanced, always the same ones; chosen
            before any image is decoded. Validation images are never limited.
        download: Let torchvision download what is missing.
        labels: ``"auto"``, or whether the sub-folders of a folder of images, or the ``.cls``
            members of shards, are classes.
        memory_gb: GiB of pixels per split that may be held in memory.
        labelled: Train on labelled images only; differs for STL-10, which has unlabelled ones too.

    Raises:
        DataError: The data set is unknown, missing, damaged or without images; too many of its
            images are unreadable (see ``decode``); a setting is out of range.
        UserError: No space for copies of remote shards.
    """
    check_layout(name, root, download)
    _check_settings(image_size, limit)
    check_range("data.memory_gb", memory_gb, 0)
    spec = SPECS[name]
    home = locate(name, root)
    parts = _with_val(spec.read(ReadRequest(home, download, labels, str(root))), spec.hold_out)
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
