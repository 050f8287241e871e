"""One table of the results of several runs: ``samix compare``. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_samix.comparison import Evaluated, compared, read_evaluated
from ssl_samix.errors import CheckpointError, ConfigError, check_choice, nearest
from ssl_samix.files import expanded, write_atomically
from ssl_samix.run_folder import RunFolder
from ssl_samix.text_tables import FORMATS

VARIANTS = ("headline", "all")
KEYS = {"format": (*FORMATS,), "out": (), "variants": VARIANTS}
HELP = """samix compare: the results of several runs as one table.

Usage: samix compare <run>... [key=value]...

A run is a folder with a results.csv, which samix knn, linear, semi and measures write; a folder of
such folders stands for all of them. Runs that differ in their seeds alone are one line: the mean
over the runs, the standard deviation of the sample (n - 1), and how many they are. The other lines
are named by the keys in which they differ. Untrained networks (weights=random) are lines of their
own. Of a run that was measured several times the newest numbers count; those of several seeds of an
evaluation are averaged before runs are counted.

Keys, with the values they have now:

format: text        # text | markdown | latex (a tabular, needs booktabs)
out: null           # file; null: the screen
variants: headline  # headline: of each evaluation only its first row of each number | all
"""


@dataclass(frozen=True)
class Request:
    """What is to be compared, and how it is written."""

    paths: list[Path]
    format: str
    out: Path | None
    variants: str


def main(words: list[str]) -> str:
    """Compare runs and return what is to be printed: the table, or the file it is in.

    Args:
        words: Folders, and ``key=value`` words.

    Raises:
        UserError: For the first mistake: a folder that is not there or holds no results, an unknown
            key or value, damaged results, or a file that cannot be written.
    """
    if {"-h", "--help"} & set(words):
        return HELP.rstrip()
    request = configured(words)
    runs, without = find_results(request.paths)
    table = compared(runs, request.variants == "all", without)
    text = FORMATS[request.format](table)
    if request.out is None:
        return text
    write_atomically(request.out, lambda temporary: temporary.write_text(text + "\n", "utf-8"))
    return str(request.out)


def configured(words: list[str]) -> Request:
    """Tell folders from ``key=value`` words; a folder's name may hold a ``=`` too.

    Raises:
        ConfigError: For an unknown key or value, or when no folder is given.
    """
    given: dict[str, str] = {}
    paths = []
    for word in words:
        key, equals, value = word.partition("=")
        path = expanded(word)
        if equals and key in KEYS:
            given[key] = value
        elif word.startswith("-") or (equals and key.isidentifier() and not path.exists()):
            raise ConfigError(nearest(key, KEYS, "key"))
        else:
            paths.append(path)
    for key, known in KEYS.items():
        if key in given and known:
            check_choice(key, given[key], known)
    if not paths:
        raise ConfigError("compare needs runs: samix compare <run folder>...")
    out = given.get("out", "null")
    return Request(
        paths,
        given.get("format", "text"),
        None if out in ("", "null") else expanded(out),
        given.get("variants", "headline"),
    )


def find_results(paths: Sequence[Path]) -> tuple[list[Evaluated], list[Path]]:
    """Find the folders that hold results: those given, and those in a given folder of runs.

    Files are passed over: a shell that is asked for ``runs/*`` gives them too.

    Returns:
        The results, each folder's once; and the runs in folders of runs that have none yet.

    Raises:
        UserError: If a path does not exist, or a folder holds no results.
    """
    found: dict[Path, Path] = {}
    without: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give run folders, or a folder of them")
        if path.is_dir():
            inside = [path] if _has_results(path) else _runs_in(path)
            for run in inside:
                (found if _has_results(run) else without).setdefault(run.resolve(), run)
    if not found:
        raise CheckpointError(f"{paths[0]} is no folder: give run folders, or a folder of them")
    return [read_evaluated(run) for run in found.values()], list(without.values())


def _has_results(folder: Path) -> bool:
    return (folder / "results.csv").is_file()


def _runs_in(folder: Path) -> list[Path]:
    """Return the runs directly in a folder of runs, at least one of them with results."""
    inside = sorted(child for child in folder.iterdir() if child.is_dir())
    is_run = RunFolder(folder).config.exists()
    if is_run or not any(map(_has_results, inside)):
        raise CheckpointError(
            f"{folder} holds no results.csv: measure it first, as samix knn run={folder}"
        )
    return [run for run in inside if _has_results(run) or RunFolder(run).config.exists()]
