"""Find the images in a folder, and their labels; opens no image and does not import torch.

Splits and classes, with ``labels="auto"``:

- The root is a pair of splits if it holds one folder named ``train`` or ``training`` and at least
  one named ``val``, ``valid``, ``validation``, ``dev``, ``test`` or ``testing`` (in any case, a
  number may follow), or the former and no other image. Else the root is one tree.
- A tree (the root, or the training folder) is labelled if at least two folders directly in it hold
  images, at any depth, and no image lies directly in it. Each such folder is a class.
- Folders that look like splits (``train_images``, ``testB``) or parts (``images``, ``masks``) of
  one data set are classes only with ``labels=True``.
- Everything else is unlabelled: all images in the tree, at any depth.

``labels=False`` makes any tree unlabelled (folders by date, by camera), ``labels=True`` requires
class folders. Hidden files and folders, system folders (``@eaDir``), run folders and results are
skipped, links to folders are followed. The index's notes list what is left out.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ssl_samix.data.image_files import count_by_ending, visible
from ssl_samix.data.layout import no_images
from ssl_samix.errors import DataError
from ssl_samix.files import expanded

_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation", "dev", "test", "testing")  # the first is preferred
_THUMBNAILS = frozenset({"thumb", "thumbs", "thumbnail", "thumbnails"})
_PARTS = _THUMBNAILS | frozenset(
    {
        "image", "images", "img", "imgs", "jpegimages", "mask", "masks", "label", "labels",
        "annotation", "annotations", "segmentation", "segmentations", "segmentationclass",
        "segmentationobject", "gt", "groundtruth", "ground_truth", "preview", "previews",
        "unlabeled", "unlabelled",
    }
)  # fmt: skip
# Files that mark output of this package: of a run, of a protocol, of samix embed.
_MARKS = {
    "config.yaml": rb"^choices:",
    "results.json": rb'^  "protocol":',
    "paths.csv": rb"^row,path",
}
_HEAD = 2**12  # bytes of such a file that are read; the marks come first


@dataclass(frozen=True)
class Files:
    """N image files in a fixed order."""

    paths: list[str]  # N
    labels: list[int]  # N, positions in the class list, -1 where there is no label


@dataclass(frozen=True)
class FolderIndex:
    """Result of ``scan``: images, labels and classes of a folder."""

    train: Files
    val: Files | None  # None without a labelled val/ or test/
    classes: tuple[str, ...]  # sorted; empty when unlabelled
    notes: tuple[str, ...] = ()  # sentences: which folders are the splits, and what is left out


def scan(
    root: str | os.PathLike[str], labels: bool | str = "auto", key: str = "data.root"
) -> FolderIndex:
    """Return the images under ``root``; the module's docstring defines splits and classes.

    Args:
        root: The folder.
        labels: ``"auto"``, or whether folders are classes.
        key: The key that named the folder, for error messages.

    Raises:
        DataError: No image; a class that only val has; folders that may be classes or
            parts of one data set; ``labels=True`` and no class folders or images outside them; a
            folder that may not be read; an unknown ``labels``.
    """
    wanted = wanted_labels(labels)
    return _scan(_Walk(os.fspath(root)), wanted, key)


def given_images(folder: str, key: str = "images") -> FolderIndex:
    """Return the images, without labels, under the ``folder`` given as ``key``.

    Raises:
        DataError: It is empty or not a folder; else as ``scan``.
    """
    if not folder:
        raise DataError(f"{key}= is empty: give a folder of images")
    path = expanded(folder)
    if not path.is_dir():
        raise DataError(f"{key}={path} is not a folder: give a folder of images")
    return scan(os.path.abspath(path), labels=False, key=key)


def class_folders(path: str | os.PathLike[str]) -> tuple[Files, tuple[str, ...]]:
    """Return the images in the class folders of ``path`` and the sorted class names.

    Raises:
        DataError: No class folder with images, or images outside the class folders.
    """
    top = os.fspath(path)
    tree = _tree(_Walk(top), top)
    _is_labelled(tree, wanted=True)
    classes = tuple(sorted(tree.classes))
    return _labelled(tree, classes), classes


def empty_classes(root: str | os.PathLike[str]) -> list[str]:
    """Return the names of class folders under ``root`` without an image at any depth."""
    walk = _Walk(os.fspath(root))
    split = _split(walk)
    return _tree(walk, split[0] if split else walk.root).empty


def require_same_classes(train: tuple[str, ...], val: tuple[str, ...], val_path: str) -> None:
    """Raise unless both splits have the same classes.

    Raises:
        DataError: Names the classes that only one of the two has.
    """
    sides = {"only in train": set(train) - set(val), f"only in {val_path}": set(val) - set(train)}
    differ = [f"{side}: {join_names(sorted(names))}" for side, names in sides.items() if names]
    if differ:
        raise DataError(
            f"train and validation have different classes ({'; '.join(differ)}): "
            "give both the same class folders, each with images"
        )


def wanted_labels(labels: bool | str) -> bool | None:
    """Return ``data.labels`` as True, False, or None for auto.

    Raises:
        DataError: For any other value.
    """
    choices = {"auto": None, "true": True, "false": False}
    key = str(labels).lower()
    if key not in choices:
        raise DataError(f"data.labels must be auto, true or false, not '{labels}'")
    return choices[key]


def join_names(names: Sequence[str], most: int = 10) -> str:
    """Return up to ``most`` names as text, and the number of further ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True)
