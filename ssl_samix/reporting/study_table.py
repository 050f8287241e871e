"""The table of a study, statistics over seeds, and the report. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from filelock import FileLock

from ssl_samix.artifacts.results import read_rows, write_rows
from ssl_samix.errors import UserError
from ssl_samix.files import write_atomically
from ssl_samix.reporting.study_plan import RunKey, Study, differing_words
from ssl_samix.reporting.tables import MISSING, Table, markdown

CONFIDENCE = 0.95
Row = dict[str, str]
KEY = ("method", "policy", "length", "seed")
ACCURACIES = {  # column -> its title
    "knn_top1": "kNN top-1 %",
    "knn_k200_top1": "kNN top-1 %, k = 200, T = 0.1",
    "linear_top1": "linear top-1 %",
    "top1": "top-1 %",
}
MIXER = {  # column -> column of metrics.csv
    "mask_std": "mixer/mask_std",
    "one_sided": "mixer/one_sided",
    "gamma": "mixer/gamma",
    "mask_mean_error": "mixer/mask_mean_error",
}
COLUMNS = (
    *KEY, "epochs", "steps", "images", "seconds", "cpu_seconds", "peak_mib", "cpu_ms_per_step",
    "step_ratio", *ACCURACIES, "knn_k", "knn_temperature", *MIXER, "processor", "precision",
    "settings",
)  # fmt: skip
SIZES = {"epochs": 0, "step_ratio": 2, "cpu_seconds": 0, "peak_mib": 0}  # column -> decimals
NOTE = (
    "Mean ± standard deviation over n seeds. Difference to {reference} of the same method, paired "
    "by seed, with its 95% confidence interval (Student's t); {missing} for less than two. "
    "Step: processor time per training step in units of {reference}'s."
)


class Spread(NamedTuple):
    """Mean and standard deviation over runs."""

    mean: float
    deviation: float | None  # sample standard deviation (n - 1); None for one run


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and the sample standard deviation of at least one value."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


class Difference(NamedTuple):
    """Mean paired difference of runs with the same seeds."""

    mean: float
    half_width: float | None  # of the confidence interval; None for one seed
    seeds: int  # number of common seeds


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Difference | None:
    """Return the mean paired difference by seed and its confidence interval (Student's t).

    Args:
        ours: Values by seed.
        theirs: Likewise; seeds that only one of them has are ignored.

    Returns:
        The difference, or None if there is no common seed.
    """
    from scipy.special import stdtrit

    gaps = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if len(gaps) < 2:
        return Difference(gaps[0], None, 1) if gaps else None
    quantile = float(stdtrit(len(gaps) - 1, (1 + CONFIDENCE) / 2))
    return Difference(fmean(gaps), quantile * stdev(gaps) / math.sqrt(len(gaps)), len(gaps))


def by_seed(rows: Sequence[Row], name: str, **of: str) -> dict[str, float]:
    """Return the values of a column by seed, without those that are missing.

    Args:
        rows: Rows of a table.
        name: Name of the column.
        **of: Required values of other columns.
    """
    return {row["seed"]: float(row[name]) for row in rows if row.get(name) and holds(row, **of)}


def holds(row: Row, **of: str) -> bool:
    """Return whether a row has these values in these columns."""
    return all(row[name] == value for name, value in of.items())


def key_of(row: Mapping[str, str]) -> RunKey:
    """Return method, policy, length and seed of a row."""
    return row["method"], row["policy"], row["length"], row["seed"]


def read_table(study: Study) -> dict[RunKey, Row]:
    """Return the rows of a study's table, by key.

    Raises:
        UserError: If it is damaged, or the run of a row has other arguments in the study file.
    """
    rows = read_rows(study.csv)
    if any(row.get(name) is None for row in rows for name in (*KEY, "settings")):
        raise UserError(f"{study.csv} is damaged or not the table of a study")
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
    """Return the lock of the table and of the files derived from it.

    Raises:
        UserError: If the table's folder cannot be created.
    """
    try:
        study.csv.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {study.csv.parent}: {error.strerror or error}") from error
    return FileLock(study.csv.with_name(f".{study.csv.name}.lock"))


def add_row(study: Study, row: Row) -> dict[RunKey, Row]:
    """Add or replace the row of a finished run; the caller must hold the lock.

    Returns:
        All rows by key, in the order of the study.

    Raises:
        UserError: If the table cannot be read or written.
    """
    rows = {**read_table(study), key_of(row): row}
    order = {run.key: place for place, run in enumerate(study.runs())}
    ranked = sorted(rows.values(), key=lambda row: order.get(key_of(row), len(order)))
    ranked = _with_ratios(ranked, study.reference)
    write_rows(study.csv, COLUMNS, ranked)
    return {key_of(row): row for row in ranked}


def _with_ratios(rows: Sequence[Row], reference: str) -> list[Row]:
    """Return rows with the step time relative to the reference, where times are comparable."""
    units: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["policy"] == reference and row.get("cpu_ms_per_step"):
            units.setdefault(clock_of(row), []).append(float(row["cpu_ms_per_step"]))
    filled = []
    for row in rows:
        unit, cost = units.get(clock_of(row)), row.get("cpu_ms_per_step")
        ratio = f"{float(cost) / fmean(unit):.3f}" if unit and cost else ""
        filled.append({**row, "step_ratio": ratio})
    return filled


def clock_of(row: Row) -> tuple[str, ...]:
    """Return method, processor and precision; times are comparable only where they are equal."""
    return tuple(row.get(name, "") for name in ("method", "processor", "precision"))


def write_report(study: Study, rows: Sequence[Row]) -> None:
    """Write the report as Markdown beside the study's table, and figures as PNG.

    Args:
        study: The study.
        rows: Rows of its table; rows of runs that are not in the study file are left out.

    Raises:
        UserError: If a file cannot be written.
    """
    from ssl_samix.reporting.study_pictures import draw_study

    wanted = {run.key for run in study.runs()}
    rows = [row for row in rows if key_of(row) in wanted]
    pictures = [f"![]({path.name})" for path in draw_study(study, rows)]
    text = "\n\n".join([*report(study, rows), *pictures]) + "\n"
    path = study.csv.with_suffix(".md")
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def report(study: Study, rows: Sequence[Row]) -> list[str]:
    """Return the paragraphs of the report, without figures."""
    parts = [f"# {study.path.stem}", f"{len(rows)} of {len(study.runs())} runs."]
    if rows:
        parts.append(NOTE.format(reference=study.reference, missing=MISSING))
    names = {"epochs": "epoch{}", "cpu_seconds": "CPU second{} of training"}
    for length in study.lengths:
        own = [row for row in rows if row["length"] == str(length)]
        if own:
            unit = names[length.kind].format("" if length.amount == 1 else "s")
            parts += [f"## {length.amount} {unit}", markdown(_summary(study, own))]
    return parts


def _summary(study: Study, rows: Sequence[Row]) -> Table:
    """Return a table with one line per method and policy."""
    shown = [name for name in ACCURACIES if any(row.get(name) for row in rows)]
    lines = []
    for method in study.methods:
        for policy in study.policies:
            own = [row for row in rows if holds(row, method=method, policy=policy)]
            if not own:
                continue
            line = [method, policy, str(len(own))]
            for name, decimals in SIZES.items():
                values = [*by_seed(own, name).values()]
                line.append(f"{fmean(values):.{decimals}f}" if values else MISSING)
            for name in shown:
                numbers = by_seed(own, name)
                plain = by_seed(rows, name, method=method, policy=study.reference)
                gap = None if policy == study.reference else paired(numbers, plain)
                line += [_mean([*numbers.values()]), _gap(gap)]
            lines.append(line)
    header = [["method"], ["policy"], ["n"], ["epochs"], ["step"], ["CPU s"], ["MiB"]]
    for name in shown:
        header += [[ACCURACIES[name]], ["difference"]]
    return Table(header, lines, names=2)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    mean, deviation = spread(values)
    return f"{mean:.2f} ± {MISSING if deviation is None else f'{deviation:.2f}'}"


def _gap(found: Difference | None) -> str:
    if found is None:
        return MISSING
    if found.half_width is None:
        return f"{found.mean:+.2f} ({MISSING})"
    low, high = found.mean - found.half_width, found.mean + found.half_width
    return f"{found.mean:+.2f} ({low:+.2f} to {high:+.2f})"
