"""Runs of a study, several at a time, beside other processes that do the same."""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ssl_samix.artifacts.run_folder import RunFolder, read_metrics
from ssl_samix.errors import CheckpointError, UserError
from ssl_samix.files import write_atomically
from ssl_samix.reporting.study_costs import Costs
from ssl_samix.reporting.study_plan import Run, Study, differing_words
from ssl_samix.reporting.study_processes import (
    Child,
    Process,
    RunLock,
    Usage,
    last_words,
    processor,
)
from ssl_samix.reporting.study_table import MIXER, Row, add_row, done_of, lock_of, read_table


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


class Notes:
    """What a study remembers of a run between two starts, in a JSON file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs: int | None = None
        self.trained = False
        self.settings: str | None = None  # what was trained; notes of an earlier version do not say
        # One of each start: epochs that were done before, and what was used, if the end was seen.
        self.parts: list[dict[str, float]] = []
        if path.exists():
            try:
                held = json.loads(path.read_text("utf-8"))
                self.epochs, self.trained = held["epochs"], held["trained"]
                self.parts, self.settings = held["parts"], held.get("settings")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged: remove it and the run's folder") from error

    def write(self) -> None:
        """Write the file."""
        held = {
            "epochs": self.epochs,
            "trained": self.trained,
            "settings": self.settings,
            "parts": self.parts,
        }
        write_atomically(self.path, lambda temporary: temporary.write_text(json.dumps(held)))


class Job:
    """A run at work: training, then each protocol, each a process of its own.

    Args:
        study: The study.
        run: Its run.
        epochs: How many, if it has not begun yet; one that has keeps its own.

    Raises:
        UserError: If it has begun with other words, or its notes are damaged.
    """

    def __init__(self, study: Study, run: Run, epochs: int) -> None:
        self.study, self.run = study, run
        self.folder = RunFolder(study.folder(run))
        self.log = study.logs / f"{run.name}.log"
        self.notes = Notes(study.logs / f"{run.name}.json")
        if not self.folder.last.exists():  # as a new one, whatever the notes say
            self.notes.trained, self.notes.epochs = False, epochs
            self.notes.settings = None
        if self.notes.settings not in (None, run.settings):
            changed = differing_words(run.settings, self.notes.settings)
            raise UserError(
                f"{self.folder.path} was trained with other words ({changed}): rename what was "
                "changed, or remove the folder"
            )
        self.epochs = self.notes.epochs or epochs
        self.training = False
        self._heard = 0  # bytes of the log that are of earlier processes

    def next_words(self) -> list[str] | None:
        """Return the words after ``samix`` of what is to be done next, or None."""
        self.training = not self.notes.trained
        if self.training:
            return self.study.training(self.run, self.epochs)
        for protocol in self.study.evaluate:
            if not self.study.results(self.run, protocol).exists():
                return self.study.measuring(self.run, protocol)
        return None

    def begun(self) -> None:
        """Note that a process is about to start."""
        self._heard = self.log.stat().st_size if self.log.exists() else 0
        if self.training:
            self.notes.epochs, self.notes.settings = self.epochs, self.run.settings
            self.notes.parts.append({"before": len(read_metrics(self.folder.metrics))})
            self.notes.write()

    def ended(self, usage: Usage) -> str | None:
        """Note what a process has used.

        Returns:
            Why it failed, in a sentence, if it did.
        """
        if self.training:
            self.notes.parts[-1] |= asdict(usage)
            self.notes.trained = usage.status == 0
            self.notes.write()
        if usage.status == 0:
            return None
        how = f"exit status {usage.status}" if usage.status > 0 else f"signal {-usage.status}"
        said = last_words(self.log, self._heard)
        return f"{self.run.name} failed ({how}): {said}; its log is {self.log}"

    def row(self) -> Row:
        """Return the row of a run that is done.

        Raises:
            CheckpointError: If its folder holds no epochs.
        """
        epochs = read_metrics(self.folder.metrics)
        if not epochs:
            raise CheckpointError(f"{self.folder.metrics} has no epochs: remove {self.folder.path}")
        method, policy, length, seed = self.run.key
        row: Row = {
            "method": method,
            "policy": policy,
            "length": length,
            "seed": seed,
            "epochs": str(int(epochs[-1]["epoch"]) + 1),
            "steps": epochs[-1]["step"],
            "images": f"{sum(map(_images, epochs)):.0f}",
            "peak_mib": f"{max(part.get('peak_mib', 0) for part in self.notes.parts):.0f}",
            "processor": processor(),
            "precision": self._precision(),
            "settings": self.run.settings,
        }
        for name in ("seconds", "cpu_seconds"):
            row[name] = f"{self._spent(epochs, name):.1f}"
        row["cpu_ms_per_step"] = f"{1000 * median(_steps_cost(epochs)):.2f}"
        for name, column in MIXER.items():
            row[name] = _shortened(_newest(epochs, column))
        if self.study.command == "supervised":
            row["top1"] = _shortened(_newest(epochs, "val/top1"))
        for protocol in self.study.evaluate:
            row |= _accuracies(self.study.results(self.run, protocol))
        return row

    def _precision(self) -> str:
        """Return the precision of the last start."""
        try:
            starts = json.loads(self.folder.environment.read_text("utf-8"))
            return str(starts[-1]["precision"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""  # a run of an earlier version does not tell

    def _spent(self, epochs: list[dict[str, str]], name: str) -> float:
        """Sum over the starts; one whose end nobody saw counts with the epochs that it wrote."""
        parts, total = self.notes.parts, 0.0
        ends = [*(int(part["before"]) for part in parts[1:]), len(epochs)]
        for part, end in zip(parts, ends, strict=True):
            own = epochs[int(part["before"]) : end]
            total += part[name] if name in part else sum(float(epoch[name]) for epoch in own)
        return total


def _images(epoch: dict[str, str]) -> float:
    return float(epoch["images_per_second"]) * float(epoch["seconds"])


def _steps_cost(epochs: list[dict[str, str]]) -> list[float]:
    """Return each epoch's CPU seconds per step."""
    before = [0, *(int(epoch["step"]) for epoch in epochs)]
    return [
        float(epoch["cpu_seconds"]) / max(1, int(epoch["step"]) - begin)
        for epoch, begin in zip(epochs, before, strict=False)
    ]


