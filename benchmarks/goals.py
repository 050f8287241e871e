"""Performance targets of this package, and a table of whether they are met."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common import print_table

COLUMNS = ("what", "target", "measured", "met")
NOT_MEASURED = "not measured"
NAMES = {"moco": "MoCo", "simclr": "SimCLR", "byol": "BYOL"}


@dataclass(frozen=True)
class Goal:
    """A target: an upper or lower bound of a measurement.

    Attributes:
        what: What is measured.
        bound: The target.
        least: Whether the target is a lower bound; else an upper bound.
        unit: Unit of both.
    """

    what: str
    bound: float
    least: bool
    unit: str = ""

    def row(self, measured: float | None = None) -> list[str]:
        """Return the cells of ``COLUMNS``."""
        target = f"{'>=' if self.least else '<='} {self.bound:g}{self.unit}"
        if measured is None or math.isnan(measured):
            return [self.what, target, NOT_MEASURED, ""]
        met = measured >= self.bound if self.least else measured <= self.bound
        return [self.what, target, f"{measured:.2f}{self.unit}", "yes" if met else "no"]


def _goals() -> dict[str, Goal]:
    goals = {}
    for name, bound in (("moco", 2.5), ("simclr", 2.2), ("byol", 2.3)):
        goals[f"step {name}"] = Goal(f"{NAMES[name]} step: lightly / ours", bound, True, "x")
    goals["epoch cpu"] = Goal("epoch with views, CPU: lightly / ours", 2.5, True, "x")
    goals["epoch cuda"] = Goal("epoch with views, GPU: lightly / ours", 5, True, "x")
    for name, bound in (("moco", 1.9), ("simclr", 1.6), ("byol", 1.45)):
        goals[f"samix {name}"] = Goal(f"{NAMES[name]} + SAMix: step / plain step", bound, False)
    for name, label in NAMES.items():
        what = f"{label} + SAMix: step ratio / FLOP ratio"
        goals[f"flops {name}"] = Goal(what, 1.05, False)
    goals["wait"] = Goal("share of an epoch spent waiting for data", 5, False, "%")
    goals["monitor"] = Goal("kNN monitor: share of the training time", 5, False, "%")
    goals["heads"] = Goal("24 heads, 50k x 512 features, 10 classes", 15, False, " s")
    goals["cifar"] = Goal("CIFAR-10 to 91.0% kNN on one GPU", 20, False, " min")
    return goals


GOALS = _goals()


def print_goals(measured: Mapping[str, float]) -> None:
    """Print target, measured value and whether it is met; ``measured`` is keyed as ``GOALS``."""
    if measured:
        print()
        print_table(COLUMNS, [GOALS[key].row(value) for key, value in measured.items()])
