"""Runs of several processes: how Lightning starts the others, and how they find the run folder."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssl_samix.processes import is_main_process

# Lightning sets these for the processes that it starts, and does not remove most of them: a second
# fit in the same process would take itself for one of those.
_LEFT_BEHIND = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FOLDER = "SSL_SAMIX_RUN"  # passes the run folder to the other processes
COMMAND = "SSL_SAMIX_COMMAND"  # process id, set by the command line


def given_folder() -> str | None:
    """Return the run folder that the first process chose; None in the first process."""
    return None if is_main_process() else os.environ.get(_FOLDER)


def imported_by_a_worker() -> bool:
    """Return whether this process is a data worker that is importing the user's script.

    Where workers are spawned (macOS, Windows), a script without ``if __name__ == "__main__":``
    starts again in each of them.
    """
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))


@contextmanager
def relaunched_as(folder: Path, *arguments: str) -> Iterator[None]:
    """Set the arguments of the ``samix`` command with which Lightning starts further processes.

    A script that calls the package from Python is started again unchanged; the folder is passed in
    the environment.
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
