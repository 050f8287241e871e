"""Errors that a user can fix, each with a message in one sentence; imports nothing heavy."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix; the command line prints it and exits with status 2."""

    def _render_traceback_(self) -> list[str]:
        """Return what Jupyter shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class DataError(UserError):
    """A data set that is missing, empty, damaged, or does not fit the settings."""


class ConfigError(UserError):
    """A key, a name or a value that the configuration does not have."""


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be read, or belongs to something else."""


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by Ctrl-C or SIGTERM and can be resumed."""


def check_range(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ``ConfigError`` unless ``value`` is a finite number in [low, high].

    Args:
        name: The key, as the user writes it.
        value: The value given.
        low: Smallest value; a tiny positive one stands for "more than 0".
        high: Largest value.

    Raises:
        ConfigError: With the key, the allowed range and the value given.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Not math.isfinite: an int may be too large for the float that it converts to.
    if not (number and low <= value <= high and abs(value) < math.inf):  # type: ignore[arg-type, operator]
        least, most = (f"{bound:g}" if abs(bound) < 1e5 else str(bound) for bound in (low, high))
        allowed = f"at least {least}" if high == math.inf else f"in [{least}, {most}]"
        raise ConfigError(f"{name} must be a number {allowed}, got {value!r}")


def check_memory(what: str, numbers: int) -> None:
    """Raise ``ConfigError`` if something would take more than half of the machine's memory.

    Args:
        what: Its name, with the key and the value.
        numbers: How many float32 values it holds.

    Raises:
        ConfigError: With both amounts. No check where the system does not report its memory.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        return
    if 8 * numbers > memory:
        raise ConfigError(
            f"{what} takes {4 * numbers / 2**30:,.1f} GiB, more than half of this machine's "
            f"{memory / 2**30:,.1f} GiB: choose a smaller value"
        )


TYPO, SIMILAR = 0.8, 0.5  # ratios of difflib from which a name is meant, or may be meant
MOST_LISTED = 20  # names in an error


def nearest(name: str, known: Iterable[str], kind: str) -> str:
    """Return the error message for an unknown ``name``, with the names that may be meant.

    These are the nearest name or, of many names none of which is very near, the nearest three; or
    all names, if they are few and none is similar.

    Args:
        name: The name given.
        known: The valid names.
        kind: What kind of name it is, such as ``"method"``.
    """
    names, wrong = sorted(known), f"unknown {kind} '{name}'"
    alike = {other: _ratio(name, other) for other in names}
    best = max(alike.values(), default=0.0)
    if best >= (SIMILAR if len(names) <= MOST_LISTED else TYPO):
        return f"{wrong}: did you mean '{max(names, key=lambda n: (alike[n], n))}'?"
    if len(names) <= MOST_LISTED:
        return f"{wrong}: choose from {', '.join(names)}"
    # The group of a key is often left out: lr is optimizer.lr.
    last = name.rpartition(".")[2]
    score = {n: max(alike[n], _ratio(last, n.rpartition(".")[2]) * 0.9) for n in names}
    first, second, third = (f"'{n}'" for n in sorted(names, key=lambda n: -score[n])[:3])
    return f"{wrong}: did you mean {first}, {second} or {third}?"


def _ratio(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, name).ratio()


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of the ``known`` names.

    Raises:
        ConfigError: With the nearest known name.
    """
    if value not in (names := list(known)):
        raise ConfigError(nearest(str(value), names, name))
