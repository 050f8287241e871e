"""Trackers: Lightning's loggers. They write into the run folder unless the user names a server."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig
from PIL import Image
from pytorch_lightning.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)

from ssl_samix.config.compose import build, dotted, plain
from ssl_samix.errors import ConfigError, check_choice

WANDB_MODES = ("online", "offline")
FAILURES = {"mlflow": ("mlflow.exceptions", "MlflowException"), "wandb": ("wandb.errors", "Error")}
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
RUN_ID = "run_id"  # file with the tracker's name of the run


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger; it creates its folder again if that is removed during a run."""

    @property
    def experiment(self) -> Any:
        """Return the writer; its thread would fail if the folder were missing."""
        os.makedirs(self.log_dir, exist_ok=True)
        return super().experiment


def tensorboard_logger(folder: Path) -> TensorBoardLogger:
    """Return TensorBoard's logger, which writes to ``<folder>/tensorboard``."""
    return RunLogger(folder, name="", version="tensorboard")


def csv_logger(folder: Path) -> CSVLogger:
    """Return the logger of a CSV file; a resumed run starts another, since it would be emptied."""
    return CSVLogger(folder, name="csv")


def mlflow_logger(
    folder: Path, tracking_uri: str | None, experiment_name: str, run_name: str | None
) -> MLFlowLogger:
    """Return MLflow's logger; a resumed run continues its MLflow run.

    Args:
        folder: The run folder.
        tracking_uri: Address of a server or database; None: ``MLFLOW_TRACKING_URI`` if set, else a
            SQLite database in the run folder.
        experiment_name: MLflow's name for a group of runs.
        run_name: None: the name of the folder.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it reports its use
    for name in ("alembic", "mlflow.store.db.utils", "pytorch_lightning.loggers.mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they describe how tables are made
    home, artifacts = folder.absolute() / "mlflow", None
    home.mkdir(parents=True, exist_ok=True)
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        uri, artifacts = f"sqlite:///{home / 'mlflow.db'}", (home / "artifacts").as_uri()
    with _refusals("mlflow"):
        return MLFlowLogger(
            experiment_name=experiment_name,
            run_name=run_name or folder.absolute().name,
            tracking_uri=uri,
            artifact_location=artifacts,
            run_id=_kept_id(home),
        )


def wandb_logger(
    folder: Path, mode: str | None, project: str, entity: str | None, name: str | None
) -> WandbLogger:
    """Return the logger of Weights & Biases; a resumed run continues its W&B run.

    Args:
        folder: The run folder.
        mode: ``online`` or ``offline``; None: ``WANDB_MODE`` if set, else offline.
        project: W&B's name for a group of runs.
        entity: Team or user; None: the user's own.
        name: None: the name of the folder.

    Raises:
        ConfigError: For another mode.
    """
    mode = mode or os.environ.get("WANDB_MODE") or "offline"
    check_choice("logger.wandb.mode", mode, WANDB_MODES)
    if mode != "online":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it reports its own errors
    import wandb

    home = folder.absolute()
    (home / "wandb").mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        name=name or home.name,
        save_dir=home,
        id=_kept_id(home / "wandb") or uuid.uuid4().hex[:8],
        project=project,
        entity=entity,
        mode=mode,
        settings=wandb.Settings(silent=True, console="off"),
    )


def _kept_id(home: Path) -> str | None:
    """Return the run's id from before a resume."""
    kept = home / RUN_ID
    return kept.read_text("utf-8").strip() if kept.is_file() else None


def build_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """Return the loggers of a configuration; TensorBoard's for a run from before they were a group.

    Raises:
        UserError: If a setting is wrong.
    """
    chosen = config.get("logger")
    if chosen is None:
        return [tensorboard_logger(folder)]
    return [build(logger, folder=folder) for logger in chosen.values()]


@contextmanager
def tracking(trainer: pl.Trainer, config: DictConfig, folder: Path) -> Iterator[None]:
    """Open the runs of MLflow and W&B before a training, and close W&B's after it.

    Args:
        trainer: Has the loggers.
        config: Configuration of the run, which they show.
        folder: The run folder, where their ids are kept for a resume.

    Raises:
        ConfigError: If a server does not answer, or rejects the run.
    """
    asked = [t for t in trainer.loggers if isinstance(t, MLFlowLogger | WandbLogger)]
    opened = asked if trainer.is_global_zero else []
    for logger in opened:
        kept = folder / ("mlflow" if isinstance(logger, MLFlowLogger) else "wandb") / RUN_ID
        # MLflow refuses settings that have changed, such as a resumed run's number of epochs.
        again = isinstance(logger, MLFlowLogger) and kept.is_file()
        kept.write_text(_opened(logger, {} if again else dotted(plain(config))), "utf-8")
        print(f"{'tracker':<10}{_place(logger)}", flush=True)
    status = 1
    try:
        yield
        status = 0
    finally:
        for logger in opened:
            if isinstance(logger, WandbLogger):  # Lightning leaves it open until the process ends
                logger.experiment.finish(exit_code=status)


def _opened(logger: MLFlowLogger | WandbLogger, config: dict[str, Any]) -> str:
    """Open a run with its settings, and return its id."""
    with _refusals("mlflow" if isinstance(logger, MLFlowLogger) else "wandb"):
        logger.log_hyperparams(config)
        return str(logger.version)


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Convert the errors of MLflow or W&B to ``ConfigError``."""
    module, error_name = FAILURES[name]
    failure: type[Exception] = getattr(import_module(module), error_name)
    before = os.environ.get(RETRIES)
    os.environ.setdefault(RETRIES, "2")  # MLflow's 7 take minutes, as they may during the training
    try:
        yield
    except failure as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"logger={name} cannot start a run: {reason}") from error
    finally:
        if before is None:
            del os.environ[RETRIES]


def _place(logger: MLFlowLogger | WandbLogger) -> str:
    if isinstance(logger, MLFlowLogger):
        return f"MLflow, {logger._tracking_uri}"
    run = logger.experiment
    if run.offline:
        return f"W&B, on this machine; wandb sync {Path(run.dir).parent} sends it"
    return f"W&B, {run.url}"


def show_picture(trainer: pl.Trainer, name: str, picture: Image.Image) -> None:
    """Add a picture to all trackers that take pictures, at the current step; on rank 0."""
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=step)
        elif isinstance(logger, MLFlowLogger):
            file = f"{name}/step-{step:06d}.png"
            logger.experiment.log_image(logger.run_id, picture, artifact_file=file)
