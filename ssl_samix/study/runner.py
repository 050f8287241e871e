"""Does the runs of a study, several at a time, beside other processes that do the same."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssl_samix.errors import UserError
from ssl_samix.study.children import Child, Process, RunLock
from ssl_samix.study.job import Job
from ssl_samix.study.plan import Run, Study
from ssl_samix.study.table import Row, add_row, lock_of, read_table

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
