"""How many epochs of a method with a policy fit a budget of processor time. Imports no torch.

What a step costs is measured before the first run, all policies of a method by turns in one
process, so that whatever else the machine does slows all of them alike: a policy's cost is the
reference's times the median ratio of the rounds. The costs are a table beside the study's own, so
that the epochs stay what they are when a study goes on elsewhere or later.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from ssl_samix.artifacts.results import read_rows
from ssl_samix.errors import UserError
from ssl_samix.reporting.study_plan import Run, Study, settings_of
from ssl_samix.reporting.study_processes import Process, RunLock, last_words, processor
from ssl_samix.reporting.study_table import Row, lock_of, write_table

COLUMNS = (
    "method", "policy", "cpu_ms_per_step", "ratio", "steps_per_epoch", "rounds", "processor",
    "settings",
)  # fmt: skip
LOOK = 0.2  # seconds between looks at the measuring process


class Costs:
    """What a step costs, by method and policy.

    Args:
        study: Whose.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.path = study.csv.with_name(f"{study.csv.stem}.costs.csv")

    def read(self) -> dict[tuple[str, str], Row]:
        """Read what has been measured with the words that the study has now.

        Raises:
            UserError: If the table cannot be read or is damaged.
        """
        rows = read_rows(self.path)
        if any(row.get(name) is None for row in rows for name in COLUMNS):
            raise UserError(f"{self.path} is damaged: remove it to have costs measured again")
        found = {(row["method"], row["policy"]): row for row in rows}
        return {
            (method, policy): row
            for (method, policy), row in found.items()
            if method in self.study.methods
            and policy in self.study.policies
            and row["settings"] == settings_of(self.study.words(method, policy))
        }

    def needed(self) -> bool:
        """Say whether lengths are of time."""
        return any(length.kind == "cpu_seconds" for length in self.study.lengths)

    def epochs(self, run: Run) -> int | None:
        """Return the epochs that fit a run's length, at least one; None before the measuring."""
        if run.length.kind == "epochs":
            return run.length.amount
        row = self.read().get((run.method, run.policy))
        if row is None:
            return None
        epoch = float(row["cpu_ms_per_step"]) / 1000 * int(row["steps_per_epoch"])
        return max(1, int(run.length.amount / epoch))

    def measure(self, tell: Callable[[str], None]) -> None:
        """Measure what is not known yet, if lengths are of time.

        Raises:
            UserError: If the measuring fails.
        """
        if not self.needed():
            return
        self.study.logs.mkdir(parents=True, exist_ok=True)
        # One process measures, others wait for it; the table's own lock stays free meanwhile.
        lock = RunLock(self.study.logs / "costs.lock")
        said = False
        while not lock.take():
            if not said:
                tell("waiting for another process that measures what steps cost")
            said = True
            time.sleep(10 * LOOK)
        try:
            for method in self.study.methods:
                known = self.read()
                missing = [p for p in self.study.policies if (method, p) not in known]
                if missing:
                    tell(f"measuring what a step of {method} costs with {', '.join(missing)}")
                    self._measure(method, missing, lock)
        finally:
            lock.give_back()

    def _measure(self, method: str, missing: list[str], lock: RunLock) -> None:
        reference = self.study.reference
        names = list(dict.fromkeys([reference, *missing]))
        answer = self.study.logs / f"costs-{method}.json"
        asked = answer.with_suffix(".asked.json")
        words = [list(self.study.words(method, name)) for name in names]
        asked.write_text(json.dumps({"command": self.study.command, "words": words}), "utf-8")
        answer.unlink(missing_ok=True)
        log = answer.with_suffix(".log")
        heard = log.stat().st_size if log.exists() else 0
        arguments = ["-m", "ssl_samix.reporting.study_measure", str(asked), str(answer)]
        child = Process(arguments, log, lock)
        try:
            while (usage := child.poll()) is None:
                time.sleep(LOOK)
        except KeyboardInterrupt:
            child.kill()
            raise
        if usage.status or not answer.exists():
            said = last_words(log, heard)
            raise UserError(f"cannot measure what a step of {method} costs: {said} ({log})")
        self._note(method, names, answer)

    def _note(self, method: str, names: list[str], answer: Path) -> None:
        found = json.loads(answer.read_text("utf-8"))
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
                "processor": processor(),
                "settings": settings_of(self.study.words(method, name)),
            }
        if known:
            del new[method, names[0]]
        with lock_of(self.study):
            old = {(row["method"], row["policy"]): row for row in read_rows(self.path)}
            write_table(self.path, COLUMNS, list({**old, **new}.values()))
