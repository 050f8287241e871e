"""``samix study``: all runs of a study file and their table. Does not import torch."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from ssl_samix.config.compose import check, groups, parse, quote_paths
from ssl_samix.data.layout import check_layout
from ssl_samix.errors import ConfigError, Interrupted, UserError, check_choice, nearest
from ssl_samix.files import expanded
from ssl_samix.reporting.study_costs import Costs
from ssl_samix.reporting.study_jobs import BUSY, Job, RunJob, locked, log_excerpt
from ssl_samix.reporting.study_plan import Run, RunKey, Study, read_study
from ssl_samix.reporting.study_table import Row, add_row, lock_of, read_table, write_report

if TYPE_CHECKING:
    from submitit import Job as Started

CHANGED = ("workers", "launcher", "out", "csv")  # keys that the command line may override
MODES = ("list", "report")  # done instead of the runs
FAILURES_SHOWN = 5  # failures repeated at the end
NAMES_SHOWN = 3  # names of runs in a sentence
POLL_SECONDS = 0.2  # between checks of jobs
BUSY_SECONDS = 2.0  # between checks of runs that other processes work on
ENDLESS, DAY = 10**7, 24 * 60  # minutes
MAX_TIMEOUTS = 20  # how often a run is requeued after a cluster's time limit
HELP = """samix study: a table of runs from one file, trained, measured and put together.

Usage: samix study <study.yaml> [key=value]...

The file names methods, policies, seeds and how long runs are; every run is a samix pretrain (or
supervised) of its own in a folder of its own, measured by samix knn and linear. To resume an
interrupted study, repeat the command: runs that have a row in the table are done. It may be started
several times: no run is done twice. Beside the table: the report (.md), pictures (.png).

Keys and their current values:

list: false     # print the runs with their commands, and what is done, instead
report: false   # write the report of what is done, instead
workers: null   # runs at the same time, one thread each; null: the file's
launcher: null  # local: on this machine | slurm: a job per run; null: the file's
slurm.partition: null  # and so on: what a job gets, over the file's
out: null       # folder of the runs; null: the file's
csv: null       # the table; null: the file's

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
workers: auto               # auto: one per processor core; with slurm: all
launcher: local             # local | slurm
slurm: {timeout_min: 1440, cpus_per_task: 4, gpus_per_node: 1, partition: gpu}
reference: none             # the policy that others are compared with
out: runs/studies/<name>    # folder of the runs
csv: <out>/<name>.csv       # the table

