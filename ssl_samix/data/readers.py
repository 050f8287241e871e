"""Readers of the data sets: their splits as undecoded pictures with labels."""

from __future__ import annotations

import gzip
import pickle
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_samix.data.folder import Files, class_folders, require_same_classes, scan
from ssl_samix.data.layout import DATASETS
from ssl_samix.data.shard_index import index, numbered
from ssl_samix.data.shard_source import ShardSource
from ssl_samix.data.sources import ArraySource, PathSource, Source
from ssl_samix.errors import DataError

_STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck"
_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class Request:
    """Arguments of a reader."""

    root: Path  # torchvision's root: the parent of the data set's own folder
    download: bool  # torchvision may download what is missing
    labels: bool | str  # whether sub-folders or .cls members are classes
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


def read_digits(request: Request) -> Parts:
    """Read scikit-learn's 1,797 digits, 8 x 8 gray in 0..16, scaled to 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Parts(_array(pixels, digits.target, "digits"), None, tuple("0123456789"))


def read_cifar10(request: Request) -> Parts:
    """Read CIFAR-10: 50,000 and 10,000 images of 32 px; the test batch is the validation split."""
    return _cifar("CIFAR10", "cifar10", request)


def read_cifar100(request: Request) -> Parts:
    """Read CIFAR-100 with its 100 fine classes: 50,000 and 10,000 images of 32 px."""
    return _cifar("CIFAR100", "cifar100", request)


def read_stl10(request: Request) -> Parts:
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


def read_fashion_mnist(request: Request) -> Parts:
    """Read Fashion-MNIST: 60,000 and 10,000 gray images of 28 px, gzipped files or plain ones."""
    if request.download:
        from torchvision.datasets import FashionMNIST

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
    return Parts(train, test, _FASHION_CLASSES)


def read_tiny_imagenet(request: Request) -> Parts:
    """Read Tiny ImageNet, 64 px: ``val`` as published (one list of labels) or in class folders."""
    home = request.root / DATASETS["tiny_imagenet"].folder
    train, classes = class_folders(home / "train")
    listing = home / "val" / "val_annotations.txt"
    lines = listing.read_text().splitlines() if listing.is_file() else []
    rows = [line.split("\t")[:2] for line in lines if line.strip()]
    if rows and (home / "val" / "images" / rows[0][0]).is_file():
        val_classes = tuple(sorted({name for _, name in rows}))
        require_same_classes(classes, val_classes, str(listing))
        val = Files(
            [str(home / "val" / "images" / file) for file, _ in rows],
            [classes.index(name) for _, name in rows],
        )
    else:
        val, val_classes = class_folders(home / "val")
        require_same_classes(classes, val_classes, str(home / "val"))
    return Parts(_files(train), _files(val), classes)


def read_imagenet(request: Request) -> Parts:
    """Read ``train`` and ``val``, each with one folder per class."""
    train, classes = class_folders(request.root / "train")
    val, val_classes = class_folders(request.root / "val")
    require_same_classes(classes, val_classes, str(request.root / "val"))
    return Parts(_files(train), _files(val), classes)


def read_folder(request: Request) -> Parts:
    """Read a folder of images, see ``ssl_samix.data.folder``."""
    index = scan(request.root, request.labels)
    val = _files(index.val) if index.val else None
    return Parts(_files(index.train), val, index.classes, notes=index.notes)


def read_webdataset(request: Request) -> Parts:
    """Read tar shards, see ``ssl_samix.data.shard_index``; the .cls members name the classes."""
    indexed = index(request.given)
    found = [label for _, members in indexed for label in members.labels]
    labels, classes = numbered(found, request.labels)
    return Parts(Part(ShardSource.of(indexed), torch.tensor(labels)), None, classes)


def _cifar(kind: str, title: str, request: Request) -> Parts:
    from torchvision import datasets

    read = getattr(datasets, kind)
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
def _sound(name: str, request: Request) -> Iterator[None]:
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
