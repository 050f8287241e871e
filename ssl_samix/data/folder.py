"""A folder of images becomes lists of paths and labels; no image is opened, torch not needed.

What is a class, with ``labels="auto"``:

- The root is a pair of splits if it holds ``train/`` and one of ``val/``, ``valid/``,
  ``validation/``, ``test/``, or ``train/`` and nothing else. Else the root is one tree.
- A tree (the root, or ``train/``) is labelled if at least two folders directly in it hold images,
  at any depth, and no image lies directly in it. Each such folder is a class.
- Everything else is unlabelled: all images in the tree, at any depth.

``labels=False`` declares any tree unlabelled (folders by date, by camera), ``labels=True`` demands
class folders. Hidden files and folders are skipped, links to folders are followed. The listings of
large trees are remembered (``ssl_samix.data.listing``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ssl_samix.data.layout import no_images
from ssl_samix.data.listing import Listing, Listings, remembered
from ssl_samix.errors import DataError

_log = logging.getLogger(__name__)
_VAL_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class Files:
    """N image files in a fixed order."""

    paths: list[str]  # N
    labels: list[int]  # N, positions in the class list, -1 where there is no label


@dataclass(frozen=True)
class FolderIndex:
    """What a folder of images holds."""

    train: Files
    val: Files | None  # None without a labelled val/ or test/
    classes: tuple[str, ...]  # sorted; empty when unlabelled


def scan(
    root: str | os.PathLike[str], labels: bool | str = "auto", key: str = "data.root"
) -> FolderIndex:
    """List the images under ``root``; the module's docstring says what counts as a class.

    Args:
        root: The folder.
        labels: ``"auto"``, or whether folders are classes.
        key: What the folder was given as, for the sentence about one without images.

    Raises:
        DataError: No image; classes of train and val differ; ``labels=True`` and no class folders
            or images outside them; a folder that may not be read; an unknown ``labels``.
    """
    wanted = wanted_labels(labels)
    path = os.fspath(root)
    return remembered(path, lambda listings: _scan(listings, path, wanted, key))


def _scan(listings: Listings, root: str, wanted: bool | None, key: str) -> FolderIndex:
    top = listings(root)
    folders = {os.path.basename(folder): folder for folder in top.folders}
    val_names = [name for name in _VAL_NAMES if name in folders]
    is_split = "train" in folders and (val_names or (len(folders) == 1 and not top.images))
    tree = _tree(listings, listings(folders["train"]) if is_split else top)
    if not tree.loose and not tree.classes:
        raise no_images(root, key)
    if not _is_labelled(tree, wanted):
        paths = [*tree.loose, *(path for files in tree.classes.values() for path in files)]
        return FolderIndex(Files(paths, [-1] * len(paths)), None, ())
    train, classes = _labelled(tree)
    val_paths = [folders[name] for name in val_names] if is_split else []
    return FolderIndex(train, _first_val(listings, val_paths, classes), classes)


def class_folders(path: str | os.PathLike[str]) -> tuple[Files, tuple[str, ...]]:
    """Return the images in the class folders of ``path`` and the sorted class names.

    Raises:
        DataError: No class folder with images, or images outside the class folders.
    """
    top = os.fspath(path)
    tree = remembered(top, lambda listings: _tree(listings, listings(top)))
    _is_labelled(tree, wanted=True)
    return _labelled(tree)


def empty_classes(root: str | os.PathLike[str]) -> list[str]:
    """Name the folders, among the classes under ``root``, that hold no image at any depth."""
    path = os.fspath(root)

    def look(listings: Listings) -> list[str]:
        top = listings(path)
        train = [folder for folder in top.folders if os.path.basename(folder) == "train"]
        classes = listings(train[0]).folders if train and not top.images else top.folders
        return [os.path.basename(c) for c in classes if not _walk(listings, c, frozenset())]

    return remembered(path, look)


def require_same_classes(train: tuple[str, ...], val: tuple[str, ...], val_path: str) -> None:
    """Raise unless both splits have the same classes.

    Raises:
        DataError: Names the classes that only one of the two has.
    """
    sides = {"only in train": set(train) - set(val), f"only in {val_path}": set(val) - set(train)}
    differ = [f"{side}: {listed(sorted(names))}" for side, names in sides.items() if names]
    if differ:
        raise DataError(
            f"train and validation have different classes ({'; '.join(differ)}): "
            "give both the same class folders, each with images"
        )


@dataclass(frozen=True)
class _Tree:
    path: str
    loose: list[str]  # images directly in it
    classes: dict[str, list[str]]  # folder name -> all images below it, only folders with images


def wanted_labels(labels: bool | str) -> bool | None:
    """Return what ``data.labels`` says: true, false, or None for auto.

    Raises:
        DataError: It is none of them.
    """
    choices = {"auto": None, "true": True, "false": False}
    key = str(labels).lower()
    if key not in choices:
        raise DataError(f"data.labels must be auto, true or false, not '{labels}'")
    return choices[key]


def _tree(listings: Listings, top: Listing) -> _Tree:
    here = frozenset({top.identity})
    below = {os.path.basename(folder): _walk(listings, folder, here) for folder in top.folders}
    return _Tree(top.path, top.images, {name: files for name, files in below.items() if files})


def _walk(listings: Listings, path: str, above: frozenset[tuple[int, int]]) -> list[str]:
    """Return all images at and below ``path``: its own first, then folder by folder."""
    listing = listings(path)
    if listing.identity in above:  # a link back to a folder above
        return []
    found = listing.images
    for folder in listing.folders:
        found.extend(_walk(listings, folder, above | {listing.identity}))
    return found


def _is_labelled(tree: _Tree, wanted: bool | None) -> bool:
    if wanted and not tree.classes:
        raise DataError(
            f"{tree.path} has no class folders: put the images of each class in a folder"
        )
    if wanted and tree.loose:
        raise DataError(
            f"{len(tree.loose)} images lie outside the class folders of {tree.path} "
            f"({listed([os.path.basename(path) for path in tree.loose])}): move them into one"
        )
    return len(tree.classes) >= 2 and not tree.loose if wanted is None else wanted


def _labelled(tree: _Tree) -> tuple[Files, tuple[str, ...]]:
    classes = tuple(sorted(tree.classes))
    paths = [path for name in classes for path in tree.classes[name]]
    labels = [label for label, name in enumerate(classes) for _ in tree.classes[name]]
    return Files(paths, labels), classes


def _first_val(listings: Listings, paths: list[str], classes: tuple[str, ...]) -> Files | None:
    """Return the first of the validation folders that has class folders."""
    for path in paths:
        tree = _tree(listings, listings(path))
        if _is_labelled(tree, None) or (not tree.loose and set(tree.classes) & set(classes)):
            val, val_classes = _labelled(tree)
            require_same_classes(classes, val_classes, os.path.basename(path))
            return val
        _log.warning("%s has no class folders and is not used for validation", path)
    return None


def listed(names: Sequence[str], most: int = 10) -> str:
    """Join up to ``most`` names, and say how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
