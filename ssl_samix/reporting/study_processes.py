"""Processes that a study starts, and locks that they hold with it. Imports no torch.

A run's lock is an open file that the process at work on it inherits: it stays taken until the last
of both has ended, so that a run whose study was killed is not begun a second time beside it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SAID = 300  # characters of a log that are quoted, at most
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
MIB = 2**20 if sys.platform == "darwin" else 2**10  # in units of ru_maxrss


@dataclass(frozen=True)
class Usage:
    """What an ended process has used.

    Attributes:
        status: Its exit status, negative for a signal.
        seconds: From start to end.
        cpu_seconds: Of it and the processes that it waited for, user and system.
        peak_mib: Most memory that it held.
    """

    status: int
    seconds: float
    cpu_seconds: float
    peak_mib: float


class Child(Protocol):
    """A process at work."""

    def poll(self) -> Usage | None:
        """Return what it has used if it has ended."""

    def stop(self) -> None:
        """Ask it to end, with what it has done on the disk."""

    def kill(self) -> None:
        """End it."""


class RunLock:
    """The right to work on a run; it ends with the process, however that ends.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = -1

    def take(self) -> bool:
        """Take it, or say that somebody else has it."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    def give_back(self) -> None:
        """Let others have it."""
        os.close(self.descriptor)
        self.descriptor = -1


class Process:
    """A child as the operating system knows it.

    Args:
        arguments: Of Python.
        log: File to which all that it says is appended.
        lock: Held by it too.
    """

    def __init__(self, arguments: Sequence[str], log: Path, lock: RunLock) -> None:
        self._begin = time.monotonic()
        package = Path(__file__).resolve().parents[2]  # found from any folder, installed or not
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        with log.open("ab") as file:
            self._popen = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                pass_fds=[lock.descriptor],
                start_new_session=True,  # Ctrl-C is for the study, which stops its children
                # A study has one thread, so that nothing can hold a lock over the fork.
                preexec_fn=_end_with_parent  # noqa: PLW1509
                if sys.platform == "linux"
                else None,
            )

    def poll(self) -> Usage | None:
        """Return what it has used if it has ended; asked once after that."""
        pid, status, usage = os.wait4(self._popen.pid, os.WNOHANG)
        if not pid:
            return None
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        return Usage(
            self._popen.returncode,
            time.monotonic() - self._begin,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss / MIB,
        )

    def stop(self) -> None:
        """Ask it to end, with what it has done on the disk."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._send(signal.SIGKILL)

    def _send(self, what: signal.Signals) -> None:
        # Popen's own way would take away what ``poll`` waits for; until then the number is its.
        if self._popen.returncode is None:
            os.kill(self._popen.pid, what)


def _end_with_parent() -> None:
    """Have Linux ask this process to end when its parent is killed."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)


def last_words(log: Path, heard: int = 0) -> str:
    """Return the sentence of a log that says what went wrong: the command's own, or the last.

    Args:
        log: The file; it may not exist.
        heard: Bytes at its beginning that do not count.
    """
    text = log.read_bytes()[heard:] if log.exists() else b""
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("samix: ") for line in lines if line.startswith("samix: ")]
    return ((own or lines)[-1:] or ["it said nothing"])[0][:SAID]


def processor(told: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor, as far as the system tells; times of different ones do not compare.

    Args:
        told: Where Linux tells. Virtual machines often hide all but the maker and the numbers of
            family and model, which are therefore part of the name.
    """
    found: dict[str, str] = {}
    try:
        for line in told.read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux
    if "model name" not in found:
        return platform.processor() or platform.machine()
    if {"cpu family", "model"} <= found.keys():
        return f"{found['model name']} ({found['cpu family']}.{found['model']})"
    return found["model name"]