More in docs/studies.md, with studies to start from in benchmarks/studies/.
"""


class StudyRequest(NamedTuple):
    """A checked ``samix study`` command."""

    study: Study
    listing: bool  # only print the runs
    reporting: bool  # only write the report


def main(words: list[str]) -> str:
    """Execute, list or report the runs of a study, and return the text to print.

    Args:
        words: Command-line arguments: the study file and ``key=value``.

    Raises:
        UserError: For an error in the study file, the arguments or the table.
        Interrupted: If the study was stopped; all of its jobs have ended by then.
        SystemExit: With status 1 if a run failed.
    """
    if {"-h", "--help"} & set(words):
        return HELP.rstrip()
    request = parse_study(words)
    study = request.study
    report = str(study.csv.with_suffix(".md"))
    if request.reporting:
        _report(study)
        return report
    _check(study, study.runs() if request.listing else _left(study))
    if request.listing:
        return list_runs(study)
    with _sigterm_as_interrupt():
        try:
            failures = _do(study)
        except KeyboardInterrupt as interrupt:
            done, again = len(study.runs()) - len(_left(study)), shlex.join(words)
            raise Interrupted(
                f"interrupted with {done} of {len(study.runs())} runs done; to resume, repeat: "
                f"samix study {again}"
            ) from interrupt
    if failures:
        some = failures[:FAILURES_SHOWN] + ["..."] * (len(failures) > FAILURES_SHOWN)
        print(f"samix: {len(failures)} runs failed:", *some, sep="\n  ", file=sys.stderr)
        sys.exit(1)
    return report


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse_study(words: Sequence[str]) -> StudyRequest:
    """Parse the arguments and read the study file.

    Raises:
        ConfigError: For the first error.
    """
    paths, further = [], []
    own: dict[str, Any] = {}
    slurm: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or (Path(word).exists() and key not in (*CHANGED, *MODES)):
            paths.append(word)
        elif key in (*CHANGED, *MODES):
            own[key] = int(value) if value.isdigit() and key == "workers" else value
        elif key.startswith("slurm."):
            slurm[key.removeprefix("slurm.")] = int(value) if value.isdigit() else value
        elif "." in key or key in groups():
            further.append(word)
        else:
            raise ConfigError(nearest(key, [*CHANGED, *MODES, *groups()], "key"))
    if len(paths) != 1 or paths[0].startswith("-"):
        raise ConfigError("study needs one file: samix study <study.yaml> [key=value]...")
    for key in MODES:
        check_choice(key, own.get(key, "false"), ("true", "false"))
    changed = {key: own[key] for key in CHANGED if own.get(key, "null") != "null"}
    study = read_study(expanded(paths[0]), further, slurm=slurm, **changed)
    return StudyRequest(study, own.get("list") == "true", own.get("report") == "true")


def _left(study: Study) -> list[Run]:
    done = read_table(study)
    return [run for run in study.runs() if run.key not in done]


def _check(study: Study, runs: Sequence[Run]) -> None:
    """Check the arguments and data of all runs before any run starts.

    Every method and every policy is composed once, rather than every pair, because composing is
    slow. An error that only one pair has is reported by its run within seconds.

    Raises:
        UserError: For the first error.
    """
    checked: set[tuple[str, str]] = set()
    for run in runs:
        names = {("method", run.method), ("policy", run.policy)}
        if names <= checked:
            continue
        checked |= names
        words = quote_paths(run.words)
        several = [o for o in parse(words) if o.is_sweep_override()]
        if several:
            raise ConfigError(f"{several[0].input_line} has several values: name each as one")
        try:
            [config] = check(study.command, words)
        except UserError as error:
            raise ConfigError(f"{run.method} with {run.policy}: {error}") from error
        check_layout(config.data.name, config.data.root, config.data.download)


def list_runs(study: Study) -> str:
    """Return one line per run: whether it is done, and its commands."""
    done, costs, lines = read_table(study), Costs(study), []
    for run in study.runs():
        if run.key in done:
            lines.append(f"done  {run.name}")
            continue
        lines.append(f"{'begun' if study.folder(run).exists() else '     '} {run.name}")
        training = study.training(run, costs.epochs(run) or "<measured>")
        for words in (training, *(study.measuring(run, name) for name in study.evaluate)):
            lines.append(f"      samix {shlex.join(words)}")
    count = sum(run.key in done for run in study.runs())
    return "\n".join([*lines, f"{count} of {len(study.runs())} done"])


def _report(study: Study) -> None:
    with lock_of(study):
        write_report(study, list(read_table(study).values()))


def _tell(sentence: str) -> None:
    print(sentence, flush=True)


def _do(study: Study) -> list[str]:
    """Execute the remaining runs, print each finished one, and return a message per failure."""
    try:
        study.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {study.logs}: {error.strerror or error}") from error
    failures = []
    if left := _left(study):
        workers, runs = min(study.workers, len(left)), len(study.runs())
        _tell(f"{len(left)} of {runs} runs left, {workers} at a time, {study.out}")
        with Launcher(study) as launcher:
            costs = Costs(study)
            costs.measure(launcher.do, _tell)
            failures = Schedule(study, costs, launcher).run()
    _report(study)
    return failures


class Launcher:
    """Context manager that starts jobs by submitit, on this machine or on a cluster.

    Args:
        study: Names the launcher and its resources.

    Raises:
        ConfigError: If the study needs SLURM, but this machine does not have it.
    """

    def __init__(self, study: Study) -> None:
        from submitit import AutoExecutor

        self.study, self.local = study, study.launcher == "local"
        if not (self.local or (shutil.which("sbatch") and shutil.which("srun"))):
            raise ConfigError(
                "launcher=slurm needs SLURM's sbatch and srun, which are not on this machine"
            )
        start = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.folder = study.logs / "jobs" / start
        # A folder per start: local job numbers are process numbers, which are reused.
        self.executor = AutoExecutor(
            self.folder, study.launcher, slurm_max_num_timeout=MAX_TIMEOUTS
        )
        self.executor.update_parameters(
            name="samix-study",
            stderr_to_stdout=True,
            timeout_min=ENDLESS if self.local else DAY,
            **{f"slurm_{key}": value for key, value in study.slurm.items()},
        )
        self.active: list[Started] = []

    def __enter__(self) -> Launcher:
        """Lock a file; the lock shows local jobs that their study is running."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._alive = (self.folder / "alive").open("ab")
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the remaining jobs, and wait for those on this machine."""
        self._alive.close()
        for started in self.active:
            if not self.local:
                started.cancel(check=False)
                continue
            while not started.done():
                time.sleep(POLL_SECONDS)
            self._remove_files(started)
        (self.folder / "alive").unlink(missing_ok=True)
        with suppress(OSError):  # logs of jobs that crashed are kept
            self.folder.rmdir()

    def start(self, job: Job) -> Started:
        """Start or queue a job, and return its handle.

        Raises:
            UserError: If the cluster rejects the job.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError
        from submitit.helpers import environment_variables

        package = str(Path(__file__).resolve().parents[2])  # importable from any folder
        paths = filter(None, [package, os.environ.get("PYTHONPATH")])
        own = {"PYTHONPATH": os.pathsep.join(paths)}
        if self.local:
            own["OMP_NUM_THREADS"] = "1"
            job.alive = self.folder / "alive"
        # Only the study handles Ctrl-C and a closed terminal; it stops its jobs.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            with environment_variables(**own):
                self.active.append(self.executor.submit(job))
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"sbatch failed: {' '.join(str(error).split())}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return self.active[-1]

    def do(self, job: Job) -> Any:
        """Start a job, wait for it, and return its outcome."""
        started = self.start(job)
        while not started.done():
            time.sleep(POLL_SECONDS)
        return self.outcome(started)

    def outcome(self, started: Started) -> Any:
        """Return the result of a finished job, or an error message if the job crashed."""
        self.active.remove(started)
        log = started.paths.stdout
        if started.exception() is not None:
            return f"{log_excerpt(log)}; its log is {log}"
        result = started.result()
        self._remove_files(started)
        return result

    def _remove_files(self, started: Started) -> None:
        links = self.folder.glob(".submission_file_*")  # submitit's links to the files of the job
        for path in [*self.folder.glob(f"{started.job_id}_*"), *links]:
            if not path.is_symlink() or path.resolve().name.startswith(f"{started.job_id}_"):
                path.unlink()


