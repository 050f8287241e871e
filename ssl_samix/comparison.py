"""From the results of several runs to the lines, columns and cells of one table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from ssl_samix.differences import Configuration, differing, read_configuration
from ssl_samix.errors import CheckpointError, UserError
from ssl_samix.evaluation.table import NUMBERS, read_rows
from ssl_samix.run_folder import RunFolder
from ssl_samix.text_tables import MISSING, Table

NEEDED = (
    "protocol", "variant", "weights", "data", "seed", "encoder", "data_fingerprint", "folder",
)  # fmt: skip
UNTRAINED = "untrained"
LONGEST_MARK = 6  # digits of a fingerprint
# How numbers are called, and to how many decimals they are given.
SHOWN = {
    "top1": ("top-1 %", 2),
    "rankme": ("RankMe", 1),
    "alignment": ("alignment", 3),
    "uniformity": ("uniformity", 3),
    "nmi": ("NMI", 3),
    "ari": ("ARI", 3),
    "cluster_accuracy": ("cluster accuracy %", 2),
    "ece": ("ECE %", 2),
    "fgsm_top1": ("FGSM top-1 %", 2),
    "corrupted_top1": ("corrupted top-1 %", 2),
}
# What a protocol is about that has accuracy.
OF_CLASSIFIERS = ("top1", "ece", "fgsm_top1", "corrupted_top1")


@dataclass(frozen=True)
class Evaluated:
    """A folder with results.

    Attributes:
        folder: Where it is.
        rows: Of its results.csv, the oldest first.
        configuration: Of the run; None if the results are of weights from elsewhere.
    """

    folder: Path
    rows: list[dict[str, str]]
    configuration: Configuration | None


class Column(NamedTuple):
    """What is compared: a number of one of a protocol's results."""

    protocol: str
    variant: str
    data: str
    number: str


class Measured(NamedTuple):
    """One number of one evaluation."""

    column: Column
    value: float
    encoder: str  # its fingerprint
    seed: str  # of the evaluation
    images: str  # fingerprint of the data


@dataclass
class Line:
    """One configuration.

    Attributes:
        encoder: What kind of encoder it is: trained, untrained, or somebody else's by name.
        configuration: Of its runs; None for somebody else's.
        folders: What was measured in each folder, the oldest first.
        drawn: Whether every network counts that was measured in a folder: untrained ones are drawn
            by the seed of the evaluation, a run has one encoder, its newest.
    """

    encoder: str
    configuration: Configuration | None
    drawn: bool
    folders: list[list[Measured]] = field(default_factory=list)

    def values(self, column: Column) -> list[float]:
        """Return one value per encoder; evaluations with several seeds are averaged."""
        by_encoder: dict[str, dict[str, float]] = {}
        for folder in self.folders:
            found = [m for m in folder if m.column == column]
            for measured in found:
                if self.drawn or measured.encoder == found[-1].encoder:
                    seeds = by_encoder.setdefault(measured.encoder, {})
                    seeds[measured.seed] = measured.value
        return [fmean(seeds.values()) for seeds in by_encoder.values()]


def read_evaluated(folder: Path) -> Evaluated:
    """Read the results in a folder.

    Raises:
        UserError: If they are damaged or none, or the run's configuration is damaged.
    """
    path, run = folder / "results.csv", RunFolder(folder)
    rows = read_rows(path)
    if not rows:
        raise CheckpointError(f"{path} is empty: measure the run first")
    missing = [name for name in NEEDED if any(row.get(name) is None for row in rows)]
    if missing:
        raise UserError(f"{path} is damaged or no table of results: it lacks {missing[0]}")
    configuration = read_configuration(run) if run.config.exists() else None
    return Evaluated(folder, rows, configuration)


def compared(runs: Sequence[Evaluated], every: bool, without: Sequence[Path] = ()) -> Table:
    """Return one table of all results.

    Args:
        runs: Each once.
        every: Show every row of an evaluation, not only its first of each number.
        without: Runs that have no results yet, to be named below the table.

    Raises:
        UserError: If a number is none.
    """
    lines = _lines(runs, every)
    apart = _tell_apart(lines)
    seen = dict.fromkeys(m.column for line in lines for folder in line.folders for m in folder)
    columns = sorted(seen, key=lambda column: (column.protocol, column.data))
    configurations = [run.configuration for run in runs if run.configuration is not None]
    keys = differing(configurations)
    if configurations and not keys:
        keys = ["method", "mixup"]
    kinds = any(line.encoder != "trained" for line in lines)
    values = [[line.values(column) for column in columns] for line in lines]
    rows = [
        [
            *([line.encoder] if kinds else []),
            *(_name(line, key) for key in keys),
            *(_cell(v, c.number) for v, c in zip(numbers, columns, strict=True)),
        ]
        for line, numbers in zip(lines, values, strict=True)
    ]
    header = [[name] for name in (*(["encoder"] if kinds else []), *keys)]
    several = any(len(v) > 1 for numbers in values for v in numbers)
    notes = list(_notes(lines, columns, several, without))
    if apart:
        notes.append("after a data set: data_fingerprint of results.csv, by which images differ")
    names = len(header)
    header += [[c.protocol, c.variant, c.data, SHOWN[c.number][0]] for c in columns]
    return Table(header, rows, names, notes)


