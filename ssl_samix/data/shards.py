"""Tar shards: resolve patterns and URLs, and copy remote shards; imports no torch.

A shard on a local disk is read in place. One behind a URL is copied once, as a whole, into the
user's cache folder: pictures are read in random order and again every epoch, so that no worker
waits for a network. fsspec's own file cache does not keep two processes from writing the same
file, or one from truncating what the other reads; here a file is renamed into place under a lock.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ssl_samix.data.cache import VARIABLE, cache_folder, digest
from ssl_samix.errors import DataError, UserError, nearest
from ssl_samix.files import write_atomically

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
    with _told(root):
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
def _told(root: str) -> Iterator[None]:
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
