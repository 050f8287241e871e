"""Tar shards: resolve patterns and URLs, copy remote shards, and index their members.

Imports no torch.

A shard on a local disk is read in place. One behind a URL is copied once, as a whole, into the
user's cache folder: pictures are read in random order and again every epoch, so that no worker
waits for a network. fsspec's own file cache does not keep two processes from writing the same
file, or one from truncating what the other reads; here a file is renamed into place under a lock.

Layout: WebDataset's. ``key.jpg`` (any suffix of an image) is a picture, ``key.cls`` beside it in
the same shard the number or the name of its class. The key ends at the first dot of the file's
name, and all that follows is the suffix, upper or lower case: ``key.seg.png`` is not one. All
other members, hidden files and links are skipped.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from ssl_samix.data.folder import wanted_labels
from ssl_samix.data.layout import IMAGE_SUFFIXES
from ssl_samix.errors import DataError, UserError, nearest
from ssl_samix.files import expanded, write_atomically

SUFFIX = ".tar"
CONNECTIONS = 8  # shards that are read or copied in parallel
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_CACHES = re.compile(r"((filecache|simplecache|blockcache|cached)::)+")  # copies are cached already
# fields of fsspec's file systems that change when a file changes
_VERSION = (
    "size", "mtime", "created", "ETag", "etag", "md5Hash", "Content-MD5", "LastModified",
    "Last-Modified", "last_modified", "updated",
)  # fmt: skip
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp",
    "https": "aiohttp", "abfs": "adlfs", "az": "adlfs", "hf": "huggingface_hub", "oci": "ocifs",
    "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "webdav": "webdav4",
}  # fmt: skip
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
_log = logging.getLogger(__name__)
_FORMAT = 2  # of the cache file's format
_LABEL = ".cls"
_BAR_FROM = 10  # shards


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    url: str  # its name in messages; a path if it is local
    version: str  # changes when its content changes
    path: str  # file that is read: itself, or its copy in the cache folder

    @property
    def is_copy(self) -> bool:
        """Whether ``path`` is a copy in the cache folder."""
        return self.path != self.url


@dataclass(frozen=True)
class Found:
    """A shard and its fsspec source."""

    shard: Shard
    fs: Any  # of fsspec
    source: str  # its path there


def is_url(root: str) -> bool:
    """Return whether ``data.root`` is a URL for fsspec, not a local path."""
    return "://" in root or "::" in root


def find(root: str) -> list[Found]:
    """Return the shards that match ``root``, sorted by name; none is opened.

    Args:
        root: A folder of ``*.tar``, a file, or a pattern with braces (``{000..099}``, ``{a,b}``)
            and wildcards; a local path, or any URL that fsspec knows.

    Raises:
        DataError: No shard; one that does not exist; a URL that cannot be reached, or whose
            protocol needs a package that is not installed.
    """
    root = _CACHES.sub("", root, count=1) if is_url(root) else os.path.expanduser(root)
    with _fsspec_errors(root):
        found = list(_places(root))
        with ThreadPoolExecutor(CONNECTIONS) as pool:  # one request each if remote
            shards = list(pool.map(lambda place: _described(*place), found))
    if not shards:
        raise DataError(
            f"no shard matches data.root={root}: give a folder of {SUFFIX} files, a pattern such as"
            " 'shards/train-{000000..000099}.tar' (in quotes), or a URL of either"
        )
    return sorted({found.shard.url: found for found in shards}.values(), key=lambda f: f.shard.url)


def fetch(found: Found) -> None:
    """Copy a remote shard into the cache folder if needed; nothing to do for a local one.

    Raises:
        UserError: It cannot be copied, or there is no space for it.
    """
    from filelock import FileLock

    path = Path(found.shard.path)
    if not found.shard.is_copy or path.exists():
        return

    def get(temporary: Path) -> None:
        try:
            found.fs.get_file(found.source, str(temporary))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            raise DataError(f"cannot fetch {found.shard.url}: {_line(error)}") from error

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                write_atomically(path, get)
    except DataError:
        raise
    except (UserError, OSError, NotImplementedError) as error:
        raise UserError(
            f"cannot copy shards to {path.parent} ({_line(error)}): "
            f"set {VARIABLE} to a folder with enough space"
        ) from error


def index_file(shard: Shard) -> Path:
    """Return the cache file of a shard's index."""
    return _cached(shard.url, shard.version, ".json")


