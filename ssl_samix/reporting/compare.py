"""``samix compare``: one table of the results of several runs. Does not import torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from ssl_samix.artifacts.results import NUMBERS, read_rows
from ssl_samix.artifacts.run_folder import FREE_KEYS, RunFolder, command_of
from ssl_samix.config.compose import compose, dotted, plain
from ssl_samix.errors import CheckpointError, ConfigError, UserError, check_choice, nearest
from ssl_samix.files import expanded, write_atomically
from ssl_samix.reporting.tables import FORMATS, MISSING, Table

if TYPE_CHECKING:
    from pandas import DataFrame

# Keys that a resume may change do not affect the result, except for the number of epochs.
UNLEARNED = ("seed", *(key for key in FREE_KEYS if key != "trainer.max_epochs"))
OF_THE_NETWORK = ("backbone.", "data.image_size")  # what determines an untrained network
# Groups listed first, in this order.
FIRST = ("method", "mixup", "data", "backbone", "views", "augment", "optimizer")


@dataclass(frozen=True)
class Configuration:
    """The configuration of a run, as far as it affects the result.

    Attributes:
        values: Dotted key -> value, without the keys that do not affect the result.
        choices: Group -> chosen name.
    """

    values: dict[str, Any]
    choices: dict[str, str | None]

    @property
    def identity(self) -> str:
        """A text that is equal for equal values, however they were chosen."""
        return json.dumps(self.values, sort_keys=True)

    def network(self) -> Configuration:
        """Return the part that determines an untrained network."""
        values = {k: v for k, v in self.values.items() if k.startswith(OF_THE_NETWORK)}
        return Configuration(values, {"backbone": self.choices.get("backbone")})

    def shown(self, key: str) -> str | None:
        """Return the choice or value of ``key`` as text, or None if there is none."""
        if key == "method" and "augment" in self.choices:
            return "supervised"
        if key not in self.values:
            return self.choices.get(key)
        value = self.values[key]
        return value if isinstance(value, str) else json.dumps(value)


def read_configuration(run: RunFolder) -> Configuration:
    """Return the configuration of a run.

    Raises:
        CheckpointError: If the configuration is missing or damaged.
    """
    config, choices = run.load_config()
    return Configuration(_learned(plain(config)), {**choices})


def _learned(config: dict[str, Any]) -> dict[str, Any]:
    return {k: _number(v) for k, v in dotted(config).items() if not k.startswith(UNLEARNED)}


def _number(value: Any) -> Any:
    """Return a whole float as an int, so that 1.0 and 1 compare as equal text."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def differing(configurations: Sequence[Configuration]) -> list[str]:
    """Return the groups, then the keys, in which configurations differ.

    A key is left out if every configuration has the default value of its choices: the name of the
    method already says that ``method=moco`` has a queue and ``method=simclr`` does not.
    """
    names = {group for c in configurations for group in c.choices} - {"callbacks", "logger"}
    ordered = [g for g in FIRST if g in names] + sorted(names.difference(FIRST))
    chosen = {g: {c.choices[g] for c in configurations if g in c.choices} for g in ordered}
    groups = [g for g in ordered if len(chosen[g]) > 1]
    if len({"method" in c.choices for c in configurations}) > 1 and "method" not in groups:
        groups.insert(0, "method")  # pretraining has a method, supervised training does not
    if all(c.choices.get("views") == c.choices.get("method") for c in configurations):
        groups = [g for g in groups if g != "views"]  # each method has its own views by default
    keys = dict.fromkeys(key for c in configurations for key in c.values)
    return groups + [key for key in keys if _differs(key, configurations)]


def _differs(key: str, configurations: Sequence[Configuration]) -> bool:
    values = {json.dumps(c.values.get(key)) for c in configurations}
    return len(values) > 1 and any(
        c.values.get(key) != _usual(tuple(c.choices.items())).get(key) for c in configurations
    )


@cache
def _usual(choices: tuple[tuple[str, str | None], ...]) -> dict[str, Any]:
    """Return the default values of choices; empty if one of the choices is unknown."""
    try:
        words = [f"{group}={name}" for group, name in choices if name is not None]
        config, _ = compose(command_of(dict(choices)), words)
    except ConfigError:
        return {}
    return _learned(plain(config))


NEEDED = (
    "protocol", "variant", "weights", "data", "seed", "encoder", "data_fingerprint", "folder",
)  # fmt: skip
FINGERPRINT_DIGITS = 6  # digits of the image fingerprint in a column name
# Title and number of decimals of each number.
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
# Numbers shown for a protocol that has accuracies.
OF_CLASSIFIERS = ("top1", "ece", "fgsm_top1", "corrupted_top1")
# The fields that identify a column: a number of one of a protocol's results.
COLUMN = ["protocol", "variant", "data", "number"]


@dataclass(frozen=True)
class Evaluated:
    """The results in one folder.

    Attributes:
        folder: Path of the folder.
        rows: Rows of its results.csv, oldest first; none if the run has not been measured.
        configuration: That of the run; None if the results are of external weights.
    """

    folder: Path
    rows: list[dict[str, str]]
    configuration: Configuration | None


