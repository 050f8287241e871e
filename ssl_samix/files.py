"""Atomic writes of files, and new folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

from ssl_samix.errors import UserError

PARTIAL = ".partial"  # suffix of a file that is being written


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` replaced by the home folder, if that user exists.

    ``Path.expanduser`` raises a ``RuntimeError`` for the home of a user that does not exist.
    """
    return Path(os.path.expanduser(path))


def make_folder(folder: Path, what: str = "folder") -> None:
    """Make a folder, called ``what`` in the error, unless it is there.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot make the {what} {folder}: {reason}") from error


def new_folder(wanted: Path) -> Path:
    """Make a new folder and return its path: the wanted one, or one with ``-2``, ``-3`` ... added.

    Raises:
        UserError: If no folder can be made there.
    """
    copies = (wanted.with_name(f"{wanted.name}-{i}") for i in count(2))
    for folder in chain([wanted], copies):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"cannot make the folder {folder}: {error.strerror or error}"
            ) from error
    return folder


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Replace ``path`` atomically: write a file beside it, flush it to disk, and rename it.

    Args:
        path: The file to replace.
        write: Called with a path, to which it writes the content.

    Raises:
        UserError: If there is no space or no permission; ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # the folder may not exist
            temporary.unlink()
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was there is unchanged"
        ) from error