def _newest(epochs: list[dict[str, str]], column: str) -> str:
    values = [epoch[column] for epoch in epochs if epoch.get(column)]
    return values[-1] if values else ""


def _shortened(number: str) -> str:
    return f"{float(number):.5g}" if number else ""


def _accuracies(path: Path) -> Row:
    """Read what a protocol found.

    Raises:
        UserError: If its file is damaged.
    """
    try:
        results: dict[str, Any] = {
            found["variant"]: found for found in json.loads(path.read_text("utf-8"))["results"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove its folder") from error
    top1 = {name: f"{found['numbers']['top1']:.6g}" for name, found in results.items()}
    if "heads" in top1:
        return {"linear_top1": top1["heads"]}
    setting = results["chosen"]["settings"]
    return {
        "knn_top1": top1["chosen"],
        "knn_k200_top1": top1.get("k200-T0.1", ""),
        "knn_k": str(setting["k"]),
        "knn_temperature": str(setting["temperature"]),
    }


LOOK = 0.2  # seconds between looks at the children
LOOK_AGAIN = 2.0  # seconds between looks at runs that others have
NAMED = 3  # runs, at most, in a sentence
PATIENCE = 120.0  # seconds that a child has to end, once asked
Launch = Callable[[Sequence[str], Path, RunLock], Child]
Rows = dict[tuple[str, ...], Row]


@dataclass
class _Active:
    job: Job
    lock: RunLock
    child: Child


class Runner:
    """Does runs until none is left that could be done.

    Args:
        study: What is to be done.
        epochs: Says how many epochs a run has.
        finished: Called with the lock of the table: a run, its row, and all rows.
        tell: Says a sentence on the screen.
        launch: Starts ``python <arguments>`` with a log and a lock.
    """

    def __init__(
        self,
        study: Study,
        epochs: Callable[[Run], int],
        finished: Callable[[Run, Row, Rows], None],
        tell: Callable[[str], None],
        launch: Launch = Process,
    ) -> None:
        self.study, self.epochs = study, epochs
        self.finished, self.tell, self.launch = finished, tell, launch
        self.active: list[_Active] = []
        self.failures: list[str] = []

    def run(self) -> list[str]:
        """Do all runs that have no row.

        Returns:
            A sentence for each that failed.

        Raises:
            UserError: If the table cannot be read or written; the children have been stopped then.
        """
        waiting = self._left(self.study.runs())
        told, looked = False, -LOOK_AGAIN
        try:
            while waiting or self.active:
                if len(self.active) < self.study.workers and time.monotonic() > looked:
                    waiting = self._fill(waiting)
                    if waiting and len(self.active) < self.study.workers:  # others have them all
                        looked = time.monotonic() + LOOK_AGAIN
                if waiting and not self.active and not told:
                    self.tell(f"waiting for what other processes do: {_names(waiting)}")
                    told = True
                if any([self._looked_after(active) for active in list(self.active)]):
                    looked = -LOOK_AGAIN
                else:
                    time.sleep(LOOK)
        finally:
            self._stop()
        return self.failures

    def _left(self, runs: list[Run]) -> list[Run]:
        done = read_table(self.study)
        return [run for run in runs if run.key not in done]

    def _fill(self, waiting: list[Run]) -> list[Run]:
        """Begin runs while there is room, and return those that are left."""
        left = self._left(waiting)
        for run in list(left):
            if len(self.active) == self.study.workers:
                break
            lock = RunLock(self.study.logs / f"{run.name}.lock")
            if not lock.take():
                continue
            left.remove(run)
            if not self._left([run]):  # done by another process since the table was read
                lock.give_back()
                continue
            try:
                job = Job(self.study, run, self.epochs(run))
                self._next(job, lock)
            except UserError as error:
                self._failed(str(error), lock)
        return left

    def _next(self, job: Job, lock: RunLock) -> None:
        """Start what is next for a run, or write its row."""
        words = job.next_words()
        if words is not None:
            job.begun()
            child = self.launch(["-m", "ssl_samix", *words], job.log, lock)
            self.active.append(_Active(job, lock, child))
            return
        row = job.row()
        with lock_of(self.study):
            self.finished(job.run, row, add_row(self.study, row))
        lock.give_back()

    def _looked_after(self, active: _Active) -> bool:
        """Say whether a child has ended, and go on with its run if so."""
        usage = active.child.poll()
        if usage is None:
            return False
        self.active.remove(active)
        failure = active.job.ended(usage)
        if failure is not None:
            self._failed(failure, active.lock)
            return True
        try:
            self._next(active.job, active.lock)
        except UserError as error:
            self._failed(f"{active.job.run.name} failed: {error}", active.lock)
        return True

    def _failed(self, sentence: str, lock: RunLock) -> None:
        self.failures.append(sentence)
        self.tell(sentence)
        lock.give_back()

    def _stop(self) -> None:
        """Ask the children to end, wait for them, and note what they have used."""
        for active in self.active:
            active.child.stop()
        end = time.monotonic() + PATIENCE
        while self.active:
            try:
                for active in list(self.active):
                    usage = active.child.poll()
                    if usage is not None:
                        self.active.remove(active)
                        active.job.ended(usage)
                        active.lock.give_back()
                time.sleep(LOOK if self.active else 0)
            except KeyboardInterrupt:  # asked twice
                end = 0.0
            if time.monotonic() > end:
                for active in self.active:
                    active.child.kill()


def _names(runs: Sequence[Run]) -> str:
    more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
    return ", ".join(run.name for run in runs[:NAMED]) + more


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
