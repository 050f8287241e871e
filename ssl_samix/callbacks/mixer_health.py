"""Tells a live Mixer from a dead one, in words."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl

from ssl_samix.errors import ConfigError

FLAT = 0.02  # spatial standard deviation of the masks; one of 0 and 1 in equal parts has 0.5
ONE_SIDED = 0.9  # share of mixtures that are one of their parents, though their ratio is not
EARLY = 0.1  # share of what is mixed of the run; the published form starts flat
_log = logging.getLogger(__name__)


class MixerHealth(pl.Callback):
    """Warns, once per run and fault, of a Mixer that has done nothing useful for a whole epoch.

    Before the first step it refuses a run that would mix nothing at all.
    """

    def __init__(self) -> None:
        self.said: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Keep what has been said over a resume."""
        return {"said": sorted(self.said)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what has been said."""
        self.said = set(state_dict["said"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a ``during`` that holds no step.

        Raises:
            ConfigError: If it does.
        """
        mixing: Any = pl_module.mixing
        total = int(trainer.estimated_stepping_batches)
        if mixing is not None and not mixing.mixes_in(range(total), total):
            raise ConfigError(
                f"mixup.during=[{mixing.begin:g},{mixing.end:g}] holds no step of the run's "
                f"{total}: widen it"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the epoch's means."""
        metrics, epoch = trainer.callback_metrics, trainer.current_epoch
        mixing: Any = pl_module.mixing
        begin, end = (0.0, 1.0) if mixing is None else (mixing.begin, mixing.end)
        early = epoch < (begin + EARLY * (end - begin)) * (trainer.max_epochs or 1)
        faults = []
        if "mixer/mask_std" in metrics and metrics["mixer/mask_std"] < FLAT and not early:
            faults.append("flat")
        if "mixer/one_sided" in metrics and metrics["mixer/one_sided"] > ONE_SIDED:
            faults.append("one-sided")
        for fault in faults:
            if fault not in self.said and trainer.is_global_zero:
                _log.warning("epoch %d: %s", epoch + 1, self._sentence(fault, metrics, pl_module))
            self.said.add(fault)

    @staticmethod
    def _sentence(fault: str, metrics: dict[str, Any], module: Any) -> str:
        tries = ["mixup.update_every=1"] if module.mixing.update_every > 1 else []
        if module.mixing.policy.block.form != "anchored":
            tries.append("mixup.mask=anchored")
        if fault == "flat":
            tries += ["a higher mixup.lr", "mixup.variance_weight above 0"]
            found = (
                f"the Mixer's masks are flat (spatial deviation {metrics['mixer/mask_std']:.3f}): "
                "it has fallen back to plain mixup"
            )
        else:
            tries += ["a lower mixup.lr", "a higher mixup.mask_weight"]
            found = (
                f"{metrics['mixer/one_sided']:.0%} of the mixtures are a copy of one parent: "
                "the Mixer mixes nothing"
            )
        return f"{found}; what may help in a new run: {', '.join(tries)}"
