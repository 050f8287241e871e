"""Which process this is, when there are several."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
# Lightning sets these for its further processes and leaves most behind: a second fit of the same
# process would take itself for one of them.
_LEFT_BEHIND = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FOLDER = "SSL_SAMIX_RUN"  # tells further processes the folder that the first one chose
COMMAND = "SSL_SAMIX_COMMAND"  # set by the command line to its process id


def is_main_process() -> bool:
    """Say whether this process writes the files that all share."""
    for name in _RANKS:
        if os.environ.get(name, "").isdigit():
            return os.environ[name] == "0"
    return True


def given_folder() -> str | None:
    """Return the folder that the first of several processes chose; None in the first."""
    return None if is_main_process() else os.environ.get(_FOLDER)


def imported_by_a_worker() -> bool:
    """Say whether this process is a worker that is importing the script that started it.

    Where workers are spawned (macOS, Windows), a script without ``if __name__ == "__main__":``
    begins once more in each of them.
    """
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))


def launched_outside() -> bool:
    """Say whether torchrun or SLURM started several processes of the same command."""
    number = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", ""))
    return number.isdigit() and int(number) > 1


@contextmanager
def relaunched_as(folder: Path, *arguments: str) -> Iterator[None]:
    """Let Lightning start its further processes with these arguments of the ``samix`` command.

    A script that calls the package from Python is started again as it is, and told the folder.
    """
    words, before = sys.argv, {k: os.environ.get(k) for k in (*_LEFT_BEHIND, _FOLDER)}
    os.environ[_FOLDER] = str(folder)
    if os.environ.get(COMMAND) == str(os.getpid()):
        sys.argv = [words[0], *arguments]
    try:
        yield
    finally:
        sys.argv = words
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
