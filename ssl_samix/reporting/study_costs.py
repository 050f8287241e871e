"""Number of epochs of a method and policy that fit a CPU-time budget. Does not import torch.

The cost of a step is measured before the first run. All policies of a method take turns in one
process, so that a disturbance slows all of them equally: a policy's cost is the reference's cost
times the median ratio over the rounds. The costs are stored in a table beside the study's own, so
that a resumed study, here or on another machine, keeps its numbers of epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from filelock import FileLock, Timeout

from ssl_samix.artifacts.results import read_rows, write_rows
from ssl_samix.errors import UserError
from ssl_samix.reporting.study_jobs import Job, processor
from ssl_samix.reporting.study_plan import Run, Study, settings_of
from ssl_samix.reporting.study_table import Row, lock_of

COLUMNS = (
    "method", "policy", "cpu_ms_per_step", "ratio", "steps_per_epoch", "rounds", "processor",
    "settings",
)  # fmt: skip


class CostJob(Job):
    """Measures the cost of training steps for the arguments of each configuration."""

    def __init__(self, study: Study, words: Sequence[Sequence[str]]) -> None:
        super().__init__(study)
        self.words = words

    def work(self) -> dict[str, Any]:
        """Return the result of ``measured``, and the processor name."""
        from ssl_samix.reporting.study_measure import measured

        return {**measured(self.study.command, self.words), "processor": processor()}


class Costs:
    """The cost of a step, by method and policy.

    Args:
        study: The study.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.path = study.csv.with_name(f"{study.csv.stem}.costs.csv")

    def read(self) -> dict[tuple[str, str], Row]:
        """Return the costs that were measured with the current arguments of the study.

        Raises:
            UserError: If the table cannot be read or is damaged.
        """
        rows = read_rows(self.path)
        if any(row.get(name) is None for row in rows for name in COLUMNS):
            raise UserError(f"{self.path} is damaged: remove it to have costs measured again")
        study = self.study
        return {
            (row["method"], row["policy"]): row
            for row in rows
            if row["method"] in study.methods
            and row["policy"] in study.policies
            and row["settings"] == settings_of(study.words(row["method"], row["policy"]))
        }

    def epochs(self, run: Run) -> int | None:
        """Return the epochs that fit a run's length, at least 1; None if costs are unknown."""
        if run.length.kind == "epochs":
            return run.length.amount
        row = self.read().get((run.method, run.policy))
        if row is None:
            return None
        epoch = float(row["cpu_ms_per_step"]) / 1000 * int(row["steps_per_epoch"])
        return max(1, int(run.length.amount / epoch))

    def measure(self, do: Callable[[CostJob], Any], tell: Callable[[str], None]) -> None:
        """Measure the missing costs, if run lengths are CPU seconds.

        Args:
            do: Executes a job and returns its outcome.
            tell: Prints a message.

        Raises:
            UserError: If the measurement fails.
        """
        if self.study.lengths[0].kind != "cpu_seconds":
            return
        # One process measures while others wait; the lock of the table stays free meanwhile.
        lock = FileLock(self.study.logs / "costs.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell("waiting for another process that measures what steps cost")
            lock.acquire(poll_interval=2)
        try:
            for method in self.study.methods:
                known = self.read()
                missing = [p for p in self.study.policies if (method, p) not in known]
                if missing:
                    tell(f"measuring what a step of {method} costs with {', '.join(missing)}")
                    names = list(dict.fromkeys([self.study.reference, *missing]))
                    words = [self.study.words(method, name) for name in names]
                    found = do(CostJob(self.study, words))
                    if isinstance(found, str):
                        raise UserError(f"cannot measure what a step of {method} costs: {found}")
                    self._note(method, names, found)
        finally:
            lock.release()

    def _note(self, method: str, names: list[str], found: dict[str, Any]) -> None:
        """Add costs to the table; a known cost of the reference is kept."""
        rounds = found["cpu_seconds_per_step"]  # (rounds, names)
        known = self.read().get((method, names[0]))
        unit = float(known["cpu_ms_per_step"]) if known else 1000 * median(r[0] for r in rounds)
        new = {}
        for i, name in enumerate(names):
            ratio = median(times[i] / times[0] for times in rounds)
            new[method, name] = {
                "method": method,
                "policy": name,
                "cpu_ms_per_step": f"{unit * ratio:.2f}",
                "ratio": f"{ratio:.3f}",
                "steps_per_epoch": str(found["steps_per_epoch"][i]),
                "rounds": str(len(rounds)),
                "processor": found["processor"],
                "settings": settings_of(self.study.words(method, name)),
            }
        if known:
            del new[method, names[0]]
        with lock_of(self.study):
            old = {(row["method"], row["policy"]): row for row in read_rows(self.path)}
            write_rows(self.path, COLUMNS, list({**old, **new}.values()))
