"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ssl_samix.errors import UserError

PARTIAL = ".partial"  # how a file's name ends while it is written


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path``, flush it to the disk, and move it in place.

    Args:
        path: The file that is replaced.
        write: Writes the content to the path that it is given.

    Raises:
        UserError: If there is no space or no permission; ``path`` is as it was before.
    """
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # there may be no such folder
            temporary.unlink()
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was there is unchanged"
        ) from error
