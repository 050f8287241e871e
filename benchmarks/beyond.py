"""Measure encoders outside their training set: corruptions, other data, few labels.

    python benchmarks/beyond.py runs/study/simclr-none-e12-s0 runs/study/simclr-samix-e12-s0 \
        --reference simclr-none-e12 --fashion /where/FashionMNIST/is --csv beyond.csv

Runs that differ only in their seed are named <name>-s<seed>, as in a study. Each result is written
to the table at once, and not measured again. At the end the whole table is printed: means and
standard deviations over seeds, and differences to the reference, paired by seed, with their 95%
confidence intervals. A picture beside the table shows top-1 against the strength of each
corruption.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import exit_on_error, print_table, progress

from ssl_samix.artifacts.results import read_rows, write_rows
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.cli.main import main as samix
from ssl_samix.errors import UserError
from ssl_samix.reporting.study_pictures import Panel, Series, chart, write_figure
from ssl_samix.reporting.study_table import paired, spread

COLUMNS = ("run", "seed", "measure", "value")
CORRUPTIONS = {
    "noise": "gaussian_noise", "blur": "gaussian_blur", "contrast": "contrast", "JPEG": "jpeg",
}  # fmt: skip
CLEAN = "clean images, L-BFGS"
STRENGTHS = range(1, 6)
STRENGTH = ", strength "  # between corruption and strength; rows for the picture only
NAME = re.compile(r"(.+)-s(\d+)")
Values = dict[str, dict[str, dict[str, float]]]
Record = dict[str, dict[str, float]]  # results of a results.json, by variant


@dataclass(frozen=True)
class Measure:
    """An evaluation command and the results that the table keeps of it.

    Attributes:
        words: Arguments of the command; {here} is the results folder of all commands.
        numbers: Name in the table -> (variant, number) of results.json.
    """

    words: tuple[str, ...]
    numbers: dict[str, tuple[str, str]]


def transfer(data: str, *words: str) -> dict[str, Measure]:
    """Return measures by kNN and linear probe on another data set."""
    return {
        f"{data}-{command}": Measure(
            (command, f"data={data}", *words), {f"{data}, {command}": (variant, "top1")}
        )
        for command, variant in (("knn", "chosen"), ("linear", "heads"))
    }


def few_labels(percent: int) -> dict[str, Measure]:
    """Return measures by fine-tuning on ``percent`` of the labels."""
    words = ("semi", f"percent={percent}", f"finetune=openmixup_{percent}")
    kept = {"fine-tuned": "fine-tuned", "L-BFGS on frozen features": "linear"}
    numbers = {f"{percent}% of labels, {n}": (f"{v} {percent}%", "top1") for n, v in kept.items()}
    return {f"labels-{percent}": Measure(words, numbers)}


def measures(fashion: str | None) -> dict[str, Measure]:
    """Return all measures, in the order in which they are made."""
    robust = {
        CLEAN: "top1", "calibration error": "ece", "FGSM": "fgsm_top1",
        "all corruptions": "corrupted_top1",
        **{name: f"{key}_top1" for name, key in CORRUPTIONS.items()},
        **{f"{n}{STRENGTH}{i}": f"{key}_{i}" for n, key in CORRUPTIONS.items() for i in STRENGTHS},
    }  # fmt: skip
    clothes = (f"data.root={fashion}", "data.limit=10000")
    return {
        "linear": Measure(("linear",), {"linear": ("heads", "top1")}),
        "robustness": Measure(  # of the classifier fitted by the previous command
            ("robustness", "run={here}/linear", "corruptions=true"),
            {name: ("linear", number) for name, number in robust.items()},
        ),
        **transfer("digits"),
        **(transfer("fashion_mnist", *clothes) if fashion else {}),
        **few_labels(1),
        **few_labels(10),
    }


def measured(run: Path, name: str, measure: Measure) -> Record:
    """Return a command's results for a run; they are read if they exist already."""
    here = run / "results" / "beyond"
    record = here / name / "results.json"
    if not record.exists():
        command, *words = (word.replace("{here}", str(here)) for word in measure.words)
        if not any(word.startswith("run=") for word in words):
            words.insert(0, f"run={run}")
        with contextlib.redirect_stdout(io.StringIO()):
            samix([command, *words, f"out={here / name}"])
    content: dict[str, Any] = json.loads(record.read_text("utf-8"))
    found: Record = {result["variant"]: result["numbers"] for result in content["results"]}
    for variant, corruptions in content["details"].get("corruptions", {}).items():
        for corruption, curve in corruptions.items():
            for strength, top1 in zip(STRENGTHS, curve["top1"], strict=True):
                found[variant][f"{corruption}_{strength}"] = top1
    return found


