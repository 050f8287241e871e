"""``samix study``: a table of runs from one file. Imports no torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_samix.config.compose import check, groups, parse, quote_paths
from ssl_samix.data.layout import check_layout
from ssl_samix.errors import ConfigError, Interrupted, UserError, check_choice, nearest
from ssl_samix.files import expanded
from ssl_samix.reporting.study_costs import Costs
from ssl_samix.reporting.study_jobs import (
    Rows,
    Runner,
    listed,
    result,
    seconds_left,
    shown,
    stopped_by_sigterm,
)
from ssl_samix.reporting.study_plan import Run, Study, read_study
from ssl_samix.reporting.study_report import write_report
from ssl_samix.reporting.study_table import Row, done_of, lock_of, read_table

CHANGED = ("workers", "out", "csv")  # keys of the file that the command line may change
DOES = ("list", "report")  # what is done instead of the runs
SHOWN = 5  # failures that are told again at the end
HELP = """samix study: a table of runs from one file, trained, measured and put together.

Usage: samix study <study.yaml> [key=value]...

The file names methods, policies, seeds and how long runs are; every run is a samix pretrain (or
supervised) of its own in a folder of its own, measured by samix knn and linear. Runs that have a
row in the table are done. Stopped, by whatever? The same command goes on. It may be started
several times: no run is done twice. Beside the table: the report (.md), pictures (.png).

Keys, with the values they have now:

list: false    # print the runs with their commands, and what is done, instead
report: false  # write the report of what is done, instead
workers: null  # runs at the same time, one thread each; null: the file's
out: null      # folder of the runs; null: the file's
csv: null      # the table; null: the file's

Other words, as data.root=cifar10, are for all runs, after those of base. A study file holds:

base: [data=digits]         # words of all runs
methods:                    # name: words
  moco: [method=moco]
policies:                   # name: words
  none: [mixup=none]
  samix: [mixup=samix]
seeds: [0, 1]               # or by policy: {default: [0], none: [0, 1, 2]}
length: {epochs: 20}        # or cpu_seconds: [240, 600], as many epochs as fit
command: pretrain           # pretrain | supervised
evaluate: [knn, linear]     # protocols that measure every run; of supervised: []
workers: auto               # auto: one per processor core
reference: none             # the policy that others are compared with
out: runs/studies/<name>    # folder of the runs
csv: <out>/<name>.csv       # the table

More in docs/studies.md, with studies to start from in benchmarks/studies/.
"""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        study: The study.
        listing: Whether runs are printed only.
        reporting: Whether the report is written only.
        words: The command line, for the sentence that says how to go on.
    """

    study: Study
    listing: bool
    reporting: bool
    words: Sequence[str]


def main(words: list[str]) -> str:
    """Do, list or report the runs of a study, and return what is to be printed.

    Args:
        words: The study file, and ``key=value`` words.

    Raises:
        UserError: For a mistake in the file, the words or the table.
        Interrupted: If it was stopped; the children have ended then.
        SystemExit: With status 1, if a run failed.
    """
    if {"-h", "--help"} & set(words):
        return HELP.rstrip()
    request = configured(words)
    study = request.study
    if request.reporting:
        with lock_of(study):
            write_report(study, list(read_table(study).values()))
        return str(study.csv.with_suffix(".md"))
    _check(study, study.runs() if request.listing else _left(study))
    if request.listing:
        return listed(study)
    with stopped_by_sigterm():
        try:
            failures = _do(study)
        except KeyboardInterrupt as interrupt:
            done, runs = done_of(read_table(study), study.runs()), study.runs()
            again = shlex.join(["samix", "study", *request.words])
            sentence = f"interrupted with {len(done)} of {len(runs)} runs done: {again} goes on"
            raise Interrupted(sentence) from interrupt
    if failures:
        some = failures[:SHOWN] + ["..."] * (len(failures) > SHOWN)
        print(f"samix: {len(failures)} runs failed:", *some, sep="\n  ", file=sys.stderr)
        sys.exit(1)
    return str(study.csv.with_suffix(".md"))


def configured(words: Sequence[str]) -> Request:
    """Tell the file from ``key=value`` words, and read it.

    Raises:
        ConfigError: For the first mistake.
    """
    paths, own, further = [], {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or (Path(word).exists() and key not in (*CHANGED, *DOES)):
            paths.append(word)
        elif key in (*CHANGED, *DOES):
            own[key] = value
        elif "." in key or key in groups():
            further.append(word)
        else:
            raise ConfigError(nearest(key, [*CHANGED, *DOES, *groups()], "key"))
    if len(paths) != 1 or paths[0].startswith("-"):
        raise ConfigError("study needs one file: samix study <study.yaml> [key=value]...")
    for key in DOES:
        check_choice(key, own.get(key, "false"), ("true", "false"))
    changed = {key: own[key] for key in CHANGED if own.get(key, "null") != "null"}
    workers = changed.pop("workers", None)
    number = int(workers) if workers and workers.isdigit() else workers
    study = read_study(expanded(paths[0]), further, workers=number, **changed)
    return Request(study, own.get("list") == "true", own.get("report") == "true", list(words))


def _left(study: Study) -> list[Run]:
    done = read_table(study)
    return [run for run in study.runs() if run.key not in done]


def _check(study: Study, runs: Sequence[Run]) -> None:
    """Find mistyped words and missing data before anything is started.

    Every method and every policy is composed once, not all pairs: each takes a while. What only a
    pair does wrong its run tells within seconds.

    Raises:
        UserError: For the first mistake.
    """
    told: set[tuple[str, str]] = set()
    for run in runs:
        if not {("method", run.method), ("policy", run.policy)} <= told:
            told |= {("method", run.method), ("policy", run.policy)}
            words = quote_paths(run.words)
            several = [o for o in parse(words) if o.is_sweep_override()]
            if several:
                raise ConfigError(f"{several[0].input_line} has several values: name each as one")
            try:
                [config] = check(study.command, words)
            except UserError as error:
                raise ConfigError(f"{run.method} with {run.policy}: {error}") from error
            check_layout(config.data.name, config.data.root, config.data.download)


def _do(study: Study) -> list[str]:
    """Do what is left, tell of each finished run, and return a sentence per failure."""
    try:
        study.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {study.logs}: {error.strerror or error}") from error
    runs, costs = study.runs(), Costs(study)
    left = _left(study)
    if left:
        plural = "" if study.workers == 1 else "s"
        _tell(f"{len(left)} of {len(runs)} runs left, {study.workers} worker{plural}, {study.out}")
        costs.measure(_tell)

    def epochs(run: Run) -> int:
        found = costs.epochs(run)
        assert found is not None, "costs are measured before the first run"
        return found

    def finished(run: Run, row: Row, rows: Rows) -> None:
        write_report(study, list(rows.values()))
        waiting = [run for run in runs if run.key not in rows]
        place = f"[{len(runs) - len(waiting)}/{len(runs)}]"
        rest = ""
        if waiting:
            seconds = seconds_left(rows, [(run, epochs(run)) for run in waiting]) / study.workers
            rest = f"; {len(waiting)} left, about {shown(seconds)}"
        _tell(f"{place} {run.name}: {result(row)}{rest}")

    failures = Runner(study, epochs, finished, _tell).run()
    with lock_of(study):
        write_report(study, list(read_table(study).values()))
    return failures


def _tell(sentence: str) -> None:
    print(sentence, flush=True)
