"""Train and measure encoders with mixing objectives that are not part of the package."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import progress

from ssl_samix.cli.commands import SUBCOMMANDS
from ssl_samix.files import write_atomically
from ssl_samix.mixup.objective import MixObjective
from ssl_samix.models.backbone import Backbone
from ssl_samix.training import run as fitting
from ssl_samix.training.pretrain import Pretraining, configured

NUMBERS = ("knn_top1", "linear_top1", "cpu_seconds")
Make = Callable[[Backbone], MixObjective | None]


class Table:
    """Rows of runs in a CSV file; a run with a row is not repeated.

    Args:
        path: The file.
        keys: Number of columns that identify a run, together with its arguments.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.path, self.columns = path, (*keys, *NUMBERS, "words")
        self.keys = len(keys)
        self.rows = list(csv.reader(path.open()))[1:] if path.exists() else []

    def train(self, key: Sequence[str], make: Make, words: Sequence[str], out: Path) -> None:
        """Pretrain with the objective of ``make``, measure, and write a row, unless it exists."""
        shown = " ".join(word for word in words if not word.startswith("data.root="))
        if any(row[: self.keys] == list(key) and row[-1] == shown for row in self.rows):
            return
        progress(f"{' '.join(key)} ...")
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the table
            seconds = pretrained([*words, f"seed={key[-1]}", f"out={out}"], make)
            tops = [top1(out, protocol) for protocol in ("knn", "linear")]
        self.rows.append([*key, *tops, f"{seconds:.0f}", shown])
        text = "\n".join(",".join(row) for row in [self.columns, *self.rows]) + "\n"
        write_atomically(self.path, lambda temporary: temporary.write_text(text))

    def shown(self) -> Iterable[list[str]]:
        """Return the rows, without the arguments."""
        return [row[:-1] for row in self.rows]


def pretrained(words: list[str], make: Make) -> float:
    """Run `samix pretrain` with another mixing objective; return its CPU seconds."""

    def mixing(_config: Any, backbone: Backbone, _data: Any) -> MixObjective | None:
        return make(backbone)

    with (
        patch.object(fitting, "build_mixing", mixing),
        patch.object(fitting, "save_mixer", lambda *_: None),
    ):
        config, choices, folder = configured("pretrain", [*words, "mixup=mixup"])
        run = fitting.train(Pretraining(), config, choices, folder)
    return float(run.metrics["cpu_seconds"] * config.trainer.max_epochs)


def top1(run: Path, protocol: str, words: Sequence[str] = ()) -> str:
    """Return the top-1 of a run's encoder by a protocol, with further arguments of it."""
    result = run / "results" / f"benchmark-{protocol}"
    command: Any = SUBCOMMANDS[protocol]
    command.job([f"run={run}", f"out={result}", *words])
    results = json.loads((result / "results.json").read_text("utf-8"))["results"]
    return f"{results[0]['numbers']['top1']:.2f}"
