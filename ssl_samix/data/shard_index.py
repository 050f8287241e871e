"""What tar shards hold: member by member where its bytes are. Torch is not needed.

Layout: WebDataset's. ``key.jpg`` (any suffix of an image) is a picture, ``key.cls`` beside it in
the same shard the number of its class; the key ends at the first dot of the file's name. All other
members, hidden files and links are skipped.
"""

from __future__ import annotations

import logging
import os
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from tqdm import tqdm

from ssl_samix.data.cache import load, store
from ssl_samix.data.folder import wanted_labels
from ssl_samix.data.layout import IMAGE_SUFFIXES
from ssl_samix.data.shards import CONNECTIONS, Found, Shard, fetch, find, index_file
from ssl_samix.errors import DataError

_log = logging.getLogger(__name__)
_FORMAT = 1  # of the file
_LABEL = ".cls"
_BAR_FROM = 10  # shards


@dataclass(frozen=True)
class Members:
    """The n images of one shard, in its order."""

    names: list[str]  # n
    offsets: list[int]  # n, of the first byte
    sizes: list[int]  # n, bytes
    labels: list[int | None]  # n, numbers as they stand in the .cls members


def index(root: str) -> list[tuple[Shard, Members]]:
    """List the images of all shards, each shard from the user's cache if it has not changed.

    Args:
        root: As for ``find``.

    Raises:
        DataError: No shard; a shard that cannot be read, is truncated or is no plain tar; no image
            in any of them.
        UserError: No room for the copies of remote shards.
    """
    found = find(root)
    members = []
    hidden = len(found) < _BAR_FROM or not sys.stderr.isatty()
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        with tqdm(total=len(found), unit=" shards", desc="indexing", disable=hidden) as bar:
            for one in pool.map(_indexed, found):
                members.append(one)
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # a mistake is told before the other shards are fetched
    indexed = [(f.shard, m) for f, m in zip(found, members, strict=True)]
    empty = [shard.url for shard, m in indexed if not m.names]
    if len(empty) == len(indexed):
        raise DataError(
            f"no image in the {len(indexed)} shards of data.root={root}: their members must end in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    if empty:
        _log.warning("%d of %d shards hold no image: %s", len(empty), len(indexed), empty[0])
    return indexed


def numbered(
    numbers: Sequence[int | None], wanted: bool | str
) -> tuple[list[int], tuple[str, ...]]:
    """Make labels of the numbers in ``.cls`` members.

    Args:
        numbers: N, None where there is none.
        wanted: ``data.labels``: with ``"auto"`` there are labels if all images have a number, and
            not all the same.

    Returns:
        N positions in the classes, -1 without labels; the classes, by ascending number.

    Raises:
        DataError: Labels are demanded, and an image has none; ``wanted`` is unknown.
    """
    demanded = wanted_labels(wanted)
    missing = sum(number is None for number in numbers)
    if demanded and missing:
        raise DataError(
            f"{missing} of {len(numbers)} images have no number in a {_LABEL} member beside them: "
            "add them, or give data.labels=false"
        )
    classes = sorted({number for number in numbers if number is not None})
    if demanded or (demanded is None and not missing and len(classes) > 1):
        place = {number: i for i, number in enumerate(classes)}
        return [place[n] for n in numbers if n is not None], tuple(map(str, classes))
    if demanded is None and 0 < missing < len(numbers):
        _log.warning("%d of %d images have no label: none is used", missing, len(numbers))
    return [-1] * len(numbers), ()


def _indexed(found: Found) -> Members:
    """Return what a shard holds, and see to it that it is there to be read."""
    shard = found.shard
    fetch(found)
    known = _sound(load(index_file(shard)))
    if known is not None:
        return known
    try:
        members = read_members(shard)
    except DataError:
        if shard.is_copy:
            with suppress(OSError):
                os.unlink(shard.path)  # a better one has to be fetched
        raise
    store(index_file(shard), {"format": _FORMAT, "url": shard.url, **vars(members)})
    return members


def _sound(content: Any) -> Members | None:
    """Return the members in a cached file; None if it is damaged."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return None
    columns = [content.get(key) for key in ("names", "offsets", "sizes", "labels")]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):  # type: ignore[arg-type]
        return None
    return Members(*columns)  # type: ignore[arg-type]


def read_members(shard: Shard) -> Members:
    """Read the headers of a tar file, seeking from one to the next.

    Raises:
        DataError: It cannot be read, is truncated or is no plain tar.
    """
    try:
        with open(shard.path, "rb") as file:
            return _members(file)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(
            f"{shard.url} is truncated or no uncompressed tar file ({error}): make or fetch it anew"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {shard.url}: {error.strerror or error}") from error


def _members(file: BinaryIO) -> Members:
    places: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}  # by key
    with tarfile.open(fileobj=file, mode="r:") as tar:
        # next() instead of iteration: the list of members, which tarfile keeps, would be walked
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # a hundred times the memory of ours
            name = member.name
            if not member.isreg() or member.issparse() or _is_hidden(name):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                places.append((name, member.offset_data, member.size))
            elif name.endswith(_LABEL):
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                with suppress(ValueError):  # no number: the image has no label
                    labels[_key(name)] = int(content.read())
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the mark at its end is missing")
    names, offsets, sizes = ([place[k] for place in places] for k in range(3))
    return Members(names, offsets, sizes, [labels.get(_key(name)) for name in names])  # type: ignore[arg-type]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def _key(name: str) -> str:
    """Return a member's path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
