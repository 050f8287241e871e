"""Two optimizers that step as one: the encoder's, and the Mixer's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ssl_samix.errors import check_choice, check_range

SHARED = "encoder"
# The Mixer has 20,000 weights and no scale of its own in common with the encoder. Adam's second
# moment decays fast because the teacher whose features it reads changes all the time.
OWN: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}),
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.99), "fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.0, "fused": True}),
}
CHOICES = (SHARED, *OWN)
FINAL = 0.01  # share of the Mixer's learning rate that is left at the end of its cosine


class MixerOptimizer:
    """How the Mixer is optimised.

    Args:
        name: ``adamw`` or ``adam`` (no weight decay), ``sgd`` (no momentum, as OpenMixup has it):
            the Mixer's own, without warm-up, with a cosine down to a hundredth; or ``encoder``: the
            encoder's optimizer and schedule.
        lr: Learning rate; with ``encoder``, a factor on the encoder's.

    Raises:
        ConfigError: For an unknown name, or a rate that is not positive.
    """

    def __init__(self, name: str = SHARED, lr: float = 1.0) -> None:
        check_choice("mixup.optimizer", name, CHOICES)
        check_range("mixup.lr", lr, 1e-8)
        self.name, self.lr = name, lr

    @property
    def shared(self) -> bool:
        """Whether the encoder's optimizer has the Mixer, too."""
        return self.name == SHARED

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the Mixer's own optimizer for these groups of parameters."""
        kind, settings = OWN[self.name]
        return kind(groups, lr=self.lr, **settings)  # type: ignore[call-arg]


class JointOptimizer(Optimizer):
    """Steps several optimizers, each with parameters of its own, as if they were one.

    Groups and state are theirs, in their order: schedules, gradient scalers, clipping and
    checkpoints see one optimizer.

    Args:
        parts: The optimizers; they have not stepped yet.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share()

    def _share(self) -> None:
        """Let the parts have the very groups and the very state that this one has."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, for the parts as well."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each part; ``closure`` is called once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