class _Listing:
    """Entries of one folder, sorted, without hidden ones."""

    path: str
    folders: list[str]  # paths
    images: list[str]  # paths
    others: Counter[str]  # number of files that are not images, by ending
    neither: list[str]  # paths that are neither folder nor file, such as broken links
    is_ours: bool  # whether it is a run folder, or holds results or embeddings
    identity: tuple[int, int]  # device and inode, the same through every link


def _list(path: str) -> _Listing:
    """Return the listing of the folder at ``path``.

    Raises:
        DataError: If there is no permission to list it.
        OSError: If it does not exist or is not a folder.
    """
    status, others = os.stat(path), Counter[str]()
    names: dict[str, list[str]] = {"folder": [], "image": [], "other": [], "neither": []}
    for entry, kind, ending in visible(path):
        names[kind].append(entry.name)
        if kind == "other":
            others[ending] += 1
    is_ours = any(_is_ours(path, name) for name in _MARKS.keys() & names["other"])
    inside = os.path.join(path, "")
    folders, images, neither = (
        [inside + name for name in sorted(names[kind])] for kind in ("folder", "image", "neither")
    )
    return _Listing(path, folders, images, others, neither, is_ours, (status.st_dev, status.st_ino))


def _is_ours(folder: str, name: str) -> bool:
    """Return whether this package wrote the file of that name."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return re.search(_MARKS[name], file.read(_HEAD), re.MULTILINE) is not None
    except OSError:
        return False


@dataclass
class _Found:
    """Images and other entries in a folder and its subfolders."""

    images: list[str] = field(default_factory=list)  # paths, those directly in it first
    others: Counter[str] = field(default_factory=Counter)  # files of other kinds, by ending
    neither: list[str] = field(default_factory=list)  # neither files nor folders
    ours: list[str] = field(default_factory=list)  # run folders and results

    def add(self, more: _Found) -> None:
        self.images += more.images
        self.others += more.others
        self.neither += more.neither
        self.ours += more.ours


class _Walk:
    """Walks the folders below a root, each at most once."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.top = _list(root)
        self._below: dict[str, _Found] = {}

    def below(self, folder: str, parent: _Listing) -> _Found:
        """Return the entries in a ``folder`` of ``parent`` and its subfolders."""
        if folder not in self._below:
            self._below[folder] = self._at(folder, frozenset({parent.identity}))
        return self._below[folder]

    def _at(self, path: str, above: frozenset[tuple[int, int]]) -> _Found:
        listing = _list(path)
        if listing.identity in above:  # a link back to a folder above
            return _Found()
        if listing.is_ours:
            return _Found(ours=[path])
        found = _directly_in(listing)
        for folder in listing.folders:
            found.add(self._at(folder, above | {listing.identity}))
        return found


def _directly_in(listing: _Listing) -> _Found:
    return _Found([*listing.images], listing.others.copy(), [*listing.neither])


@dataclass(frozen=True)
class _Tree:
    path: str
    loose: list[str]  # images directly in it
    classes: dict[str, list[str]]  # folder name -> all images below it, only folders with images
    empty: list[str]  # names of folders with neither images nor files of this package
    found: _Found  # all entries in it and its subfolders


def _tree(walk: _Walk, path: str) -> _Tree:
    top = walk.top if path == walk.root else _list(path)
    below = {os.path.basename(folder): walk.below(folder, top) for folder in top.folders}
    found = _directly_in(top)
    for part in below.values():
        found.add(part)
    classes = {name: part.images for name, part in below.items() if part.images}
    empty = [name for name, part in below.items() if not part.images and not part.ours]
    return _Tree(path, top.images, classes, empty, found)


def _scan(walk: _Walk, wanted: bool | None, key: str) -> FolderIndex:
    split = _split(walk)
    tree = _tree(walk, split[0] if split else walk.root)
    if not tree.found.images:
        raise no_images(walk.root, tree.found.others, key)
    if wanted is None:
        _ask_for_classes(tree)
    val: _Tree | None = None
    notes: list[str] = []
    if _is_labelled(tree, wanted):
        classes = tuple(sorted(tree.classes))
        train = _labelled(tree, classes)
        if split:
            val, notes = _first_val(walk, split[1], classes)
    else:
        train, classes = Files(tree.found.images, [-1] * len(tree.found.images)), ()
    found = tree.found
    if split:
        found.add(val.found if val else _Found())
        notes = [*_split_notes(walk, tree, val), *notes]
    notes += _left_out(found, walk.root)
    # File names may not be valid UTF-8, and notes are printed.
    sound = tuple(note.encode("utf-8", "replace").decode() for note in notes)
    return FolderIndex(train, _labelled(val, classes) if val else None, classes, sound)