def parts_of(run: Path) -> tuple[str, str]:
    """Return the name and the seed in a run folder's name.

    Raises:
        UserError: If the name has another form, or there is no encoder.
    """
    match = NAME.fullmatch(run.name)
    if match is None:
        raise UserError(f"{run} is not named <name>-s<seed>: rename it")
    if not RunFolder(run).encoder.exists():
        raise UserError(f"{run} holds no encoder.safetensors")
    return match[1], match[2]


def by_measure(rows: Sequence[dict[str, str]]) -> Values:
    """Return the table's values by measure, kind of run and seed."""
    values: Values = {}
    for row in rows:
        of_measure = values.setdefault(row["measure"], {})
        of_measure.setdefault(row["run"], {})[row["seed"]] = float(row["value"])
    return values


def paint(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Write a picture with a panel per corruption: mean and deviation over seeds by strength."""
    values = by_measure(rows)
    panels = []
    for corruption in CORRUPTIONS:
        measures = [CLEAN, *(f"{corruption}{STRENGTH}{i}" for i in STRENGTHS)]
        kinds = values.get(measures[-1], {})
        series = []
        for kind in kinds:
            means = [spread([*values[measure][kind].values()]) for measure in measures]
            points = [(float(i), mean.mean) for i, mean in enumerate(means)]
            series.append(Series(kind, points, [mean.deviation or 0.0 for mean in means]))
        if series:
            panels.append(Panel(corruption, series, least=5.0))  # seeds differ by about one point
    if panels:
        write_figure(path, chart(panels, "strength (0: clean images)", "top-1 %"))


def table(rows: Sequence[dict[str, str]], reference: str) -> list[tuple[str, ...]]:
    """Return header and lines: a line per measure, mean and difference per kind of run."""
    values = by_measure([row for row in rows if STRENGTH not in row["measure"]])
    runs = list(dict.fromkeys([reference, *(row["run"] for row in rows)]))
    header = ["", *(cell for run in runs for cell in (run, "difference"))]
    del header[2]  # the reference itself

    def line(name: str, of_measure: dict[str, dict[str, float]]) -> tuple[str, ...]:
        cells = [name]
        for run in runs:
            own = of_measure.get(run, {})
            mean = spread([*own.values()]) if own else None
            off = "" if mean is None or mean.deviation is None else f" ± {mean.deviation:.2f}"
            cells.append("" if mean is None else f"{mean.mean:.2f}{off}")
            gap = paired(own, of_measure.get(reference, {}))
            if run != reference:
                width = "" if gap is None or gap.half_width is None else f" ± {gap.half_width:.2f}"
                cells.append("" if gap is None else f"{gap.mean:+.2f}{width}")
        return tuple(cells)

    return [tuple(header), *(line(*each) for each in values.items())]


def add(
    rows: list[dict[str, str]], runs: dict[Path, tuple[str, str]], name: str, measure: Measure
) -> bool:
    """Add what a command measures of runs to the rows of the table, one run per call.

    Returns:
        Whether there was something to add.
    """
    done = {(row["run"], row["seed"], row["measure"]) for row in rows}
    for run, (kind, seed) in runs.items():
        if all((kind, seed, number) in done for number in measure.numbers):
            continue
        progress(f"{run.name}: {name}")
        found = measured(run, name, measure)
        for number, (variant, key) in measure.numbers.items():
            if (kind, seed, number) not in done:
                value = f"{found[variant][key]:.6g}"
                rows.append(dict(zip(COLUMNS, (kind, seed, number, value), strict=True)))
        return True
    return False


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing in the table, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of samix pretrain")
    parser.add_argument("--reference", required=True, help="name of the runs to compare with")
    parser.add_argument("--csv", required=True, type=Path, help="the table; new rows are added")
    parser.add_argument("--fashion", help="folder that holds FashionMNIST; optional")
    parser.add_argument("--only", help="comma-separated measures")
    args = parser.parse_args(arguments)
    known = measures(args.fashion)
    names = args.only.split(",") if args.only else list(known)
    for name in names:
        if name not in known:
            parser.error(f"--only: {name!r} is not one of {', '.join(known)}")
    rows = read_rows(args.csv)
    if any(row.get(name) is None for row in rows for name in COLUMNS):
        raise UserError(f"{args.csv} is damaged or not a table of this benchmark")
    runs = {run: parts_of(run) for run in args.runs}
    if args.reference not in {row["run"] for row in rows} | {kind for kind, _ in runs.values()}:
        raise UserError(f"--reference: there is no run {args.reference}")
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        while add(rows, runs, name, known[name]):
            write_rows(args.csv, COLUMNS, rows)
    print("## Beyond the training set\n")
    print(f"top-1 in percent (calibration error likewise), differences to {args.reference}\n")
    header, *lines = table(rows, args.reference)
    print_table(header, lines)
    paint(rows, args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
