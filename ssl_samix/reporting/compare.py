"""``samix compare``: one table of the results of several runs. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ssl_samix.artifacts.results import NUMBERS, read_rows
from ssl_samix.artifacts.run_folder import FREE_KEYS, RunFolder, command_of
from ssl_samix.config.compose import compose, dotted, plain
from ssl_samix.errors import CheckpointError, ConfigError, UserError, check_choice, nearest
from ssl_samix.files import expanded, write_atomically
from ssl_samix.reporting.tables import FORMATS, MISSING, Table

# What a resume may change does not change what is learned, but for the number of epochs.
UNLEARNED = ("seed", *(key for key in FREE_KEYS if key != "trainer.max_epochs"))
OF_THE_NETWORK = ("backbone.", "data.image_size")  # what an untrained network follows from
# Of the groups that are told.
FIRST = ("method", "mixup", "data", "backbone", "views", "augment", "optimizer")


@dataclass(frozen=True)
class Configuration:
    """What a run learned with.

    Attributes:
        values: Dotted key -> value, without the keys that do not change what is learned.
        choices: Group -> name.
    """

    values: dict[str, Any]
    choices: dict[str, str | None]

    @property
    def identity(self) -> str:
        """The same text for the same values, however they were chosen."""
        return json.dumps(self.values, sort_keys=True)

    def network(self) -> Configuration:
        """Return what an untrained network follows from."""
        values = {k: v for k, v in self.values.items() if k.startswith(OF_THE_NETWORK)}
        return Configuration(values, {"backbone": self.choices.get("backbone")})

    def shown(self, key: str) -> str | None:
        """Return the choice or value under ``key`` as text; None if there is none."""
        if key == "method" and "augment" in self.choices:
            return "supervised"
        if key not in self.values:
            return self.choices.get(key)
        value = self.values[key]
        return value if isinstance(value, str) else json.dumps(value)


def read_configuration(run: RunFolder) -> Configuration:
    """Read what a run learned with.

    Raises:
        CheckpointError: If the folder holds no configuration, or a damaged one.
    """
    config, choices = run.load_config()
    return Configuration(_learned(plain(config)), {**choices})


def _learned(config: dict[str, Any]) -> dict[str, Any]:
    return {k: _number(v) for k, v in dotted(config).items() if not k.startswith(UNLEARNED)}


def _number(value: Any) -> Any:
    """Write 1.0 as 1, as which a user may have given it."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def differing(configurations: Sequence[Configuration]) -> list[str]:
    """Return the groups, then the keys, in which configurations differ.

    A key is left out where each configuration has the value that its choices bring along: that
    ``method=moco`` has a queue and ``method=simclr`` has none is said by the method's name.
    """
    names = {group for c in configurations for group in c.choices if group != "callbacks"}
    ordered = [g for g in FIRST if g in names] + sorted(names.difference(FIRST))
    chosen = {g: {c.choices[g] for c in configurations if g in c.choices} for g in ordered}
    groups = [g for g in ordered if len(chosen[g]) > 1]
    if len({"method" in c.choices for c in configurations}) > 1 and "method" not in groups:
        groups.insert(0, "method")  # of two ways to train, one of which has it
    if all(c.choices.get("views") == c.choices.get("method") for c in configurations):
        groups = [g for g in groups if g != "views"]  # a method brings its own
    keys = dict.fromkeys(key for c in configurations for key in c.values)
    return groups + [key for key in keys if _differs(key, configurations)]


def _differs(key: str, configurations: Sequence[Configuration]) -> bool:
    values = {json.dumps(c.values.get(key)) for c in configurations}
    return len(values) > 1 and any(
        c.values.get(key) != _usual(tuple(c.choices.items())).get(key) for c in configurations
    )


@cache
def _usual(choices: tuple[tuple[str, str | None], ...]) -> dict[str, Any]:
    """Return the values that choices bring along; none if one of them is unknown here."""
    try:
        words = [f"{group}={name}" for group, name in choices if name is not None]
        config, _ = compose(command_of(dict(choices)), words)
    except ConfigError:
        return {}
    return _learned(plain(config))


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
                value = _cell_number(folder, number, row[number])
                yield Measured(column, value, row["encoder"], row["seed"], row["data_fingerprint"])
            told.add((row["folder"], number))


def _cell_number(folder: Path, name: str, text: str) -> float:
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
