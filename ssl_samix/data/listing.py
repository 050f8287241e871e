"""Listings of folders; those of large trees are cached between runs.

A cached listing is valid while the folder's times and inode are unchanged, so a tree that was
listed before costs one ``stat`` per folder and none per file.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ssl_samix.data.cache import cache_folder, digest, load, store
from ssl_samix.data.image_files import endings, visible

T = TypeVar("T")
REMEMBERED_FROM = 50_000  # images; fewer are listed in less than a second
_FORMAT = 2  # of the cache file's format
# Files that mark output of this package: of a run, of a protocol, of samix embed.
_MARKS = {
    "config.yaml": rb"^choices:",
    "results.json": rb'^  "protocol":',
    "paths.csv": rb"^row,path",
}
_HEAD = 2**12  # bytes of such a file that are read; the marks come first
# A file added within the same clock tick does not change the folder's time; 2 s is the longest
# tick of a file system (FAT).
_SETTLED_NS = 2 * 10**9


@dataclass(frozen=True)
class Listing:
    """Entries of one folder, sorted, without hidden ones."""

    path: str
    folders: list[str]  # paths
    images: list[str]  # paths
    others: dict[str, int]  # number of files that are not images, by ending
    neither: list[str]  # paths that are neither folder nor file, such as broken links
    is_ours: bool  # whether it is a run folder, or holds results or embeddings
    identity: tuple[int, int]  # device and inode, the same through every link


def remembered(root: str, look: Callable[[Listings], T]) -> T:
    """Return ``look(listings)``, where listings that are still valid come from the cache.

    Args:
        root: The top of the tree.
        look: Lists folders at and below ``root`` by calling its argument.
    """
    path = _file(root)
    listings = Listings(root, load(path))
    try:
        found = look(listings)
    except OSError:
        if not listings.reused:
            raise
        # A cached folder is gone, such as behind a link: discard the whole cache of this tree.
        listings = Listings(root, None)
        found = look(listings)
    if listings.changed and listings.images >= REMEMBERED_FROM:
        store(path, listings.content())
    return found


class Listings:
    """Lists folders, from the cache or else from disk.

    Args:
        root: The top of the tree.
        content: What ``content`` returned in an earlier process; anything else is ignored.

    Attributes:
        images: Number of images listed.
        reused: Whether any listing came from the cache.
        changed: Whether any did not.
    """

    def __init__(self, root: str, content: Any) -> None:
        self.images, self.reused, self.changed = 0, False, False
        self._root = root
        sound = isinstance(content, dict) and content.get("format") == _FORMAT
        sound = sound and content.get("endings") == sorted(endings())
        known = content.get("folders") if sound else None
        self._old: dict[str, Any] = known if isinstance(known, dict) else {}
        self._new: dict[str, Any] = {}

    def __call__(self, path: str) -> Listing:
        """Return the listing of the folder at ``path``.

        Raises:
            DataError: If there is no permission to list it.
            OSError: If it does not exist or is not a folder.
        """
        status = os.stat(path)
        key = path.removeprefix(self._root)
        now = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        held = _held(self._old.get(key), now)
        if held is None:
            settled = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
            held, lasting = _list(path)
            self.changed = True
        else:
            settled = lasting = self.reused = True
        if settled and lasting:
            self._new[key] = [now, *vars(held).values()]
        self.images += len(held.images)
        inside = os.path.join(path, "")
        return Listing(
            path,
            [inside + name for name in held.folders],
            [inside + name for name in held.images],
            held.others,
            [inside + name for name in held.neither],
            held.is_ours,
            (status.st_dev, status.st_ino),
        )

    def content(self) -> dict[str, Any]:
        """Return what can be cached, as JSON values."""
        known = sorted(endings())
        return {"format": _FORMAT, "endings": known, "root": self._root, "folders": self._new}


@dataclass(frozen=True)
class _Names:
    """Entries of one folder by name; the fields are those of `Listing`."""

    folders: list[str]
    images: list[str]
    others: dict[str, int]
    neither: list[str]
    is_ours: bool


def _file(root: str) -> Path:
    return cache_folder() / "folders" / f"{digest(os.path.abspath(root))}.json"


def _held(entry: Any, now: list[int]) -> _Names | None:
    """Return the cached listing in ``entry``, if it is valid."""
    kinds = (list, list, dict, list, bool)
    if not isinstance(entry, list) or len(entry) != 1 + len(kinds) or entry[0] != now:
        return None
    if not all(isinstance(part, kind) for part, kind in zip(entry[1:], kinds, strict=True)):
        return None
    return _Names(*entry[1:])


def _list(path: str) -> tuple[_Names, bool]:
    """Return a folder's entries, sorted, and whether they depend on this folder only.

    A link's target can appear, disappear or become a folder while the link's folder is unchanged.
    """
    names: dict[str, list[str]] = {"folder": [], "image": [], "other": [], "neither": []}
    others: Counter[str] = Counter()
    lasting = True
    for entry, kind, ending in visible(path):
        names[kind].append(entry.name)
        if kind == "other":
            others[ending] += 1
        if kind != "image" and entry.is_symlink():
            lasting = False
    is_ours = any(_is_ours(path, name) for name in _MARKS.keys() & names["other"])
    folders, images, neither = (sorted(names[k]) for k in ("folder", "image", "neither"))
    return _Names(folders, images, dict(others), neither, is_ours), lasting


def _is_ours(folder: str, name: str) -> bool:
    """Return whether this package wrote the file of that name."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return re.search(_MARKS[name], file.read(_HEAD), re.MULTILINE) is not None
    except OSError:
        return False
