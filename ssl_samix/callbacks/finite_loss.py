"""A run whose loss is no number stops, before anything is measured or saved."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from ssl_samix.errors import UserError

EVERY = 100  # steps between two looks: each makes the host wait for the device


class FiniteLoss(pl.Callback):
    """Looks, now and then and at the end of an epoch, for a step whose loss was no number.

    It is the first callback: neither the monitor nor a checkpoint sees a diverged encoder.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *batch: Any) -> None:
        """Look, if it is time."""
        if trainer.global_step % EVERY == 0:
            self.look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look before anything is measured or saved."""
        self.look(trainer, pl_module)

    @staticmethod
    def look(trainer: pl.Trainer, module: Any) -> None:
        """Refuse to go on.

        Raises:
            UserError: If a mask or a step's loss was NaN or infinite.
        """
        done = trainer.current_epoch
        kept = "last.ckpt holds the last whole epoch" if done else "no epoch was finished"
        complaint = None if module.mixing is None else module.mixing.complaint()
        if complaint is not None:
            raise UserError(f"{complaint} ({kept})")
        step = int(module.bad_step)
        if step >= 0:
            schedule: Any = trainer.lr_scheduler_configs[0].scheduler
            rate = schedule.base_lrs[0] * schedule.lr_lambdas[0](step)
            raise UserError(
                f"the loss of step {step} was no number, at learning rate {rate:.2g}: "
                f"lower optimizer.lr ({kept})"
            )
