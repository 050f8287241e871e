"""What the passes of one step gave, so that nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Passed:
    """What one pass over (B, 3, S, S) images gave."""

    embedding: Tensor  # (B, D) of the projector
    query: Tensor | None = None  # (B, D) of the predictor, or the embedding where there is none
    maps: Tensor | None = None  # (B, C, h, w) of the stage that mixing reads, no gradient


class StepMemory:
    """Remembers passes by branch and images while a step lasts; outside of one it forgets at once.

    Images are compared by identity: the same tensor, not an equal one.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor, Passed]] | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Remember until the step is over."""
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    def find(self, branch: str, images: Tensor) -> Passed | None:
        """Return what ``branch`` gave for these images in this step."""
        for name, seen, passed in self._kept or ():
            if name == branch and seen is images:
                return passed
        return None

    def once(self, branch: str, images: Tensor, compute: Callable[[], Passed]) -> Passed:
        """Return what ``branch`` gave for these images, or compute it now."""
        passed = self.find(branch, images)
        if passed is None:
            passed = compute()
            if self._kept is not None:
                self._kept.append((branch, images, passed))
        return passed