class Schedule:
    """Executes runs, several at a time; other processes may execute the same study.

    Args:
        study: The study.
        costs: Gives the number of epochs of a run.
        launcher: Starts jobs.
    """

    def __init__(self, study: Study, costs: Costs, launcher: Launcher) -> None:
        self.study, self.costs, self.launcher = study, costs, launcher
        self.jobs: dict[Started, RunJob] = {}
        self.failures: dict[RunKey, str] = {}

    def run(self) -> list[str]:
        """Execute all runs that have no row in the table.

        Returns:
            A message for each run that failed.

        Raises:
            UserError: If the table cannot be read or written, or a job cannot be started.
        """
        waiting, next_look, announced = self._waiting(), 0.0, False
        while waiting or self.jobs:
            if len(self.jobs) < self.study.workers and time.monotonic() >= next_look:
                self._fill(self._waiting())
                waiting, next_look = self._waiting(), time.monotonic() + BUSY_SECONDS
                if waiting and not (self.jobs or announced):
                    names = [run.name for run in waiting[:NAMES_SHOWN]]
                    names += ["..."] * (len(waiting) > NAMES_SHOWN)
                    _tell(f"waiting for other processes: {', '.join(names)}")
                    announced = True
            time.sleep(POLL_SECONDS)
            for started in [started for started in self.jobs if started.done()]:
                self._ended(self.jobs.pop(started), self.launcher.outcome(started))
                waiting, next_look = self._waiting(), 0.0
        return list(self.failures.values())

    def _waiting(self) -> list[Run]:
        taken = {*self.failures, *(job.run.key for job in self.jobs.values())}
        return [run for run in _left(self.study) if run.key not in taken]

    def _fill(self, waiting: Sequence[Run]) -> None:
        """Start runs while workers are free, except those that other processes work on."""
        for run in waiting:
            if len(self.jobs) < self.study.workers:
                job = RunJob(self.study, run, self._epochs(run))
                with locked(job.lock) as descriptor:
                    busy = descriptor is None
                if not busy:
                    self._next(job)

    def _epochs(self, run: Run) -> int:
        epochs = self.costs.epochs(run)
        assert epochs is not None, "costs are measured before the first run"
        return epochs

    def _next(self, job: RunJob) -> None:
        """Start a run, or write its row if it is done."""
        try:
            done = job.next_words(job.notes()) is None
            row = job.row() if done else {}
        except UserError as error:
            self._failed(job.run, str(error))
            return
        if not done:
            self.jobs[self.launcher.start(job)] = job
            return
        with lock_of(self.study):
            rows = add_row(self.study, row)
            write_report(self.study, list(rows.values()))
        runs = self.study.runs()
        waiting = [(run, self._epochs(run)) for run in runs if run.key not in rows]
        rest = ""
        if waiting:
            seconds = seconds_left(rows, waiting) / min(self.study.workers, len(waiting))
            rest = f"; {len(waiting)} left, about {duration(seconds)}"
        place = f"[{len(runs) - len(waiting)}/{len(runs)}]"
        _tell(f"{place} {job.run.name}: {result(row)}{rest}")

    def _ended(self, job: RunJob, outcome: str | None) -> None:
        if outcome is None:
            self._next(job)
        elif outcome != BUSY:
            self._failed(job.run, outcome)

    def _failed(self, run: Run, reason: str) -> None:
        self.failures[run.key] = f"{run.name} failed: {reason}"
        _tell(self.failures[run.key])


