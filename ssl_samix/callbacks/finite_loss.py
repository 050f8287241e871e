"""A run whose loss is no number stops, before anything is measured or saved."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

from ssl_samix.errors import UserError


class FiniteLoss(pl.Callback):
    """Looks at each epoch's mean loss, so that no step waits for the host.

    It is the first callback: neither the monitor nor a checkpoint sees a diverged encoder.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to go on.

        Raises:
            UserError: If a mask or the epoch's mean loss was NaN or infinite.
        """
        mixing = getattr(pl_module, "mixing", None)
        complaint = None if mixing is None else mixing.complaint()
        if complaint is not None:
            raise UserError(f"{complaint} (last.ckpt holds the epoch before)")
        loss = trainer.callback_metrics["loss"]
        if not torch.isfinite(loss):
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            raise UserError(
                f"the loss became {loss.item()} in the epoch that ended with step "
                f"{trainer.global_step}, at learning rate {rate:.2g}: lower optimizer.lr "
                "(last.ckpt holds the epoch before)"
            )
