"""What a study says on the screen: its runs, what is done, what is left. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean

from ssl_samix.study.costs import Costs
from ssl_samix.study.plan import Run, Study
from ssl_samix.study.runner import Rows
from ssl_samix.study.table import done_of, read_table


def listed(study: Study) -> str:
    """Return a line per run: whether it is done, and its commands."""
    done, costs, lines = read_table(study), Costs(study), []
    for run in study.runs():
        if run.key in done:
            lines.append(f"done  {run.name}")
            continue
        epochs = costs.epochs(run)
        training = study.training(run, epochs or 1)
        if epochs is None:  # the costs are measured first
            training[training.index("trainer.max_epochs=1")] = "trainer.max_epochs=<measured>"
        commands = [training, *(study.measuring(run, name) for name in study.evaluate)]
        folder = "begun" if study.folder(run).exists() else "     "
        lines.append(f"{folder} {run.name}")
        lines += [f"      samix {shlex.join(command)}" for command in commands]
    return "\n".join([*lines, f"{len(done_of(done, study.runs()))} of {len(study.runs())} done"])


def seconds_left(rows: Rows, waiting: Sequence[tuple[Run, int]]) -> float:
    """Estimate the seconds of runs, one after the other, from those that are done.

    A run's epoch takes as long as those of the same method and policy; failing that, as those of
    the same policy, or of all.

    Args:
        rows: At least one.
        waiting: Runs and their epochs.
    """
    pace: dict[tuple[str, ...], list[float]] = {}
    for row in rows.values():
        seconds = float(row["seconds"]) / int(row["epochs"])
        for place in ((row["method"], row["policy"]), (row["policy"],), ()):
            pace.setdefault(place, []).append(seconds)
    total = 0.0
    for run, epochs in waiting:
        places: Sequence[tuple[str, ...]] = ((run.method, run.policy), (run.policy,), ())
        total += epochs * fmean(next(pace[place] for place in places if place in pace))
    return total


def result(row: Mapping[str, str]) -> str:
    """Say what a run has reached, for the screen."""
    named = {"knn_top1": "kNN", "linear_top1": "linear", "top1": "top-1"}
    found = [f"{text} {float(row[name]):.2f}%" for name, text in named.items() if row.get(name)]
    epochs = "1 epoch" if row["epochs"] == "1" else f"{row['epochs']} epochs"
    return ", ".join([*found, f"{epochs}, {float(row['cpu_seconds']):.0f} CPU s"])


def shown(seconds: float) -> str:
    """Say how long something takes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
