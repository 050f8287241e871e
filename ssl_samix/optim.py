"""Optimizers and learning-rate schedules of the encoder and of the Mixer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightly.utils import lars
from lightly.utils.scheduler import cosine_warmup_schedule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ssl_samix.errors import ConfigError, check_choice, check_range

MIXER = "mixing."  # parameter prefix of the mixing objective


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: encoder with weight decay, encoder without it, and Mixer.

    Weight matrices have weight decay; biases, normalisation and the Mixer have none. LARS
    also leaves groups without decay unscaled, as SimCLR and BYOL require.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    encoder = [p for name, p in trainable if not name.startswith(MIXER)]
    groups: list[dict[str, Any]] = [
        {
            "name": "encoder",
            "params": [p for p in encoder if p.ndim > 1],
            "weight_decay": weight_decay,
        },
        {"name": "no_decay", "params": [p for p in encoder if p.ndim <= 1], "weight_decay": 0.0},
        {
            "name": "mixer",
            "params": [p for name, p in trainable if name.startswith(MIXER)],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


ENCODER_OPTIMIZER = "encoder"
# The Mixer has 20,000 weights, and its gradients have another scale than the encoder's. Adam's
# second moment decays fast because the teacher whose features it reads keeps changing.
MIXER_OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}),
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.99), "fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.0, "fused": True}),
}
CHOICES = (ENCODER_OPTIMIZER, *MIXER_OPTIMIZERS)
MIXER_FINAL_LR = 0.01  # factor on the Mixer's learning rate at the end of its cosine


class MixerOptimizer:
    """Settings of the Mixer's optimizer.

    Args:
        name: ``adamw`` or ``adam`` (no weight decay) or ``sgd`` (no momentum, as in OpenMixup): a
            separate optimizer without warm-up, with a cosine decay to a hundredth; or ``encoder``:
            the encoder's optimizer and schedule.
        lr: Learning rate; with ``encoder``, a factor on the encoder's.

    Raises:
        ConfigError: For an unknown name, or a rate that is not positive.
    """

    def __init__(self, name: str = ENCODER_OPTIMIZER, lr: float = 1.0) -> None:
        check_choice("mixup.optimizer", name, CHOICES)
        check_range("mixup.lr", lr, 1e-8)
        self.name, self.lr = name, lr

    @property
    def shared(self) -> bool:
        """Whether the encoder's optimizer also updates the Mixer."""
        return self.name == ENCODER_OPTIMIZER

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the Mixer's separate optimizer for these parameter groups."""
        kind, settings = MIXER_OPTIMIZERS[self.name]
        return kind(groups, lr=self.lr, **settings)  # type: ignore[call-arg]


