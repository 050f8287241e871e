"""Index of tar shards: names, offsets, sizes and labels of their images; imports no torch.

Layout: WebDataset's. ``key.jpg`` (any suffix of an image) is a picture, ``key.cls`` beside it in
the same shard the number or the name of its class. The key ends at the first dot of the file's
name, and all that follows is the suffix, upper or lower case: ``key.seg.png`` is not one. All
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
    labels: list[int | str | None]  # n, a number or a name, as in the .cls members
    left_out: int  # images that are not a sample's picture, such as key.seg.png
    example: str  # the first of them


def index(root: str) -> list[tuple[Shard, Members]]:
    """Return the images of all shards; unchanged shards come from the user's cache.

    Args:
        root: As for ``find``.

    Raises:
        DataError: No shard; a shard that cannot be read, is truncated or not a plain tar; several
            pictures of one sample; no image in any of them.
        UserError: No space for the copies of remote shards.
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
        pool.shutdown(cancel_futures=True)  # report an error before the other shards are copied
    indexed = [(f.shard, m) for f, m in zip(found, members, strict=True)]
    empty = [shard.url for shard, m in indexed if not m.names]
    left_out = sum(m.left_out for _, m in indexed)
    example = next((m.example for _, m in indexed if m.left_out), "")
    if len(empty) == len(indexed):
        but = f", unlike {example}" if left_out else ""
        raise DataError(
            f"no image in the {len(indexed)} shards of data.root={root}: a member's suffix, all "
            f"after the first dot of its name, must be one of {', '.join(IMAGE_SUFFIXES)}{but}"
        )
    if left_out:
        _log.warning(
            "%d images are left out, such as %s: all after the first dot of a name must be the "
            "suffix of an image",
            *(left_out, example),
        )
    if empty:
        _log.warning("%d of %d shards hold no image: %s", len(empty), len(indexed), empty[0])
    return indexed


def numbered(
    found: Sequence[int | str | None], wanted: bool | str
) -> tuple[list[int], tuple[str, ...]]:
    """Return labels and classes from the content of ``.cls`` members: numbers or class names.

    Args:
        found: N contents, None where there is none.
        wanted: ``data.labels``: with ``"auto"`` there are labels if all images have one, and not
            all the same.

    Returns:
        N positions in the classes, -1 without labels; the classes, by ascending number or name.

    Raises:
        DataError: Labels are required, and an image has none; some are numbers and others names,
            or not text; ``wanted`` is unknown.
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
        _log.warning("%d of %d images have no label: labels are not used", missing, len(found))
    return [-1] * len(found), ()


def _check_labels(kinds: set[int | str]) -> None:
    words = sorted(label for label in kinds if isinstance(label, str))
    numbers = sorted(label for label in kinds if isinstance(label, int))
    unfit = next(
        (w for w in words if not w.isprintable() or "\N{REPLACEMENT CHARACTER}" in w), None
    )
    if unfit is not None:
        raise DataError(
            f"a {_LABEL} member must hold one number or one name, as text, but one holds "
            f"{unfit[:40]!r}: correct it, or give data.labels=false"
        )
    if words and numbers:
        raise DataError(
            f"{_LABEL} members hold numbers, such as {numbers[0]}, and names, such as {words[0]}: "
            "use one kind everywhere, or give data.labels=false"
        )


def _indexed(found: Found) -> Members:
    """Return the members of a shard; a remote shard is copied first."""
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
                os.unlink(shard.path)  # truncated copy: copy it again next time
        raise
    store(index_file(shard), {"format": _FORMAT, "url": shard.url, **vars(members)})
    return members


def _sound(content: Any) -> Members | None:
    """Return the members from a cached file; None if it is damaged."""
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
    """Return the images of a tar file, from its headers.

    Raises:
        DataError: It cannot be read, is truncated or not a plain tar; a sample has several
            pictures.
    """
    try:
        with open(shard.path, "rb") as file:
            parts = _read_parts(file)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(
            f"{shard.url} is truncated or not an uncompressed tar file ({error}): replace it"
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
    """Members of a shard by sample key."""

    pictures: dict[str, list[tuple[str, int, int]]]  # name, offset and size in bytes
    others: dict[str, list[str]]  # names of further images
    labels: dict[str, int | str]


def _read_parts(file: BinaryIO) -> _Parts:
    parts = _Parts({}, {}, {})
    with tarfile.open(fileobj=file, mode="r:") as tar:
        # next() instead of iteration, which would search the list of members that tarfile keeps
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
            raise tarfile.ReadError("its end-of-archive mark is missing")
    return parts


def _check_one_picture(shard: Shard, parts: _Parts) -> None:
    """Raise if a sample has several pictures, or no picture but several other images."""
    several = [[place[0] for place in places] for places in parts.pictures.values()]
    several += [names for key, names in parts.others.items() if key not in parts.pictures]
    first = next((names for names in several if len(names) > 1), None)
    if first is not None:
        raise DataError(
            f"in {shard.url}, {first[0]} and {first[1]} are images of one sample, whose name ends "
            "at the first dot: pack them again under names that differ before it, such as "
            "img_0001.jpg for img.0001.jpg"
        )


def _label(content: bytes) -> int | str | None:
    """Return a label as a number or a name; None if it is empty."""
    text = content.decode("utf-8", "replace").strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in name.split("/"))


def _split(name: str) -> tuple[str, str]:
    """Return a member's key and suffix: its path, split at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return folder + slash + key, (dot + suffix).lower()
