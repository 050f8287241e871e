"""Where each data set is on disk, checked before anything heavy is imported."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ssl_samix.data.image_files import count_by_ending, visible
from ssl_samix.errors import DataError, nearest
from ssl_samix.files import expanded

# suffixes of tar members that are images
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")


class Layout(NamedTuple):
    """Files and folders that a data set needs under its root."""

    folder: str = ""  # folder of the set under the root; "" if it is the root itself
    needs: tuple[str, ...] = ()  # paths inside ``folder`` that must exist
    automatic: bool = False  # torchvision can download it
    source: str = ""  # where to get it, for sets without automatic download


DATASETS: dict[str, Layout] = {
    "digits": Layout(),
    "folder": Layout(),
    "webdataset": Layout(),
    "cifar10": Layout(
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        automatic=True,
    ),
    "cifar100": Layout("cifar-100-python", ("train", "test", "meta"), automatic=True),
    "stl10": Layout(
        "stl10_binary",
        ("train_X.bin", "train_y.bin", "unlabeled_X.bin", "test_X.bin", "test_y.bin"),
        automatic=True,
    ),
    # each of these four may also be gzipped, as downloaded
    "fashion_mnist": Layout(
        "FashionMNIST/raw",
        tuple(
            f"{part}-{kind}-ubyte"
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ),
        automatic=True,
    ),
    "tiny_imagenet": Layout(
        "tiny-imagenet-200",
        ("train", "val"),
        source="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
    "imagenet": Layout(
        needs=("train", "val"), source="https://image-net.org with one folder per class in each"
    ),
}


def check_layout(name: str, root: str | os.PathLike[str] | None, download: bool) -> None:
    """Raise unless data set ``name`` is under ``root`` or can be downloaded there.

    Reads file names only, stops at the first image in a folder of images, and imports no torch.

    Args:
        name: One of ``DATASETS``.
        root: ``data.root``; unused for ``digits``, which comes with scikit-learn. Shards are only
            listed, not opened; a URL takes one request.
        download: Whether torchvision may download what is missing.

    Raises:
        DataError: Unknown name; root not given, missing, empty, unreadable or not a folder; data
            set not found under it; no image in a folder of images; no shard, or an unreachable URL.
    """
    if name not in DATASETS:
        raise DataError(nearest(name, DATASETS, "data set"))
    if name == "digits":
        return
    if name == "webdataset":
        from ssl_samix.data.shards import find

        _given(name, root)
        find(str(root))
        return
    path = _given(name, root)
    will_download = download and DATASETS[name].automatic
    if will_download and not path.exists():
        return
    _check_folder(name, path, may_be_empty=will_download)
    if name == "folder":
        others: Counter[str] = Counter()
        if not _has_image(path, frozenset(), others):
            raise no_images(path, others)
    elif not will_download:
        _check_needs(name, path)


def is_there(name: str, root: str | os.PathLike[str] | None) -> bool:
    """Return whether data set ``name`` is under ``root``, as checked by ``check_layout``."""
    try:
        check_layout(name, root, download=False)
    except DataError:
        return False
    return True


def locate(name: str, root: str | os.PathLike[str] | None) -> Path:
    """Return the root of data set ``name``, given the root or the data set's own folder in it.

    ``.../cifar-10-batches-py`` and ``.../FashionMNIST/raw`` stand for the folder above them, which
    is what torchvision calls the root.

    Raises:
        DataError: ``root`` is None, for all but ``digits``.
    """
    if name in ("digits", "webdataset"):
        return Path()  # digits come with scikit-learn; shards need not be a path
    path = _given(name, root)
    parts = Path(DATASETS[name].folder).parts
    if path.joinpath(*parts).is_dir():
        return path
    for depth in range(len(parts), 0, -1):
        if path.parts[-depth:] == parts[:depth]:
            return path.parents[depth - 1]
    return path


def no_images(
    root: str | os.PathLike[str], others: Mapping[str, int], key: str = "data.root"
) -> DataError:
    """Return the error for a folder, given as ``key``, in which no file name is that of an image.

    ``others`` counts its files by ending.
    """
    held = f", but {count_by_ending(others)}" if others else ""
    return DataError(
        f"no image found under {key}={root}{held}: give a folder of files that end in .jpg, .png, "
        ".webp, .tif or another ending that Pillow reads"
    )


def _given(name: str, root: str | os.PathLike[str] | None) -> Path:
    if root is None or not os.fspath(root):
        special = {"folder": "<folder of images>", "webdataset": "<folder or pattern of shards>"}
        what = special.get(name, f"<folder that holds {name}>")
        raise DataError(f"data set '{name}' needs a folder: give data.root={what}")
    return expanded(root).absolute()


def _check_folder(name: str, path: Path, may_be_empty: bool) -> None:
    """Raise unless ``path`` is a folder that can be listed and is not empty."""
    try:
        with os.scandir(path) as entries:
            empty = next(entries, None) is None
    except FileNotFoundError:
        raise DataError(f"data.root={path} does not exist: {_way_out(name)}") from None
    except NotADirectoryError:
        raise DataError(f"data.root={path} is not a folder: {_way_out(name)}") from None
    except PermissionError:
        raise DataError(
            f"no permission to read data.root={path}: grant it or give another folder"
        ) from None
    except OSError as error:  # circular links, a server that does not respond
        reason = error.strerror or error
        raise DataError(f"cannot read data.root={path}: {reason}") from None
    if empty and not may_be_empty:
        raise DataError(f"data.root={path} is an empty folder: {_way_out(name)}")


def _check_needs(name: str, path: Path) -> None:
    layout = DATASETS[name]
    home = locate(name, path) / layout.folder
    missing = [
        need
        for need in layout.needs
        if not (home / need).exists()
        and not (name == "fashion_mnist" and (home / f"{need}.gz").exists())
    ]
    if missing:
        raise DataError(
            f"data set '{name}' not found under data.root={path} (looked for "
            f"{Path(layout.folder) / missing[0]}): {_way_out(name)}"
        )


def _way_out(name: str) -> str:
    layout = DATASETS[name]
    if name == "folder":
        return "give data.root=<folder of images>"
    if layout.automatic:
        return f"give the folder that holds {layout.folder}, or add data.download=true"
    holds = layout.folder or " and ".join(f"{need}/" for need in layout.needs)
    return f"give the folder that holds {holds}, from {layout.source} (no automatic download)"


def _has_image(
    path: str | os.PathLike[str], above: frozenset[tuple[int, int]], others: Counter[str]
) -> bool:
    """Return whether there is an image at or below ``path``; files are checked first.

    The endings of other files are counted in ``others``.
    """
    status = os.stat(path)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link back to a folder above
        return False
    folders = []
    for entry, kind, ending in visible(path):
        if kind == "image":
            return True
        if kind == "folder":
            folders.append(entry.path)
        elif kind == "other":
            others[ending] += 1
    return any(_has_image(folder, above | {here}, others) for folder in folders)