class JointOptimizer(Optimizer):
    """Steps several optimizers with disjoint parameters as if they were one.

    It shares their parameter groups and state, in their order: schedules, gradient scalers,
    clipping and checkpoints see one optimizer.

    Args:
        parts: The optimizers; they have not stepped yet.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share()

    def _share(self) -> None:
        """Make the parts refer to this optimizer's groups and state (the same objects)."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, also into the parts."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each part; ``closure`` is called once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class LARS(lars.LARS):
    """lightly's LARS with the same updates, but no decision on the host.

    lightly's asks for the norms of each weight matrix, which waits for the device twice. As there,
    parameters without weight decay are not scaled.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        change, decay, momentum = weight.grad, group["weight_decay"], group["momentum"]
        assert change is not None
        if decay != 0:
            size, slope = torch.norm(weight), torch.norm(change)
            rate = size / (slope + size * decay + group["eps"]) * group["trust_coefficient"]
            scaled = change.add(weight, alpha=decay) * rate
            change = torch.where((size != 0) & (slope != 0), scaled, change)
        if momentum != 0:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = change.clone()
            else:
                state["momentum_buffer"].mul_(momentum).add_(change, alpha=1 - group["dampening"])
            buffer = state["momentum_buffer"]
            change = change.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        weight.add_(change, alpha=-group["lr"])


REFERENCE_BATCH = 256  # images; learning rates are stated for it (arXiv 1706.02677, section 2.1)


class OptimizerRecipe:
    """Builds an optimizer with linear warm-up and cosine decay per step.

    Args:
        optimizer: An optimizer's class, called as ``optimizer(groups, lr=...)``.
        lr: Learning rate for a global batch of 256 images.
        scaling: ``linear`` (lr x batch / 256), ``sqrt``, or ``none``.
        weight_decay: For weight matrices and kernels; biases and normalisation have none.
        warmup_epochs: Epochs of linear warm-up; a run shorter than ten of these warms up for a
            tenth of its steps.
        final: Share of the learning rate that is left at the end.

    Raises:
        ConfigError: For a setting outside its range.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer],
        lr: float,
        scaling: str = "linear",
        weight_decay: float = 0.0,
        warmup_epochs: float = 10,
        final: float = 0.0,
    ) -> None:
        if lr <= 0 or weight_decay < 0 or warmup_epochs < 0 or not 0 <= final <= 1:
            raise ConfigError(
                "optimizer needs lr > 0, weight_decay >= 0, warmup_epochs >= 0 and final in [0, 1];"
                f" got {lr}, {weight_decay}, {warmup_epochs} and {final}"
            )
        if scaling not in ("linear", "sqrt", "none"):
            raise ConfigError(f"optimizer.scaling is linear, sqrt or none, got '{scaling}'")
        self.optimizer = optimizer
        self.lr, self.scaling, self.weight_decay = lr, scaling, weight_decay
        self.warmup_epochs, self.final = warmup_epochs, final

    def scaled_lr(self, batch_size: int) -> float:
        """Return the learning rate in use at a global batch of ``batch_size`` images."""
        factor = batch_size / REFERENCE_BATCH
        return self.lr * {"linear": factor, "sqrt": factor**0.5, "none": 1.0}[self.scaling]

    def build(
        self,
        module: nn.Module,
        batch_size: int,
        total_steps: int,
        steps_per_epoch: int,
        mixer: MixerOptimizer | None = None,
    ) -> dict[str, Any]:
        """Return Lightning's dictionary of the optimizer and its schedule over ``total_steps``.

        Args:
            module: Whose parameters are optimised.
            batch_size: Images per optimizer step, over all devices.
            total_steps: Optimizer steps of the whole run.
            steps_per_epoch: Optimizer steps of an epoch.
            mixer: Settings of the Mixer's optimizer; None: the encoder's optimizer.

        Raises:
            ConfigError: If the optimizer rejects its settings.
        """
        mixer = mixer or MixerOptimizer()
        lr = self.scaled_lr(batch_size)
        groups = parameter_groups(module, self.weight_decay)
        own = [g for g in groups if g["name"] == "mixer" and not mixer.shared]
        shared = [g for g in groups if g["name"] != "mixer" or mixer.shared]
        for group in shared:
            group["lr"] = lr * (mixer.lr if group["name"] == "mixer" else 1.0)
        warmup = min(round(self.warmup_epochs * steps_per_epoch), total_steps // 10)
        try:
            parts = [self.optimizer(shared, lr=lr)] if shared else []  # or the encoder is frozen
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the optimizer rejects its settings: {error}") from error
        schedules = [cosine(total_steps, self.final, warmup) for _ in shared]
        if own:
            parts.append(mixer.build(own))
            schedules += [cosine(total_steps, MIXER_FINAL_LR) for _ in own]
        optimizer = parts[0] if len(parts) == 1 else JointOptimizer(parts)
        schedule = LambdaLR(optimizer, schedules)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }


def cosine(total_steps: int, final: float, warmup: int = 0) -> Callable[[int], float]:
    """Return a function of the step: the factor on the learning rate.

    A function, not lightly's scheduler object, which restores the length of the interrupted run
    from a checkpoint: a resumed run could not be made longer.

    Args:
        total_steps: Where the cosine ends: the step after the last one has ``final``.
        final: The factor there.
        warmup: Steps of linear warm-up; step i has (i + 1) / warmup.
    """

    def factor(step: int) -> float:
        return cosine_warmup_schedule(
            step=min(step, total_steps),
            max_steps=total_steps + 1,  # whose last step, with a rate of 0, is never made
            start_value=1.0,
            end_value=final,
            warmup_steps=warmup,
            warmup_start_value=0.0,
        )

    return factor
