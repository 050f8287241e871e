"""``samix runs``: run folders with their state, epochs and accuracy. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_samix.artifacts.run_folder import RunFolder, command_of, read_metrics
from ssl_samix.config.compose import dotted
from ssl_samix.config.saved import read_plain
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.files import expanded
from ssl_samix.reporting.tables import MISSING, Table, text

HELP = """samix runs: run folders with their state, epochs and last accuracy.

Usage: samix runs [folder]...

Lists all run folders in the given folders (default: runs), at any depth. A run is finished,
unfinished (it is running, or was stopped) or broken (its files cannot be read). The last kNN
accuracy, of supervised runs the last validation accuracy, has a star where it is the highest of
all runs on the same images. samix compare has the results of samix knn, linear, semi and measures.
"""
KEYS = ("data", "method", "mixup")
# Column of metrics.csv -> title.
ACCURACIES = {"knn/top1": "kNN top-1 %", "val/top1": "top-1 %"}


@dataclass(frozen=True)
class Listed:
    """What is listed of a run.

    Attributes:
        folder: Its folder.
        state: finished, unfinished, broken or not started.
        done: Epochs done.
        epochs: Epochs of the whole run; None if unknown.
        values: Choices and dotted keys of its configuration, as the file says them.
        accuracies: Column of metrics.csv -> last value, in %.
        reason: Why it is broken.
    """

    folder: Path
    state: str
    done: int = 0
    epochs: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    accuracies: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def images(self) -> str:
        """A text that is equal for runs on the same images."""
        return json.dumps([self.values.get(k) for k in ("data", "data.root", "data.limit")])

    def shown(self, key: str) -> str:
        """Return the choice or value of a key as text."""
        value = self.values.get(key)
        if value is None:
            return MISSING
        return value if isinstance(value, str) else json.dumps(value)


def read_run(folder: Path) -> Listed:
    """Return what is listed of a run. Only plain values are read; none are checked."""
    run = RunFolder(folder)
    if not run.config.is_file():
        return Listed(folder, "not started")
    try:
        said = read_plain(run.config)
        choices, epochs = said["choices"], said["trainer"]["max_epochs"]
        values = {**dotted(said), **{"method": command_of(choices)}, **choices}
        rows = read_metrics(run.metrics)
        wanted = int(epochs)
    except CheckpointError as error:
        return Listed(folder, "broken", reason=str(error))
    except (KeyError, TypeError, ValueError):
        return Listed(folder, "broken", reason=f"{run.config} is not the configuration of a run")
    except OSError as error:
        return Listed(folder, "broken", reason=f"{error.filename}: {error.strerror}")
    done = int(rows[-1]["epoch"]) + 1 if rows else 0
    finished = done >= wanted and run.encoder.exists()
    last = {name: float(row[name]) for row in rows for name in ACCURACIES if row.get(name)}
    state = "finished" if finished else "unfinished"
    return Listed(folder, state, done, wanted, values, last)


def run_folders(folder: Path) -> list[Path]:
    """Return a folder, if it is a run folder, else the run folders in it at any depth, sorted."""
    found = []
    for path, inner, names in os.walk(folder):
        if "config.yaml" in names and {"metrics.csv", "last.ckpt", "environment.json"} & {*names}:
            found.append(Path(path))
            inner.clear()
        inner[:] = [name for name in inner if not name.startswith(".")]
    return sorted(found)


def listed(folders: Sequence[Path], keys: Sequence[str] = KEYS) -> str:
    """Return the table of runs as text.

    Args:
        folders: The run folders.
        keys: Groups and dotted keys, one column each.
    """
    runs = [read_run(folder) for folder in folders]
    columns = [c for c in ACCURACIES if any(c in run.accuracies for run in runs)]
    rows = [
        [
            str(run.folder),
            *map(run.shown, keys),
            run.state,
            MISSING if run.epochs is None else f"{run.done}/{run.epochs}",
            *(_accuracy(run, column, runs) for column in columns),
        ]
        for run in runs
    ]
    header = ["run", *keys, "state", "epochs"]
    notes = ["*: the highest of runs on the same images"] if "* " in str(rows) else []
    notes += [run.reason for run in runs if run.reason]
    titles = [[title] for title in (*header, *(ACCURACIES[c] for c in columns))]
    return text(Table(titles, rows, len(header), notes))


def _accuracy(run: Listed, column: str, runs: Sequence[Listed]) -> str:
    if column not in run.accuracies:
        return MISSING
    rivals = [r for r in runs if r.images == run.images and column in r.accuracies]
    best = len(rivals) > 1 and run.accuracies[column] == max(r.accuracies[column] for r in rivals)
    return f"{'* ' * best}{run.accuracies[column]:.2f}"


def main(words: list[str]) -> str:
    """Return the text to print: the table of the run folders in the given folders.

    Raises:
        ConfigError: For a key or an option, of which there are none.
        CheckpointError: If a folder does not exist, or there are no run folders.
    """
    if {"-h", "--help"} & set(words):
        return HELP.rstrip()
    if options := [word for word in words if word.startswith("-")]:
        raise ConfigError(f"runs takes folders only, not {options[0]}")
    folders = [expanded(word) for word in words or ["runs"]]
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder: give folders of runs")
    found = dict.fromkeys(run for folder in folders for run in run_folders(folder))
    if not found:
        raise CheckpointError(f"no run folder is in {', '.join(map(str, folders))}")
    return listed(list(found))
