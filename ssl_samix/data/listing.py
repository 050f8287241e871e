"""Folders are listed, and the listings of large trees are remembered between runs.

What is remembered of a folder holds while neither its times nor its inode have changed, so a warm
look at a tree costs one ``stat`` per folder and none per file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ssl_samix.data.cache import cache_folder, digest, load, store
from ssl_samix.data.layout import IMAGE_SUFFIXES
from ssl_samix.errors import DataError

T = TypeVar("T")
REMEMBERED_FROM = 50_000  # images; fewer are listed in less than a second
_FORMAT = 1  # of the file
# A file that comes within the same tick of the clock leaves the folder's time as it is; 2 s is the
# longest tick of a file system (FAT).
_SETTLED_NS = 2 * 10**9


@dataclass(frozen=True)
class Listing:
    """What one folder holds, sorted, without the hidden."""

    path: str
    folders: list[str]  # paths
    images: list[str]  # paths
    identity: tuple[int, int]  # device and inode, the same through every link


def remembered(root: str, look: Callable[[Listings], T]) -> T:
    """Return ``look(listings)``, for a look at a tree of which much may be known.

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
        # A folder that was remembered is gone, as behind a link: nothing of the rest is certain.
        listings = Listings(root, None)
        found = look(listings)
    if listings.changed and listings.images >= REMEMBERED_FROM:
        store(path, listings.content())
    return found


class Listings:
    """Lists folders, each from what is remembered of it or else from the disk.

    Args:
        root: The top of the tree.
        content: What ``content`` returned in an earlier process; anything else counts as nothing.

    Attributes:
        images: How many were listed.
        reused: Whether anything was remembered.
        changed: Whether anything was not.
    """

    def __init__(self, root: str, content: Any) -> None:
        self.images, self.reused, self.changed = 0, False, False
        self._root = root
        sound = isinstance(content, dict) and content.get("format") == _FORMAT
        known = content.get("folders") if sound else None
        self._old: dict[str, Any] = known if isinstance(known, dict) else {}
        self._new: dict[str, Any] = {}

    def __call__(self, path: str) -> Listing:
        """List the folder at ``path``.

        Raises:
            DataError: If it may not be listed.
            OSError: If it is not there or no folder.
        """
        status = os.stat(path)
        key = path.removeprefix(self._root)
        now = [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        held = _held(self._old.get(key), now)
        if held is None:
            settled = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
            folders, images, lasting = _list(path)
            self.changed = True
        else:
            folders, images = held
            settled = lasting = self.reused = True
        if settled and lasting:
            self._new[key] = [now, folders, images]
        self.images += len(images)
        inside = os.path.join(path, "")
        return Listing(
            path,
            [inside + name for name in folders],
            [inside + name for name in images],
            (status.st_dev, status.st_ino),
        )

    def content(self) -> dict[str, Any]:
        """Return what may be remembered, for JSON."""
        return {"format": _FORMAT, "root": self._root, "folders": self._new}


def _file(root: str) -> Path:
    return cache_folder() / "folders" / f"{digest(os.path.abspath(root))}.json"


def _held(entry: Any, now: list[int]) -> tuple[list[str], list[str]] | None:
    """Return the names of folders and images in ``entry``, if it is sound and still holds."""
    if not isinstance(entry, list) or len(entry) != 3 or entry[0] != now:
        return None
    folders, images = entry[1:]
    if not (isinstance(folders, list) and isinstance(images, list)):
        return None
    return folders, images


def _list(path: str) -> tuple[list[str], list[str], bool]:
    """Return the names of folders and images, sorted, and whether only a change here changes them.

    A link's target can come, go or become a folder while the folder of the link stays as it is.
    """
    folders, images, lasting = [], [], True
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                is_image = entry.name.lower().endswith(IMAGE_SUFFIXES)
                if entry.is_symlink() and not is_image:
                    lasting = False
                if entry.is_dir():
                    folders.append(entry.name)
                elif is_image:
                    images.append(entry.name)
    except PermissionError:
        raise DataError(f"no permission to list {path}: grant it or give another folder") from None
    return sorted(folders), sorted(images), lasting
