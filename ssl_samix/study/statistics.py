"""Means and differences over seeds. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A mean over runs.

    Attributes:
        mean: Over the runs.
        deviation: Standard deviation of the sample (n - 1); None of one run.
        count: Runs.
    """

    mean: float
    deviation: float | None
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Return the mean of at least one value, and how they scatter."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Difference:
    """A mean difference of runs with the same seeds.

    Attributes:
        mean: Over the seeds that both have.
        half_width: Of its confidence interval; None of one seed.
        count: Seeds.
    """

    mean: float
    half_width: float | None
    count: int


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Difference | None:
    """Compare values by seed: the mean difference and its interval by Student's t.

    Args:
        ours: Values by seed.
        theirs: Likewise; seeds that only one of both has do not count.

    Returns:
        None if no seed is in both.
    """
    gaps = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not gaps:
        return None
    if len(gaps) == 1:
        return Difference(gaps[0], None, 1)
    quantile = float(stdtrit(len(gaps) - 1, (1 + CONFIDENCE) / 2))
    return Difference(fmean(gaps), quantile * stdev(gaps) / math.sqrt(len(gaps)), len(gaps))
