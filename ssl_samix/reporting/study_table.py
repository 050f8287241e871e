"""The table of a study, and its statistics over seeds. Imports no torch."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from filelock import FileLock
from scipy.special import stdtrit

from ssl_samix.artifacts.results import read_rows
from ssl_samix.errors import UserError
from ssl_samix.files import write_atomically
from ssl_samix.reporting.study_plan import Run, Study, differing_words

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A mean over runs.

    Attributes:
        mean: Over the runs.
        deviation: Standard deviation of the sample (n - 1); None of one run.
        count: Runs.
    """

    mean: float
    deviation: float | None
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Return the mean of at least one value, and how they scatter."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Difference:
    """A mean difference of runs with the same seeds.

    Attributes:
        mean: Over the seeds that both have.
        half_width: Of its confidence interval; None of one seed.
        count: Seeds.
    """

    mean: float
    half_width: float | None
    count: int


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Difference | None:
    """Compare values by seed: the mean difference and its interval by Student's t.

    Args:
        ours: Values by seed.
        theirs: Likewise; seeds that only one of both has do not count.

    Returns:
        None if no seed is in both.
    """
    gaps = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not gaps:
        return None
    if len(gaps) == 1:
        return Difference(gaps[0], None, 1)
    quantile = float(stdtrit(len(gaps) - 1, (1 + CONFIDENCE) / 2))
    return Difference(fmean(gaps), quantile * stdev(gaps) / math.sqrt(len(gaps)), len(gaps))


Row = dict[str, str]
KEY = ("method", "policy", "length", "seed")
ACCURACIES = {  # column -> what it is called
    "knn_top1": "kNN top-1 %",
    "knn_k200_top1": "kNN top-1 %, k = 200, T = 0.1",
    "linear_top1": "linear top-1 %",
    "top1": "top-1 %",
}
MIXER = {
    "mask_std": "mixer/mask_std",
    "one_sided": "mixer/one_sided",
    "gamma": "mixer/gamma",
    "mask_mean_error": "mixer/mask_mean_error",
}  # column -> that of metrics.csv
COLUMNS = (
    *KEY, "epochs", "steps", "images", "seconds", "cpu_seconds", "peak_mib", "cpu_ms_per_step",
    "step_ratio", *ACCURACIES, "knn_k", "knn_temperature", *MIXER, "processor", "precision",
    "settings",
)  # fmt: skip


def by_seed(rows: Sequence[Row], name: str) -> dict[str, float]:
    """Return the values of a column by seed; those that are missing are left out."""
    return {row["seed"]: float(row[name]) for row in rows if row.get(name)}


def key_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """Return what a row is found by."""
    return tuple(row[name] for name in KEY)


def read_table(study: Study) -> dict[tuple[str, ...], Row]:
    """Read the rows of a study's table.

    Raises:
        UserError: If it is damaged, or a row is of a run that the study file describes otherwise.
    """
    rows = read_rows(study.csv)
    if any(row.get(name) is None for row in rows for name in (*KEY, "settings")):
        raise UserError(f"{study.csv} is damaged or no table of a study")
    found = {key_of(row): row for row in rows}
    for run in study.runs():
        row = found.get(run.key)
        if row is not None and row["settings"] != run.settings:
            changed = differing_words(run.settings, row["settings"])
            raise UserError(
                f"{study.csv} has {run.name} with other words ({changed}): rename what was "
                "changed, or give another out and csv"
            )
    return found


def lock_of(study: Study) -> FileLock:
    """Return the lock of the table and of what is made of it.

    Raises:
        UserError: If the table's folder cannot be made.
    """
    try:
        study.csv.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {study.csv.parent}: {error.strerror or error}") from error
    return FileLock(study.csv.with_name(f".{study.csv.name}.lock"))


def add_row(study: Study, row: Row) -> dict[tuple[str, ...], Row]:
    """Add the row of a finished run, or replace it; call it with the lock.

    Returns:
        All rows, by key.

    Raises:
        UserError: If the table cannot be read or written.
    """
    rows = {**read_table(study), key_of(row): row}
    order: dict[tuple[str, ...], int] = {run.key: place for place, run in enumerate(study.runs())}
    ranked = sorted(rows.values(), key=lambda row: order.get(key_of(row), len(order)))
    ranked = with_ratios(ranked, study.reference)
    write_table(study.csv, COLUMNS, ranked)
    return {key_of(row): row for row in ranked}


def write_table(path: Path, first: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows with the columns of all of them, these first.

    Raises:
        UserError: If it cannot be written.
    """
    columns = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def with_ratios(rows: Sequence[Row], reference: str) -> list[Row]:
    """Write each row's time per step in units of the reference's, where times compare."""
    plain: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["policy"] == reference and row.get("cpu_ms_per_step"):
            plain.setdefault(clock_of(row), []).append(float(row["cpu_ms_per_step"]))
    filled = []
    for row in rows:
        unit = plain.get(clock_of(row))
        known = unit and row.get("cpu_ms_per_step")
        ratio = f"{float(row['cpu_ms_per_step']) / fmean(unit):.3f}" if unit and known else ""
        filled.append({**row, "step_ratio": ratio})
    return filled


def clock_of(row: Row) -> tuple[str, ...]:
    """Return what rows have in common whose times compare."""
    return tuple(row.get(name, "") for name in ("method", "processor", "precision"))


def done_of(rows: Mapping[tuple[str, ...], Row], runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have a row."""
    return [run for run in runs if run.key in rows]
