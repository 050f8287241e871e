"""Guards of a run: its checkpoints, a loss that is not finite, a Mixer that does not learn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from ssl_samix.errors import ConfigError, UserError, check_range


class RunCheckpoint(ModelCheckpoint):
    """One checkpoint under a fixed name in the run folder.

    Args:
        folder: The run folder.
        name: ``last`` or ``best``.
        every_n_epochs: The interval.
        **arguments: Of Lightning's class: ``monitor`` and ``mode``.

    Raises:
        ConfigError: For an interval below 1.
    """

    def __init__(self, folder: Path, name: str, every_n_epochs: int = 1, **arguments: Any) -> None:
        check_range("callbacks.checkpoint.every_n_epochs", every_n_epochs, 1)
        super().__init__(
            dirpath=folder,
            filename=name,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
            **arguments,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score back, also where the run folder has been moved or copied.

        Lightning would forget it there, and overwrite the best checkpoint by a worse one.
        """
        state = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "last_model_path", "kth_best_model_path"):
            state[key] = self._here(state[key])
        state["best_k_models"] = {self._here(k): v for k, v in state["best_k_models"].items()}
        super().load_state_dict(state)

    def _here(self, path: str) -> str:
        assert self.dirpath is not None
        return str(Path(self.dirpath) / Path(path).name) if path else path


EVERY = 100  # steps between two looks: each makes the host wait for the device


class FiniteLoss(pl.Callback):
    """Looks, now and then and at the end of an epoch, for a step whose loss was no number.

    It is the first callback: neither the monitor nor a checkpoint sees a diverged encoder.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *batch: Any) -> None:
        """Look, if it is time."""
        if trainer.global_step % EVERY == 0:
            self.check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look before anything is measured or saved."""
        self.check(trainer, pl_module)

    @staticmethod
    def check(trainer: pl.Trainer, module: Any) -> None:
        """Refuse to go on.

        Raises:
            UserError: If a mask or a step's loss was NaN or infinite.
        """
        done = trainer.current_epoch
        kept = "last.ckpt holds the last whole epoch" if done else "no epoch was finished"
        error_message = None if module.mixing is None else module.mixing.error_message()
        if error_message is not None:
            raise UserError(f"{error_message} ({kept})")
        step = int(module.bad_step)
        if step >= 0:
            schedule: Any = trainer.lr_scheduler_configs[0].scheduler
            rate = schedule.base_lrs[0] * schedule.lr_lambdas[0](step)
            raise UserError(
                f"the loss of step {step} was no number, at learning rate {rate:.2g}: "
                f"lower optimizer.lr ({kept})"
            )


FLAT = 0.02  # spatial standard deviation of the masks; one of 0 and 1 in equal parts has 0.5
LOWEST_SLOPE = (
    0.5  # slope of the masks' shares on their ratios; 1 is right, 0 knows nothing of them
)
FEW_STEPS = 200  # of a run, in which a Mixer may stay near plain mixup
LOSING_EPOCHS = (
    2  # epochs in a row: the gain is measured in a few steps of each, and near 0 it is noise
)
ONE_SIDED = 0.9  # share of mixtures that are one of their parents, though their ratio is not
EARLY = 0.1  # share of what is mixed of the run; the published form starts flat
_log = logging.getLogger(__name__)


class MixerHealth(pl.Callback):
    """Warns, once per run and fault, of a Mixer that has done nothing useful for a whole epoch.

    Before the first step it refuses a run that would mix nothing at all.
    """

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.losing_epochs = 0  # epochs in a row whose gain was below 0

    def state_dict(self) -> dict[str, Any]:
        """Keep what has been said over a resume."""
        return {"said": sorted(self.said), "losing_epochs": self.losing_epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what has been said; an earlier version counted no gains."""
        self.said, self.losing_epochs = set(state_dict["said"]), state_dict.get("losing_epochs", 0)

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
        epoch, mixing = trainer.current_epoch, pl_module.mixing
        for fault in self._faults(trainer, mixing):
            if fault not in self.said and trainer.is_global_zero:
                sentence = _sentence(fault, trainer.callback_metrics, mixing)
                _log.warning("epoch %d: %s", epoch + 1, sentence)
            self.said.add(fault)

    def _faults(self, trainer: pl.Trainer, mixing: Any) -> list[str]:
        """Name what is wrong with the epoch's means, of what it has measured."""
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        begin, end = (0.0, 1.0) if mixing is None else (mixing.begin, mixing.end)
        late = trainer.current_epoch >= (begin + EARLY * (end - begin)) * (trainer.max_epochs or 1)
        faults = []
        if late and measured.get("mixer/ratio_slope", 1.0) < LOWEST_SLOPE:
            faults.append("ratio")
        if late and trainer.estimated_stepping_batches >= FEW_STEPS:
            faults += self._unlearned(measured)
        if measured.get("mixer/one_sided", 0.0) > ONE_SIDED:
            faults.append("one-sided")
        return faults

    def _unlearned(self, measured: dict[str, float]) -> list[str]:
        """Name what a Mixer that has had the time to learn has not learned."""
        if measured.get("mixer/mask_std", 1.0) < FLAT:
            return ["flat"]
        if "mixer/gain" in measured:
            self.losing_epochs = self.losing_epochs + 1 if measured["mixer/gain"] < 0 else 0
        return ["harmful"] if self.losing_epochs >= LOSING_EPOCHS else []


def _sentence(fault: str, metrics: dict[str, Any], mixing: Any) -> str:
    """Say what was found, and what to change."""
    learns_more = ["mixup.update_every=1"] if mixing.update_every > 1 else []
    other_mask = ["mixup.mask=exact"] if mixing.policy.block.form != "exact" else []
    own = ["mixup.optimizer=adamw mixup.lr=0.02"] if mixing.optimizer.shared else []
    if fault == "ratio":
        tries = other_mask or ["a lower mixup.lr"]
        found = (
            "the Mixer's masks ignore the ratio that is asked for (slope "
            f"{metrics['mixer/ratio_slope']:.2f}; 1 is right): the encoder learns wrong weights"
        )
    elif fault == "flat":
        tries = [*learns_more, *own, "a higher mixup.lr"]
        found = (
            f"the Mixer's masks are flat (spatial deviation {metrics['mixer/mask_std']:.3f}): "
            "it has fallen back to plain mixup"
        )
    elif fault == "harmful":
        tries = [*other_mask, *learns_more, *own, "a lower mixup.lr"]
        found = (
            "the Mixer's masks are worse than flat ones by its own loss (gain "
            f"{metrics['mixer/gain']:.3f}): plain mixup costs less"
        )
    else:
        tries = [*other_mask, "a lower mixup.lr", "a higher mixup.mask_weight"]
        found = (
            f"{metrics['mixer/one_sided']:.0%} of the mixtures are a copy of one parent: "
            "the Mixer mixes nothing"
        )
    return f"{found}; what may help in a new run: {', '.join(tries)}"