def seconds_left(rows: dict[RunKey, Row], waiting: Sequence[tuple[Run, int]]) -> float:
    """Return the estimated sequential duration in seconds of the waiting runs.

    The time per epoch is the mean over the finished runs with the same method and policy; if there
    are none, over those with the same policy, or over all.

    Args:
        rows: Rows of finished runs, at least one.
        waiting: Runs and their numbers of epochs.
    """
    total = 0.0
    for run, epochs in waiting:
        of_policy = [row for row in rows.values() if row["policy"] == run.policy]
        near = [row for row in of_policy if row["method"] == run.method] or of_policy
        paces = [float(row["seconds"]) / int(row["epochs"]) for row in near or rows.values()]
        total += epochs * fmean(paces)
    return total


def result(row: Row) -> str:
    """Return the results of a run as text for the screen."""
    names = {"knn_top1": "kNN", "linear_top1": "linear", "top1": "top-1"}
    found = [f"{text} {float(row[name]):.2f}%" for name, text in names.items() if row.get(name)]
    epochs = "1 epoch" if row["epochs"] == "1" else f"{row['epochs']} epochs"
    return ", ".join([*found, f"{epochs}, {float(row['cpu_seconds']):.0f} CPU s"])


def duration(seconds: float) -> str:
    """Return a duration as text, in hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
