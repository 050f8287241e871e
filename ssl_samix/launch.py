"""Which process this is, when there are several."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def rank_from_environment() -> int:
    """Return the rank that torchrun, SLURM or Lightning gave this process; 0 if it is alone."""
    for name in _RANKS:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def is_main_process() -> bool:
    """Say whether this process writes the files that all share."""
    return rank_from_environment() == 0


def launched_outside() -> bool:
    """Say whether torchrun or SLURM started several processes of the same command."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1


@contextmanager
def relaunched_as(*arguments: str) -> Iterator[None]:
    """Let Lightning start further processes with these arguments of the ``samix`` command.

    A script that calls the package from Python is started again as it is.
    """
    before = sys.argv
    if os.environ.get("SSL_SAMIX_COMMAND") == str(os.getpid()):
        sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
