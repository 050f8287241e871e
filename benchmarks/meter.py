"""Measure the steps of one side: seconds, FLOPs and memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from common import MIB, seconds
from lightly_examples import LightlySide
from our_step import OurSide
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Views = tuple[Tensor, ...]


class Meter:
    """Runs one side, and records time, FLOPs and memory.

    Args:
        make: Creates the side, so that its allocations can be measured.
        device: ``cpu`` or ``cuda``.
        period: Steps of a round.
        compiled: Mode of ``torch.compile`` for our side: ``default`` or ``reduce-overhead``;
            ``no``: not compiled, as lightly's side always.
    """

    def __init__(
        self,
        make: Callable[[], LightlySide | OurSide],
        device: str,
        period: int,
        compiled: str = "no",
    ) -> None:
        self.device, self.period, self.compiled = device, period, compiled
        before = self._allocated()
        self.side = make()
        self.held = self._allocated() - before  # bytes of the other sides, which do not count
        self.seconds: list[float] = []  # of a mean step of each round
        self.peak = 0  # bytes, without the views
        self.flops = 0.0

    def warm_up(self, views: Views) -> None:
        """Run the warm-up steps, and count their FLOPs."""
        before = self._allocated()
        with FlopCounterMode(display=False) as counter:
            self._period(views)
        self.flops = counter.get_total_flops() / self.period
        if self.compiled != "no" and isinstance(self.side, OurSide):
            # After counting, which cannot see operations inside compiled code.
            self.side.model.compile_passes(mode=self.compiled)
            self._period(views)
        self.held += self._allocated() - before

    def run(self, views: Views) -> None:
        """Run a period of steps."""
        before = self._allocated()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.seconds.append(seconds(lambda: self._period(views), self.device) / self.period)
        if self.device == "cuda":
            own = torch.cuda.max_memory_allocated() - before + self.held
            self.peak = max(self.peak, own)
        self.held += self._allocated() - before

    def _period(self, views: Views) -> None:
        for _ in range(self.period):
            self.side.step(views)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0


def resident(script: str, words: Sequence[str]) -> float:
    """Return the MiB that a script prints, run in a separate process."""
    command = [sys.executable, script, *words]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def largest_resident() -> float:
    """Return the largest resident size of this process so far, in MiB."""
    unit = MIB if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
