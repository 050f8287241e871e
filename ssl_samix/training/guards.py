"""Callbacks: checkpoints, a check for NaN losses, warnings about a Mixer that does not learn."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn.parallel import DistributedDataParallel

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
        """Restore the best score, also if the run folder was moved or copied.

        Lightning would discard it then, and overwrite the best checkpoint with a worse one.
        """
        state = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "last_model_path", "kth_best_model_path"):
            state[key] = self._here(state[key])
        state["best_k_models"] = {self._here(k): v for k, v in state["best_k_models"].items()}
        super().load_state_dict(state)

    def _here(self, path: str) -> str:
        assert self.dirpath is not None
        return str(Path(self.dirpath) / Path(path).name) if path else path


EVERY = 100  # steps between two checks: each synchronises host and device


class SeveralProcesses(pl.Callback):
    """Makes a run of several processes end together, and send and wait for less in each step.

    Nothing is done for a run of one process.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's handling of SIGTERM, and DDP's sending of buffers in each step.

        Lightning's handler waits for all processes, which hangs if only one got the signal; and
        for it every step sends a flag to all devices and reads it back. Here the signal ends the
        process that gets it, and that ends the others.
        """
        if trainer.world_size == 1:
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.broadcast_buffers = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the buffers of rank 0, such as BatchNorm's statistics, before they are used."""
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                torch.distributed.broadcast(buffer, src=0)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


class FiniteLoss(pl.Callback):
    """Stops the run if a loss was NaN or infinite; checks every 100 steps and after each epoch.

    It runs before the monitor and the checkpoints, which thus never see a diverged encoder.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *batch: Any) -> None:
        """Check every 100 steps."""
        if trainer.global_step % EVERY == 0:
            self.check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Check before anything is measured or saved."""
        self.check(trainer, pl_module)

    @staticmethod
    def check(trainer: pl.Trainer, module: Any) -> None:
        """Raise if a loss or a mask was not finite.

        Raises:
            UserError: If a mask or a step's loss was NaN or infinite.
        """
        done = trainer.current_epoch
        kept = "last.ckpt holds the last complete epoch" if done else "no epoch was completed"
        for name, step in module.named_buffers():
            if name.endswith("bad_step"):  # if one rank has found it, all end
                step.copy_(trainer.strategy.reduce(step.clone(), reduce_op="max"))
        error_message = None if module.mixing is None else module.mixing.error_message()
        if error_message is not None:
            raise UserError(f"{error_message} ({kept})")
        step = int(module.bad_step)
        if step >= 0:
            schedule: Any = trainer.lr_scheduler_configs[0].scheduler
            rate = schedule.base_lrs[0] * schedule.lr_lambdas[0](step)
            raise UserError(
                f"loss became NaN or infinite at step {step}, at learning rate {rate:.2g}: "
                f"lower optimizer.lr ({kept})"
            )


FLAT = 0.02  # spatial standard deviation of the masks; one of 0 and 1 in equal parts has 0.5
LOWEST_SLOPE = 0.5  # of masks' shares on their ratios; 1 is correct, 0 is independent of them
FEW_STEPS = 200  # in shorter runs a Mixer may stay near plain mixup
# Epochs in a row whose gain is below 0: at least 3, and a tenth of the run. It is measured in a
# few steps of each epoch, and noisy near 0.
LOSING_EPOCHS, LOSING_SHARE = 3, 0.1
ONE_SIDED = 0.9  # share of mixtures that copy one parent although their ratio is not near 0 or 1
EARLY = 0.1  # share of the mixed part of the run; masks of the published form are flat at first
_log = logging.getLogger(__name__)


class MixerHealth(pl.Callback):
    """Warns, once per run and problem, if the Mixer did nothing useful for a whole epoch.

    Before the first step it raises if ``mixup.during`` contains no step of the run.
    """

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.losing_epochs = 0  # epochs in a row whose gain was below 0

    def state_dict(self) -> dict[str, Any]:
        """Save which warnings were given."""
        return {"said": sorted(self.warned), "losing_epochs": self.losing_epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore which warnings were given; older checkpoints have no ``losing_epochs``."""
        self.warned = set(state_dict["said"])
        self.losing_epochs = state_dict.get("losing_epochs", 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if ``mixup.during`` contains no step.

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
        """Check the epoch's means."""
        epoch, mixing = trainer.current_epoch, pl_module.mixing
        for fault in self._faults(trainer, mixing):
            if fault not in self.warned and trainer.is_global_zero:
                sentence = _sentence(fault, trainer.callback_metrics, mixing)
                _log.warning("epoch %d: %s", epoch + 1, sentence)
            self.warned.add(fault)

    def _faults(self, trainer: pl.Trainer, mixing: Any) -> list[str]:
        """Return the problems that the epoch's means show."""
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        begin, end = (0.0, 1.0) if mixing is None else (mixing.begin, mixing.end)
        late = trainer.current_epoch >= (begin + EARLY * (end - begin)) * (trainer.max_epochs or 1)
        faults = []
        if late and measured.get("mixer/ratio_slope", 1.0) < LOWEST_SLOPE:
            faults.append("ratio")
        if late and trainer.estimated_stepping_batches >= FEW_STEPS:
            faults += self._unlearned(measured, trainer.max_epochs or 1)
        if measured.get("mixer/one_sided", 0.0) > ONE_SIDED:
            faults.append("one-sided")
        return faults

    def _unlearned(self, measured: dict[str, float], epochs: int) -> list[str]:
        """Return the problems of a Mixer that had enough steps to learn."""
        if measured.get("mixer/mask_std", 1.0) < FLAT:
            return ["flat"]
        if "mixer/gain" in measured:
            self.losing_epochs = self.losing_epochs + 1 if measured["mixer/gain"] < 0 else 0
        enough = max(LOSING_EPOCHS, LOSING_SHARE * epochs)
        return ["harmful"] if self.losing_epochs >= enough else []


def _sentence(fault: str, metrics: dict[str, Any], mixing: Any) -> str:
    """Return the warning: what was found, and what to change."""
    learns_more = ["mixup.update_every=1"] if mixing.update_every > 1 else []
    other_mask = ["mixup.mask=exact"] if mixing.policy.block.form != "exact" else []
    own = ["mixup.optimizer=adamw mixup.lr=0.02"] if mixing.optimizer.shared else []
    if fault == "ratio":
        tries = other_mask or ["a lower mixup.lr"]
        found = (
            "the Mixer's masks ignore the requested ratio (slope "
            f"{metrics['mixer/ratio_slope']:.2f}; 1 is correct): mixtures' loss weights are wrong"
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
            "the Mixer's masks have a higher loss than flat masks (gain "
            f"{metrics['mixer/gain']:.3f}): plain mixup would be cheaper"
        )
    else:
        tries = [*other_mask, "a lower mixup.lr", "a higher mixup.mask_weight"]
        found = (
            f"{metrics['mixer/one_sided']:.0%} of the mixtures are a copy of one parent: "
            "the Mixer mixes nothing"
        )
    return f"{found}; try in a new run: {', '.join(tries)}"
