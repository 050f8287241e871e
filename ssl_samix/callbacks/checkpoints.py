"""last.ckpt and best.ckpt of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint

from ssl_samix.errors import check_range


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
