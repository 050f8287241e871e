"""What tar shards hold: member by member where its bytes are. Torch is not needed.

Layout: WebDataset's. ``key.jpg`` (any suffix of an image) is a picture, ``key.cls`` beside it in
the same shard the number or the name of its class. The key ends at the first dot of the file's
name, and all that follows is the suffix, upper or lower case: ``key.seg.png`` is no picture. All
other members, hidden files and links are skipped.
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
_FORMAT = 2  # of the file
_LABEL = ".cls"
_BAR_FROM = 10  # shards


@dataclass(frozen=True)
class Members:
    """The n images of one shard, in its order."""

    names: list[str]  # n
    offsets: list[int]  # n, of the first byte
    sizes: list[int]  # n, bytes
    labels: list[int | str | None]  # n, a number or a word, as it stands in the .cls members
    left_out: int  # images that are not a sample's picture, such as key.seg.png
    example: str  # the first of them


def index(root: str) -> list[tuple[Shard, Members]]:
    """List the images of all shards, each shard from the user's cache if it has not changed.

    Args:
        root: As for ``find``.

    Raises:
        DataError: No shard; a shard that cannot be read, is truncated or is no plain tar; several
            pictures of one sample; no image in any of them.
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
    left_out = sum(m.left_out for _, m in indexed)
    example = next((m.example for _, m in indexed if m.left_out), "")
    if len(empty) == len(indexed):
        but = f", and {example} has more than that" if left_out else ""
        raise DataError(
            f"no image in the {len(indexed)} shards of data.root={root}: what follows the first dot"
            f" of a member's name must be one of {', '.join(IMAGE_SUFFIXES)}{but}"
        )
    if left_out:
        _log.warning(
            "%d images are left out, such as %s: more than the suffix of an image follows the "
            "first dot of their names",
            *(left_out, example),
        )
    if empty:
        _log.warning("%d of %d shards hold no image: %s", len(empty), len(indexed), empty[0])
    return indexed


def numbered(
    found: Sequence[int | str | None], wanted: bool | str
) -> tuple[list[int], tuple[str, ...]]:
    """Make labels of what is in the ``.cls`` members: numbers, or names of classes.

    Args:
        found: N, None where there is none.
        wanted: ``data.labels``: with ``"auto"`` there are labels if all images have one, and not
            all the same.

    Returns:
        N positions in the classes, -1 without labels; the classes, by ascending number or name.

    Raises:
        DataError: Labels are demanded, and an image has none; some are numbers and others words,
            or no text at all; ``wanted`` is unknown.
    """
    demanded = wanted_labels(wanted)
    missing = sum(label is None for label in found)
    if demanded and missing:
        raise DataError(
            f"{missing} of {len(found)} images have no number or name in a {_LABEL} member beside "
            "them: add them, or give data.labels=false"
        )
    kinds = {label for label in found if label is not None} if demanded is not False else set()
    _check_labels(kinds)
    classes = sorted(kinds)  # of one type
    if demanded or (not missing and len(classes) > 1):
        place = {label: i for i, label in enumerate(classes)}
        return [place[label] for label in found if label is not None], tuple(map(str, classes))
    if demanded is None and 0 < missing < len(found):
        _log.warning("%d of %d images have no label: none is used", missing, len(found))
    return [-1] * len(found), ()


def _check_labels(kinds: set[int | str]) -> None:
    words = sorted(label for label in kinds if isinstance(label, str))
    numbers = sorted(label for label in kinds if isinstance(label, int))
    unfit = next(
        (w for w in words if not w.isprintable() or "\N{REPLACEMENT CHARACTER}" in w), None
    )
    if unfit is not None:
        raise DataError(
            f"a {_LABEL} member must hold one number or one name, as text, and one holds "
            f"{unfit[:40]!r}: write it anew, or give data.labels=false"
        )
    if words and numbers:
        raise DataError(
            f"{_LABEL} members hold numbers, such as {numbers[0]}, and names, such as {words[0]}: "
            "write either everywhere, or give data.labels=false"
        )


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
    left_out, example = content.get("left_out"), content.get("example")
    if not isinstance(left_out, int) or not isinstance(example, str):
        return None
    return Members(*columns, left_out, example)  # type: ignore[call-arg, arg-type]  # four columns


def read_members(shard: Shard) -> Members:
    """Read the headers of a tar file, seeking from one to the next.

    Raises:
        DataError: It cannot be read, is truncated or is no plain tar; a sample has several
            pictures.
    """
    try:
        with open(shard.path, "rb") as file:
            parts = _read_parts(file)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(
            f"{shard.url} is truncated or no uncompressed tar file ({error}): make or fetch it anew"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {shard.url}: {error.strerror or error}") from error
    _check_one_picture(shard, parts)
    pictures = [(key, *place) for key, places in parts.pictures.items() for place in places]
    keys, names, offsets, sizes = ([picture[k] for picture in pictures] for k in range(4))
    others = [name for names in parts.others.values() for name in names]
    labels = [parts.labels.get(key) for key in keys]  # type: ignore[arg-type]
    return Members(names, offsets, sizes, labels, len(others), (others or [""])[0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Parts:
    """What is in a shard, by the key of the sample that it belongs to."""

    pictures: dict[str, list[tuple[str, int, int]]]  # name, offset and size in bytes
    others: dict[str, list[str]]  # names of further images
    labels: dict[str, int | str]


def _read_parts(file: BinaryIO) -> _Parts:
    parts = _Parts({}, {}, {})
    with tarfile.open(fileobj=file, mode="r:") as tar:
        # next() instead of iteration: the list of members, which tarfile keeps, would be walked
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # a hundred times the memory of ours
            name = member.name
            if not member.isreg() or member.issparse() or _is_hidden(name):
                continue
            key, suffix = _split(name)
            if suffix in IMAGE_SUFFIXES:
                place = (name, member.offset_data, member.size)
                parts.pictures.setdefault(key, []).append(place)
            elif suffix.endswith(IMAGE_SUFFIXES):
                parts.others.setdefault(key, []).append(name)
            elif suffix == _LABEL:
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                label = _label(content.read())
                if label is not None:
                    parts.labels[key] = label
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the mark at its end is missing")
    return parts


def _check_one_picture(shard: Shard, parts: _Parts) -> None:
    """Refuse a key of several pictures, or of none but several other images: which one is meant?"""
    several = [[place[0] for place in places] for places in parts.pictures.values()]
    several += [names for key, names in parts.others.items() if key not in parts.pictures]
    first = next((names for names in several if len(names) > 1), None)
    if first is not None:
        raise DataError(
            f"in {shard.url}, {first[0]} and {first[1]} are images of one sample, whose name ends "
            "at the first dot: pack them anew under names that differ up to there, such as "
            "img_0001.jpg for img.0001.jpg"
        )


def _label(content: bytes) -> int | str | None:
    """Return the number or the word that a label is; None: it is empty."""
    text = content.decode("utf-8", "replace").strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def _split(name: str) -> tuple[str, str]:
    """Split a member's path at the first dot of the file's name; the suffix is in lower case."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return folder + slash + key, (dot + suffix).lower()
