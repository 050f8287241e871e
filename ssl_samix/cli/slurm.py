"""Runs that Hydra's submitit launcher starts elsewhere: ``hydra/launcher=slurm``."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from ssl_samix.errors import ConfigError, UserError

GROUP = "hydra/launcher"
_SLURM = ("slurm", "submitit_slurm")
_SUBMITIT = (*_SLURM, "submitit_local")


def check_launcher(name: str, sweeping: bool) -> None:
    """Refuse a launcher that could start nothing here.

    Args:
        name: The choice of ``hydra/launcher``; one that is not submitit's is left to Hydra.
        sweeping: Whether the command has ``--multirun``; Hydra ignores launchers without it.

    Raises:
        ConfigError: If that is missing, or the launcher's package, or SLURM's commands.
    """
    if not sweeping:
        raise ConfigError(f"{GROUP}={name} starts jobs with --multirun only")
    if name not in _SUBMITIT:
        return
    if not _installed():
        raise ConfigError(f"{GROUP}={name} needs its package: pip install 'ssl_samix[slurm]'")
    if name in _SLURM and not (shutil.which("sbatch") and shutil.which("srun")):
        raise ConfigError(
            f"{GROUP}={name} needs SLURM's sbatch and srun, which are not on this machine"
        )


def _installed() -> bool:
    """Say whether Hydra's plugin is there; submitit itself always is."""
    names = ("hydra_plugins", "hydra_plugins.hydra_submitit_launcher")  # the parent first
    return all(importlib.util.find_spec(name) is not None for name in names)


@contextmanager
def jobs_reported(name: str, folder: str) -> Iterator[None]:
    """Say where jobs of a submitit launcher print, and turn its errors into sentences.

    Args:
        name: The choice of ``hydra/launcher``.
        folder: Where Hydra keeps the sweep.

    Raises:
        UserError: If a job ended without finishing its run, or could not be composed or submitted.
    """
    if name not in _SUBMITIT:
        yield
        return
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

    logs = os.path.join(folder, ".submitit")
    print(f"jobs of {GROUP}={name} print to {logs}; this command waits for them", flush=True)
    # Hydra prints a traceback and exits unless this variable is set.
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (FailedJobError, UncompletedJobError) as error:
        raise UserError(f"a job ended before its run did: see {logs}") from error
    except (FailedSubmissionError, HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{GROUP}={name}: {' '.join(str(error).split())}") from error
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before