def _tell_apart(lines: Sequence[Line]) -> bool:
    """Give different images columns of their own where an encoder was measured on several.

    The newest would otherwise count alone. Different encoders may share a column all the same, as
    of different image sizes, and a note says so.

    Returns:
        Whether there are any.
    """
    images: dict[tuple[Column, str], set[str]] = {}
    for each in (m for line in lines for folder in line.folders for m in folder):
        images.setdefault((each.column, each.encoder), set()).add(each.images)
    several = {column for (column, _), found in images.items() if len(found) > 1}

    def told(measured: Measured) -> Measured:
        column, mark = measured.column, measured.images[:LONGEST_MARK]
        if column not in several:
            return measured
        return measured._replace(column=column._replace(data=f"{column.data} {mark}"))

    for line in lines:
        line.folders = [[told(measured) for measured in folder] for folder in line.folders]
    return bool(several)


def _lines(runs: Sequence[Evaluated], every: bool) -> list[Line]:
    """Return the configurations, trained ones first."""
    lines: dict[tuple[str, str], Line] = {}
    for run in runs:
        for weights in dict.fromkeys(row["weights"] for row in run.rows):
            line = _line(run, weights)
            known = line.configuration
            key = str(run.folder.resolve()) if known is None else known.identity
            of_weights = [row for row in run.rows if row["weights"] == weights]
            folder = list(_measured(run.folder, of_weights, every))
            lines.setdefault((line.encoder, key), line).folders.append(folder)
    return sorted(lines.values(), key=lambda line: line.encoder != "trained")


def _line(run: Evaluated, weights: str) -> Line:
    drawn = weights == "random"
    if run.configuration is None:
        origin = {"random": f" ({UNTRAINED})", "own": ""}.get(weights, f" ({weights})")
        return Line(f"{run.folder.resolve().name}{origin}", None, drawn)
    if drawn:
        return Line(UNTRAINED, run.configuration.network(), drawn)
    return Line("trained", run.configuration, drawn)


def _measured(folder: Path, rows: Iterable[dict[str, str]], every: bool) -> Iterator[Measured]:
    told: set[tuple[str, str]] = set()
    for row in rows:
        shown = OF_CLASSIFIERS if row.get("top1") else [n for n in NUMBERS if n in SHOWN]
        numbers = [n for n in shown if row.get(n)]
        for number in numbers:
            if every or (row["folder"], number) not in told:
                column = Column(row["protocol"], row["variant"], row["data"], number)
                value = _number(folder, number, row[number])
                yield Measured(column, value, row["encoder"], row["seed"], row["data_fingerprint"])
            told.add((row["folder"], number))


def _number(folder: Path, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(
            f"{folder / 'results.csv'} is damaged: {name} is no number, '{text}'"
        ) from error


def _name(line: Line, key: str) -> str:
    shown = line.configuration.shown(key) if line.configuration else None
    return MISSING if shown is None else shown


def _cell(values: Sequence[float], number: str) -> str:
    if not values:
        return MISSING
    _, decimals = SHOWN[number]
    mean = f"{fmean(values):.{decimals}f}"
    if len(values) == 1 or not math.isfinite(sum(values)):
        return mean
    return f"{mean} ± {stdev(values):.{decimals}f} ({len(values)})"


def _notes(
    lines: Sequence[Line], columns: Sequence[Column], several: bool, without: Sequence[Path]
) -> Iterator[str]:
    if several:
        yield "mean ± standard deviation (number of encoders)"
    unlike = []
    for column in columns:
        every = (m for line in lines for folder in line.folders for m in folder)
        if len({m.images for m in every if m.column == column}) > 1:
            unlike.append(f"{column.protocol} {column.variant} {column.data}")
    if unlike:
        named = ", ".join(dict.fromkeys(unlike))
        yield f"not all measured on the same images at the same size: {named}"
    if without:
        yield f"not measured yet: {', '.join(map(str, without))}"