class Line(NamedTuple):
    """The identity of a row of the table.

    Attributes:
        encoder: ``trained``, ``untrained``, or the name of external weights.
        identity: Identity of its configuration, or its folder.
    """

    encoder: str
    identity: str


def read_evaluated(folder: Path) -> Evaluated:
    """Return the results in a folder; those of a run that has not been measured are empty.

    Raises:
        UserError: If the results are damaged or empty, or the configuration is damaged.
    """
    path, run = folder / "results.csv", RunFolder(folder)
    rows = read_rows(path)
    if not rows and path.exists():
        raise CheckpointError(f"{path} is empty: measure the run first")
    missing = [name for name in NEEDED if any(row.get(name) is None for row in rows)]
    if missing:
        raise UserError(f"{path} is damaged or not a table of results: it lacks {missing[0]}")
    configuration = read_configuration(run) if run.config.exists() else None
    return Evaluated(folder, rows, configuration)


def compared(runs: Sequence[Evaluated], every: bool) -> Table:
    """Return one table of all results.

    Args:
        runs: Results to compare, without duplicates. Runs without results are lines of blanks, and
            listed below the table.
        every: Show all rows of an evaluation, not only the first row of each number.

    Raises:
        UserError: If a value is not a number.
    """
    found, lines = _measured(runs, every)
    ordered = sorted(lines, key=lambda line: line.encoder != "trained")
    # In the order of the table; within it, the order of measurement is kept.
    found = found.sort_values("line", key=lambda of: of.map(ordered.index), kind="stable")
    apart = _tell_apart(found)
    unique = found[COLUMN].drop_duplicates().sort_values(["protocol", "data"], kind="stable")
    columns, values = [*unique.itertuples(index=False)], _values(found)
    keys = differing([run.configuration for run in runs if run.configuration is not None])
    if not keys and any(run.configuration for run in runs):
        keys = ["method", "mixup"]
    kinds = ["encoder"] if any(line.encoder != "trained" for line in ordered) else []
    rows = []
    for line in ordered:
        names = [line.encoder] * len(kinds) + [_name(lines[line], key) for key in keys]
        rows.append(names + [_cell(values.get((line, *of), []), of.number) for of in columns])
    header = [[name] for name in (*kinds, *keys)]
    header += [[*place, SHOWN[number][0]] for *place, number in columns]
    notes = []
    if any(len(of) > 1 for of in values.values()):
        notes.append("mean ± standard deviation (number of encoders)")
    unlike = found.groupby(COLUMN)["data_fingerprint"].nunique() > 1
    named = dict.fromkeys(" ".join(of[:3]) for of in columns if unlike[of])
    if named:
        notes.append(f"not all measured on the same images at the same size: {', '.join(named)}")
    if without := [str(run.folder) for run in runs if not run.rows]:
        notes.append(f"not measured yet: {', '.join(without)}")
    if apart:
        notes.append("after a data set: data_fingerprint of results.csv, by which images differ")
    return Table(header, rows, len(kinds) + len(keys), notes)


def _measured(
    runs: Sequence[Evaluated], every: bool
) -> tuple[DataFrame, dict[Line, Configuration | None]]:
    """Return one row per number, oldest first within a run, and all lines of the table."""
    from pandas import DataFrame

    found: list[tuple[Any, ...]] = []
    lines: dict[Line, Configuration | None] = {}
    for run in runs:
        if not run.rows:
            lines.setdefault(*_line(run, "own"))
        for row in run.rows:
            line, configuration = _line(run, row["weights"])
            lines.setdefault(line, configuration)
            shown = OF_CLASSIFIERS if row.get("top1") else [n for n in NUMBERS if n in SHOWN]
            for number in (n for n in shown if row.get(n)):
                value = _value(run.folder, number, row[number])
                found.append((line, run.folder, number, value, *(row[name] for name in NEEDED)))
    frame = DataFrame(found, columns=["line", "run", "number", "value", *NEEDED])
    once = frame if every else frame.drop_duplicates(["run", "weights", "folder", "number"])
    return once, lines


def _values(found: DataFrame) -> dict[tuple[Any, ...], list[float]]:
    """Return one value per encoder for each line and column, averaged over evaluation seeds."""
    # Untrained encoders depend on the evaluation seed; of a trained one, the newest weights count.
    newest = found.groupby(["run", "weights", *COLUMN])["encoder"].transform("last")
    counting = found[(found["weights"] == "random") | (found["encoder"] == newest)]
    cell = ["line", *COLUMN]
    by_seed = counting.drop_duplicates([*cell, "encoder", "seed"], keep="last")
    by_encoder = by_seed.groupby([*cell, "encoder"])["value"].agg(fmean)
    return {key: [*of] for key, of in by_encoder.groupby(cell)}


def _tell_apart(found: DataFrame) -> bool:
    """Split columns by image set where an encoder was measured on several image sets.

    Otherwise only the newest measurement would count. Different encoders may still share a column,
    for example with different image sizes; a note below the table says so.

    Returns:
        Whether any column was split.
    """
    images = found["data_fingerprint"]
    several = (
        images.groupby([found[name] for name in (*COLUMN, "encoder")]).transform("nunique") > 1
    )
    marked = several.groupby([found[name] for name in COLUMN]).transform("any")
    found.loc[marked, "data"] += " " + images.str[:FINGERPRINT_DIGITS]
    return bool(marked.any())