def expand_braces(pattern: str) -> list[str]:
    """Return all expansions of ``{a,b}`` and ``{000..099}``; numbers as wide as the first one."""
    parts = _BRACES.split(pattern)  # text and brace contents, alternating
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = numbers.groups()
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]


def _places(root: str) -> Iterator[tuple[Any, str, str]]:
    """Yield file system, path and the rest of a chained URL for every candidate shard."""
    from fsspec.core import url_to_fs

    literal = not is_url(root) and os.path.exists(root)  # a path may hold braces and brackets
    for piece in [root] if literal else expand_braces(root):
        rest = piece.partition("::")[2]
        fs, path = url_to_fs(piece)
        if not literal and any(c in path for c in ("*[" if "http" in fs.protocol else "*[?")):
            paths = fs.glob(path)
        elif not urlsplit(path).path.endswith(SUFFIX) and fs.isdir(path):
            paths = [p for p in fs.ls(path, detail=False) if p.endswith(SUFFIX)]
        else:
            paths = [path]
        yield from ((fs, str(p), rest) for p in paths)


def _described(fs: Any, path: str, rest: str) -> Found:
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(fs, LocalFileSystem):
        status = os.stat(path)
        version = f"{status.st_size} {status.st_mtime_ns}"
        return Found(Shard(os.path.abspath(path), version, os.path.abspath(path)), fs, path)
    info = fs.info(path)
    version = json.dumps({key: str(info[key]) for key in _VERSION if info.get(key) is not None})
    url = fs.unstrip_protocol(path) + (f"::{rest}" if rest else "")
    return Found(Shard(url, version, str(_cached(url, version, SUFFIX))), fs, path)


def _cached(url: str, version: str, suffix: str) -> Path:
    return cache_folder() / "shards" / f"{digest(url, version)}{suffix}"


@contextmanager
def _fsspec_errors(root: str) -> Iterator[None]:
    """Convert exceptions of any fsspec file system into ``DataError``."""
    protocol = re.match(r"(\w+)(?:://|::)", root)
    name = protocol[1] if protocol else "file"
    try:
        yield
    except ImportError as error:
        package = _PACKAGES.get(name)
        way = f"pip install {package}" if package else _line(error)
        raise DataError(f"data.root={root} needs a package for {name}://: {way}") from error
    except Exception as error:
        from fsspec import available_protocols

        if name not in available_protocols():
            raise DataError(nearest(name, available_protocols(), "protocol")) from error
        reason: BaseException = error
        if isinstance(error, FileNotFoundError):
            if error.__cause__ is None:
                missing = error.filename or _line(error)
                raise DataError(f"data.root={root}: {missing} does not exist") from error
            reason = error.__cause__  # over HTTP every failure is a FileNotFoundError
        raise DataError(f"data.root={root} cannot be read: {_line(reason)}") from error


def _line(error: BaseException) -> str:
    """Return an error's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


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


VARIABLE = "SSL_SAMIX_CACHE"


def cache_folder() -> Path:
    """Return ``$SSL_SAMIX_CACHE``, else ``$XDG_CACHE_HOME/ssl_samix``, else ``~/.cache/ssl_samix``.

    It need not exist.
    """
    if own := os.environ.get(VARIABLE):
        return expanded(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(base).absolute() / "ssl_samix"


def digest(*parts: str) -> str:
    """Return a hash of 32 hexadecimal digits of a key."""
    text = json.dumps(parts)  # ASCII, also for file names that are not UTF-8
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(path: Path) -> Any:
    """Return the content that ``store`` wrote; None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def store(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically.

    Errors are ignored: a run works without the cache, and another process that is writing the file
    writes the same content.
    """
    from filelock import FileLock

    data = json.dumps(content, separators=(",", ":")).encode()
    # filelock: OSError also for a lock that is held, NotImplementedError on some network disks
    with suppress(OSError, UserError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=0):
            write_atomically(path, lambda temporary: temporary.write_bytes(data))
