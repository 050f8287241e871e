"""metrics.csv: one row per epoch, whole at any time, continued by a resume."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ssl_samix.files import write_atomically

FIRST = ["epoch", "step", "loss", "knn/top1", "rankme", "lr", "seconds", "images_per_second"]


class MetricsCSV(Logger):
    """Lightning's logger interface; its own CSV logger deletes the file when a run is resumed.

    Args:
        path: The file. Rows of epochs that a resumed run repeats are replaced; cells of what an
            epoch did not measure stay empty.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """A run folder has one version."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append the epoch's row, or complete it."""
        epoch = int(metrics["epoch"])
        if self.rows is None:
            self.rows = [row for row in read_metrics(self.path) if int(row["epoch"]) < epoch]
        if not self.rows or int(self.rows[-1]["epoch"]) != epoch:
            self.rows.append({"epoch": epoch, "step": (step or 0) + 1})
        values = {name: f"{value:.10g}" for name, value in metrics.items() if name != "epoch"}
        self.rows[-1].update(values)
        write_rows(self.path, self.rows)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.csv; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the columns of all of them."""
    columns = list(dict.fromkeys([*FIRST, *(name for row in rows for name in row)]))
    lines = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    text = "".join(",".join(line) + "\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_text(text))
