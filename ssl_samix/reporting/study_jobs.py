"""A job of a study, on this machine or on a cluster node. Does not import torch.

submitit runs each job in a separate process. The job starts the ``samix`` commands of one run as
child processes, so that each is measured separately.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ssl_samix.artifacts.run_folder import RunFolder, read_metrics
from ssl_samix.errors import CheckpointError, UserError
from ssl_samix.files import write_atomically
from ssl_samix.reporting.study_plan import COMMANDS, Run, Study, differing_words
from ssl_samix.reporting.study_table import KEY, MIXER, Row

BUSY = "another process works on it"
LOG_EXCERPT_CHARS = 300
PATIENCE = 120.0  # seconds that a command has to end after SIGTERM
ALIVE_SECONDS = 0.5  # between checks whether the study's process is running
PR_SET_PDEATHSIG = 1  # constant of Linux's prctl
MAXRSS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


class Job:
    """A callable for submitit that runs ``work``; a local job ends when its study ends."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.alive: Path | None = None  # locked by the study's process; None on a cluster
        self.gpus = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit's local executor sets it

    def work(self) -> Any:
        """Return the outcome, or an error message if the job failed."""
        raise NotImplementedError

    def __call__(self) -> Any:
        """Return the result of ``work``, or an error message after SIGTERM or a ``UserError``."""
        signal.signal(signal.SIGTERM, _interrupt)
        if self.alive is not None:
            signal.signal(signal.SIGALRM, self._check_alive)
            signal.setitimer(signal.ITIMER_REAL, ALIVE_SECONDS, ALIVE_SECONDS)
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if self.gpus is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        try:
            return self.work()
        except KeyboardInterrupt:
            return "interrupted"
        except UserError as error:
            return str(error)

    def _check_alive(self, *_: object) -> None:
        assert self.alive is not None
        with locked(self.alive) as descriptor:
            if descriptor is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise KeyboardInterrupt


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """Lock a file; yield its descriptor, or None if another process holds it.

    The lock is released when the last process that has the descriptor ends for any reason.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


@dataclass
class Notes:
    """The state of a run between two starts, stored in a JSON file."""

    epochs: int | None = None  # number of epochs at the first start
    trained: bool = False
    settings: str | None = None  # of the training; None in notes of earlier versions
    # One per start: the epochs before it ("before"), and what it used, if its end was recorded.
    parts: list[dict[str, Any]] = field(default_factory=list)


class RunJob(Job):
    """Trains and measures one run.

    Args:
        study: The study.
        run: The run.
        epochs: Number of epochs for a run that has not started; a started run keeps its own.
    """

    def __init__(self, study: Study, run: Run, epochs: int) -> None:
        super().__init__(study)
        self.run, self.epochs = run, epochs
        self.folder = RunFolder(study.folder(run))
        files = (study.logs / f"{run.name}.{ending}" for ending in ("log", "json", "lock"))
        self.log, self.notes_path, self.lock = files
        self._process: subprocess.Popen[bytes] | None = None

    def work(self) -> str | None:
        """Finish the run; return why it failed, ``BUSY``, or None if it is done."""
        with locked(self.lock) as descriptor:
            if descriptor is None:
                return BUSY
            notes = self.notes()
            while (words := self.next_words(notes)) is not None:
                heard = self.log.stat().st_size if self.log.exists() else 0
                status = self._command(words, notes, descriptor)
                if status:
                    how = f"exit status {status}" if status > 0 else f"signal {-status}"
                    return f"{log_excerpt(self.log, heard)} ({how}); its log is {self.log}"
        return None

    def checkpoint(self) -> Any:
        """Stop when the cluster preempts the job; submitit requeues the returned job."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            # This signal interrupted Popen.wait, which holds a lock of Popen.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(RunJob(self.study, self.run, self.epochs))

    def notes(self) -> Notes:
        """Return the stored state of the run.

        Raises:
            UserError: If it is damaged, or the run was trained with other arguments.
        """
        notes = Notes()
        if self.notes_path.exists():
            try:
                notes = Notes(**json.loads(self.notes_path.read_text("utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(
                    f"{self.notes_path} is damaged: remove it and the run's folder"
                ) from error
        if not self.folder.last.exists():  # the run starts anew
            notes = replace(notes, trained=False, epochs=None, settings=None)
        if notes.settings not in (None, self.run.settings):
            changed = differing_words(self.run.settings, notes.settings)
            raise UserError(
                f"{self.folder.path} was trained with other words ({changed}): rename what was "
                "changed, or remove the folder"
            )
        return notes

    def next_words(self, notes: Notes) -> list[str] | None:
        """Return the arguments of the next ``samix`` command, or None if the run is done."""
        if not notes.trained:
            return self.study.training(self.run, notes.epochs or self.epochs)
        for protocol in self.study.evaluate:
            if not self.study.results(self.run, protocol).exists():
                return self.study.measuring(self.run, protocol)
        return None

    def _command(self, words: list[str], notes: Notes, lock: int) -> int:
        """Run a command, record the resources of training, and return the exit status."""
        training = words[0] in COMMANDS
        if training:
            notes.epochs = notes.epochs or self.epochs
            notes.settings = self.run.settings
            notes.parts.append({"before": len(read_metrics(self.folder.metrics))})
            self._write(notes)
        begin, before = time.monotonic(), _cpu_seconds()
        with self.log.open("ab") as file:
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "ssl_samix", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=command_environment(),
                pass_fds=[lock],
                start_new_session=True,  # the cluster's signals reach this process only
                # This process has one thread, so no lock can be held across the fork.
                preexec_fn=_end_with_parent  # noqa: PLW1509
                if sys.platform == "linux"
                else None,
            )
        try:
            return process.wait()
        finally:
            _end(process)
            if training:
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
                notes.parts[-1] |= {
                    "seconds": time.monotonic() - begin,
                    "cpu_seconds": _cpu_seconds() - before,
                    "peak_mib": peak / MAXRSS_PER_MIB,
                    "processor": processor(),
                }
                notes.trained = process.returncode == 0
                self._write(notes)

    def _write(self, notes: Notes) -> None:
        text = json.dumps(asdict(notes))
        write_atomically(self.notes_path, lambda temporary: temporary.write_text(text))

    def row(self) -> Row:
        """Return the row of a run that is done.

        Raises:
            UserError: If its folder has no logged epochs, or a file is damaged.
        """
        notes, epochs = self.notes(), read_metrics(self.folder.metrics)
        if not epochs:
            raise CheckpointError(f"{self.folder.metrics} has no epochs: remove {self.folder.path}")
        images = sum(float(e["images_per_second"]) * float(e["seconds"]) for e in epochs)
        steps = [0, *(int(epoch["step"]) for epoch in epochs)]
        costs = [
            1000 * float(epoch["cpu_seconds"]) / max(1, end - begin)
            for epoch, (begin, end) in zip(epochs, pairwise(steps), strict=True)
        ]
        row = {
            **dict(zip(KEY, self.run.key, strict=True)),
            "epochs": str(int(epochs[-1]["epoch"]) + 1),
            "steps": epochs[-1]["step"],
            "images": f"{images:.0f}",
            "seconds": f"{_spent(notes, epochs, 'seconds'):.1f}",
            "cpu_seconds": f"{_spent(notes, epochs, 'cpu_seconds'):.1f}",
            "peak_mib": f"{max(part.get('peak_mib', 0) for part in notes.parts):.0f}",
            "cpu_ms_per_step": f"{median(costs):.2f}",
            "processor": notes.parts[-1].get("processor", processor()),
            "precision": self._precision(),
            "settings": self.run.settings,
        }
        newest = {**MIXER, **({"top1": "val/top1"} if self.study.command == "supervised" else {})}
        for name, column in newest.items():
            values = [epoch[column] for epoch in epochs if epoch.get(column)]
            row[name] = f"{float(values[-1]):.5g}" if values else ""
        for protocol in self.study.evaluate:
            row |= _accuracies(self.study.results(self.run, protocol))
        return row

    def _precision(self) -> str:
        """Return the precision of the last start; empty for a run of an earlier version."""
        try:
            starts = json.loads(self.folder.environment.read_text("utf-8"))
            return str(starts[-1]["precision"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""


def command_environment() -> dict[str, str]:
    """Return the environment without SLURM variables, which Lightning would act on."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


def _cpu_seconds() -> float:
    """Return the user and system CPU time in seconds of ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _spent(notes: Notes, epochs: list[dict[str, str]], name: str) -> float:
    """Return a sum over all starts; killed starts are charged for the epochs they logged."""
    parts, total = notes.parts, 0.0
    ends = [*(int(part["before"]) for part in parts[1:]), len(epochs)]
    for part, end in zip(parts, ends, strict=True):
        own = epochs[int(part["before"]) : end]
        total += part[name] if name in part else sum(float(epoch[name]) for epoch in own)
    return total


def _accuracies(path: Path) -> Row:
    """Return the accuracies of a protocol and, for kNN, the chosen setting.

    Raises:
        UserError: If the results file is damaged.
    """
    try:
        results: dict[str, Any] = {
            found["variant"]: found for found in json.loads(path.read_text("utf-8"))["results"]
        }
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove its folder") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process if it is still running, and wait for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Make Linux send SIGTERM to this process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def log_excerpt(log: Path, heard: int = 0) -> str:
    """Return the error message in a log: the last message of samix, else the last line.

    Args:
        log: Path of the log; it may not exist.
        heard: Number of bytes at the beginning to skip.
    """
    text = log.read_bytes()[heard:] if log.exists() else b""
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("samix: ") for line in lines if line.startswith("samix: ")]
    return ((own or lines)[-1:] or ["it printed nothing"])[0][:LOG_EXCERPT_CHARS]


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name; times are comparable only on the same processor.

    Args:
        cpuinfo: Linux's description. Virtual machines often hide all but the vendor and the family
            and model numbers, so these are part of the name.
    """
    found: dict[str, str] = {}
    if cpuinfo.exists():  # Linux
        lines = [line.partition(":") for line in cpuinfo.read_text("utf-8").splitlines()]
        found = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = {"model name", "cpu family", "model"} <= found.keys()
    return f"{name} ({found['cpu family']}.{found['model']})" if numbers else name