def _split(walk: _Walk) -> tuple[str, list[str]] | None:
    """Return the training folder and the validation folders, the preferred first; or None."""
    folders = walk.top.folders
    roles = {folder: _role(os.path.basename(folder)) for folder in folders}
    train = [folder for folder, role in roles.items() if role in _TRAIN_NAMES]
    val = [folder for name in _VAL_NAMES for folder, role in roles.items() if role == name]
    if len(train) != 1:
        return None
    others = [folder for folder in folders if folder not in train]
    alone = not walk.top.images and not any(walk.below(f, walk.top).images for f in others)
    return (train[0], val) if val or alone else None


def _role(folder: str) -> str:
    """Return a folder's name in lower case, without a trailing number (``train2017``)."""
    return re.sub(r"[-_ ]?\d+$", "", folder.lower())


def _ask_for_classes(tree: _Tree) -> None:
    """Raise if folders could be classes, but look like splits or parts of one data set.

    Raises:
        DataError: With the settings that decide it.
    """
    splits = [name for name in tree.classes if _names_a_split(name)]
    parts = [name for name in tree.classes if _role(name) in _PARTS]
    kinds = {_role(name) for name in parts}  # label0 and label1 may be classes
    if len(splits) + len(kinds) < 2 and not kinds & _THUMBNAILS:
        return
    suspect = [name for name in tree.classes if name in (*splits, *parts)]
    rename = "rename them to train and val, or " if len(splits) > 1 else ""
    raise DataError(
        f"the folders {join_names(suspect)} in {tree.path} look like parts of one data set, not "
        f"like classes: {rename}give data.root=<the one to train on>, data.labels=true if they are "
        "classes, or data.labels=false to train on all their images"
    )


def _names_a_split(folder: str) -> bool:
    """Return whether a folder's name contains that of a split (``trainA``, ``test_images``)."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder).lower())
    return any(word in (*_TRAIN_NAMES, *_VAL_NAMES) for word in words)


def _is_labelled(tree: _Tree, wanted: bool | None) -> bool:
    if wanted and not tree.classes:
        raise DataError(
            f"{tree.path} has no class folders: put the images of each class in a folder"
        )
    if wanted and tree.loose:
        raise DataError(
            f"{len(tree.loose)} images lie outside the class folders of {tree.path} "
            f"({join_names([os.path.basename(path) for path in tree.loose])}): move them into one"
        )
    return len(tree.classes) >= 2 and not tree.loose if wanted is None else wanted


def _labelled(tree: _Tree, classes: tuple[str, ...]) -> Files:
    """Return the images of a tree, labelled by position in ``classes``; classes may be missing."""
    held = [(label, tree.classes.get(name, [])) for label, name in enumerate(classes)]
    paths = [path for _, images in held for path in images]
    return Files(paths, [label for label, images in held for _ in images])


def _first_val(
    walk: _Walk, paths: list[str], classes: tuple[str, ...]
) -> tuple[_Tree | None, list[str]]:
    """Return the first validation folder that has class folders, and notes."""
    notes: list[str] = []
    for path in paths:
        tree, name = _tree(walk, path), os.path.basename(path)
        if _is_labelled(tree, None) or (not tree.loose and set(tree.classes) & set(classes)):
            if set(tree.classes) - set(classes):
                require_same_classes(classes, tuple(tree.classes), name)
            missing = sorted(set(classes) - set(tree.classes))
            lacks = [f"{name}/ has no images of class {join_names(missing)}"] if missing else []
            return tree, notes + lacks
        notes.append(f"{name}/ has no class folders and is not used for validation")
    return None, notes


def _split_notes(walk: _Walk, train: _Tree, val: _Tree | None) -> list[str]:
    """Return a note: which folders are the splits, and how many images lie beside them."""
    used = {os.path.basename(tree.path): tree for tree in (train, val) if tree}
    beside = [f"{len(walk.top.images)} images"] if walk.top.images else []
    for folder in walk.top.folders:
        images = walk.below(folder, walk.top).images
        if os.path.basename(folder) not in used and images:
            beside.append(f"{os.path.basename(folder)}/ ({len(images)} images)")
    names = " and ".join(f"{name}/" for name in used)
    purpose = "training and validation images" if val else "images"
    first = f"the {purpose} are those in {names}"
    return [first + (f", left out beside {names}: {join_names(beside)}" if beside else "")]


def _left_out(found: _Found, root: str) -> list[str]:
    notes: list[str] = []
    if found.others:
        notes.append(f"left out: {count_by_ending(found.others)}")
    if found.neither:
        notes.append(
            f"left out: {len(found.neither)} names that are neither files nor folders (broken "
            f"links, pipes), such as {os.path.relpath(found.neither[0], root)}"
        )
    if found.ours:
        names = [os.path.relpath(path, root) for path in found.ours]
        notes.append(f"left out: what samix wrote in {join_names(names, 3)}")
    return notes