def _line(run: Evaluated, weights: str) -> tuple[Line, Configuration | None]:
    if run.configuration is None:
        origin = {"random": " (untrained)", "own": ""}.get(weights, f" ({weights})")
        folder = run.folder.resolve()
        return Line(f"{folder.name}{origin}", str(folder)), None
    of = run.configuration.network() if weights == "random" else run.configuration
    return Line("untrained" if weights == "random" else "trained", of.identity), of


def _value(folder: Path, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(
            f"{folder / 'results.csv'} is damaged: {name} is not a number, '{text}'"
        ) from error


def _name(configuration: Configuration | None, key: str) -> str:
    shown = configuration.shown(key) if configuration else None
    return MISSING if shown is None else shown


def _cell(values: Sequence[float], number: str) -> str:
    if not values:
        return MISSING
    _, decimals = SHOWN[number]
    mean = f"{fmean(values):.{decimals}f}"
    if len(values) == 1 or not math.isfinite(sum(values)):
        return mean
    return f"{mean} ± {stdev(values):.{decimals}f} ({len(values)})"


HELP = """samix compare: the results of several runs as one table.

Usage: samix compare <run>... [key=value]...

A run is a run folder, or a folder with a results.csv, which samix knn, linear, semi and measures
write; a folder of such folders stands for all of them. Of a run that has not been measured all
numbers are blank. Runs that differ in their seeds alone are one line: the mean over the runs, the
standard deviation of the sample (n - 1), and how many they are. The other lines are named by the
keys in which they differ. Untrained networks (weights=random) are lines of their
own. Of a run that was measured several times the newest numbers count; those of several seeds of an
evaluation are averaged before runs are counted.

Keys and their current values:

format: text        # text | markdown | latex (a tabular, needs booktabs)
out: null           # file; null: the screen
variants: headline  # headline: of each evaluation only its first row of each number | all
"""


@dataclass(frozen=True)
class Comparison:
    """A checked ``samix compare`` command: what to compare, and how to write the table."""

    paths: list[Path]
    format: str
    out: Path | None
    variants: str


def main(words: list[str]) -> str:
    """Compare runs and return the text to print: the table, or the path of its file.

    Args:
        words: Command-line arguments: folders and ``key=value``.

    Raises:
        UserError: For the first error: a folder that does not exist or holds no results, an unknown
            key or value, damaged results, or a file that cannot be written.
    """
    if {"-h", "--help"} & set(words):
        return HELP.rstrip()
    wanted = parse_comparison(words)
    runs = find_results(wanted.paths)
    text = FORMATS[wanted.format](compared(runs, wanted.variants == "all"))
    if wanted.out is None:
        return text
    write_atomically(wanted.out, lambda temporary: temporary.write_text(text + "\n", "utf-8"))
    return str(wanted.out)


def parse_comparison(words: list[str]) -> Comparison:
    """Parse folders and ``key=value`` arguments; a folder name may contain ``=``, too.

    Raises:
        ConfigError: If a key or value is unknown, or no folder is given.
    """
    given = {"format": "text", "out": "null", "variants": "headline"}
    paths = []
    for word in words:
        key, equals, value = word.partition("=")
        path = expanded(word)
        if equals and key in given:
            given[key] = value
        elif word.startswith("-") or (equals and key.isidentifier() and not path.exists()):
            raise ConfigError(nearest(key, given, "key"))
        else:
            paths.append(path)
    check_choice("format", given["format"], FORMATS)
    check_choice("variants", given["variants"], ("headline", "all"))
    if not paths:
        raise ConfigError("compare needs runs: samix compare <run folder>...")
    out = None if given["out"] in ("", "null") else expanded(given["out"])
    return Comparison(paths, given["format"], out, given["variants"])


def find_results(paths: Sequence[Path]) -> list[Evaluated]:
    """Return the results in given run folders and in given folders of runs, one per folder.

    Files are ignored, because the shell expands ``runs/*`` to files, too.

    Raises:
        UserError: If a path does not exist, or a folder holds neither results nor runs.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give run folders, or a folder of them")
        if path.is_dir():
            for run in [path] if _is_shown(path) else _runs_in(path):
                found.setdefault(run.resolve(), run)
    if not found:
        raise CheckpointError(f"{paths[0]} is not a folder: give run folders, or a folder of them")
    return [read_evaluated(run) for run in found.values()]


def _is_shown(folder: Path) -> bool:
    """Return whether a folder holds a run or results."""
    return (folder / "results.csv").is_file() or RunFolder(folder).config.exists()


def _runs_in(folder: Path) -> list[Path]:
    """Return the runs and results directly inside a folder, or raise if there are none."""
    inside = sorted(child for child in folder.iterdir() if child.is_dir() and _is_shown(child))
    if not inside:
        raise CheckpointError(f"{folder} holds neither a run nor a results.csv")
    return inside
