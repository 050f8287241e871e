"""The ``samix`` command; a user error prints one sentence and exits with status 2."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ssl_samix.cli.commands import SUBCOMMANDS, PlainSubcommand, Subcommand
from ssl_samix.errors import ConfigError, UserError, nearest

SPINS = "10000"  # iterations of libgomp's busy loops; its default of 300,000 takes about 1 ms
FORCED = "++"  # Hydra's prefix of a key that may be new
LONGEST_NAME = 180  # characters in the name of a job's folder; file systems allow 255 bytes


def main(words: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        words: Subcommand and its arguments; None: those of the process.
    """
    # torch's CPU threads wait for each other in busy loops. If other processes use the machine, a
    # step then takes many times as long, so the loops are made shorter; without any, a step is
    # slower on a free machine. libgomp reads the variable when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        _dispatch(sys.argv[1:] if words is None else words)
    except UserError as error:
        _stop(f"samix: {error}", 2)
    except PermissionError as error:
        _stop(f"samix: no permission for {error.filename}", 2)
    except BrokenPipeError:  # the reader closed the pipe, as in: samix ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:  # not about a file
            raise
        _stop(f"samix: cannot use {error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt as interrupt:
        _stop(f"samix: {interrupt or 'interrupted'}", 130)


def _stop(sentence: str, status: int) -> NoReturn:
    # Arguments and file names may contain line breaks and terminal control codes.
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
    print(shown, file=sys.stderr)
    sys.exit(status)


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    elif words[0] == "--version":
        from importlib.metadata import version

        print(version("ssl_samix"))
    elif words[0] not in SUBCOMMANDS:
        raise ConfigError(nearest(words[0], SUBCOMMANDS, "subcommand"))
    else:
        command = SUBCOMMANDS[words[0]]
        if isinstance(command, PlainSubcommand):
            print(command.main(words[1:]))
        else:
            _run(words[0], command, words[1:])


def _help() -> str:
    width = max(map(len, SUBCOMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{entry.text}" for name, entry in SUBCOMMANDS.items())
    return (
        "Usage: samix <subcommand> [key=value ...]\n\n"
        f"{rows}\n\n"
        "samix <subcommand> --help shows its configuration."
    )


def _run(name: str, command: Subcommand, words: list[str]) -> None:
    from ssl_samix.training.launch import COMMAND

    os.environ[COMMAND] = str(os.getpid())
    words, launcher, sweep = _checked(name, command, words)
    if any(word.startswith(("-", "hydra")) for word in words):  # help, sweeps, launchers
        _run_by_hydra(command, words, launcher, sweep)
    else:
        signal.signal(signal.SIGTERM, _on_sigterm)
        command.job(words)


def _run_by_hydra(command: Subcommand, words: list[str], launcher: str, sweep: str) -> None:
    import hydra
    from omegaconf import OmegaConf

    from ssl_samix.config.compose import (
        CONFIG_DIR,
        describe_groups,
        parse,
        search_path,
        typed_config_dir,
    )
    from ssl_samix.training.launch import COMMAND

    settings = [word for word in words if "=" in word and not word.startswith("-")]
    own = typed_config_dir(parse(settings))
    folders: list[str] = []
    if own is not None:  # beside it, since Hydra allows no flag between settings
        at = next(i for i, word in enumerate(words) if word.startswith("config_dir="))
        words = [*words[:at], *search_path(own), *words[at:]]

    # Some keys exist only once the job composes its configuration, and Hydra would reject them.
    # They have been checked, so they are forced.
    words = [f"{FORCED}{word}" if word.startswith(command.late_keys) else word for word in words]

    @hydra.main(config_path=str(CONFIG_DIR), config_name=command.config, version_base="1.3")
    def app(_config: object) -> None:
        # Hides errors from Hydra, which would print a traceback and continue a sweep.
        try:
            _run_job(command, folders)
        except (UserError, KeyboardInterrupt, OSError) as error:
            if os.environ.get(COMMAND) != str(os.getpid()):  # a job in another process
                _stop(f"samix: {error}", 130 if isinstance(error, KeyboardInterrupt) else 2)
            raise _Stopped(error) from error

    describe = partial(describe_groups, config_dir=own)
    OmegaConf.register_new_resolver("samix.groups", describe, replace=True)
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        with jobs_reported(launcher, sweep):
            app()
    except _Stopped as stopped:
        raise stopped.error from None
    finally:
        sys.argv = before
        if command.trains:
            _print_runs(settings, folders)


def _print_runs(words: list[str], folders: list[str]) -> None:
    """Print the table of a sweep's runs.

    Args:
        words: ``key=value`` arguments of the sweep.
        folders: Run folders of jobs in this process; else those in ``out`` are listed.
    """
    from ssl_samix.config.compose import parse
    from ssl_samix.reporting.runs import listed, run_folders

    varied = [o.key_or_group for o in parse(words) if o.is_sweep_override()]
    out = _last(words, "out")
    found = [Path(folder) for folder in folders] or (run_folders(Path(out)) if out else [])
    if found:
        print(f"\n{listed(found, varied)}", flush=True)


def _checked(name: str, command: Subcommand, words: list[str]) -> tuple[list[str], str, str]:
    """Check the arguments before torch is imported.

    Returns:
        The arguments for Hydra, the launcher that they name, and the folder of a sweep.

    Raises:
        UserError: For the first error in them.
    """
    from ssl_samix.config.compose import check_hydra, quote_paths, quoted

    flags = [word for word in words if word.startswith("-")]
    sweeping = "--multirun" in flags or "-m" in flags
    if sweeping and not command.sweeps:
        raise ConfigError(f"{name} does one thing at a time and takes no --multirun")
    words = quote_paths(words, sweeping)
    settings = [word for word in words if word not in flags]
    if any(flag not in ("--multirun", "-m") for flag in flags):
        _check_help(command, flags, settings)
        return words, "", ""
    launcher, out = _last(settings, GROUP) or "", _last(settings, "out")
    check_hydra(command.config, settings)
    if launcher:
        check_launcher(launcher, sweeping)
    if not sweeping:
        _refuse_several(settings, command.sweeps)
    command.check(settings, sweeping)
    if sweeping and out:
        settings.append(f"hydra.sweep.dir={quoted(out)}")
    sweep = _last(settings, "hydra.sweep.dir") or "runs"
    return [*flags, *settings], launcher, sweep  # Hydra allows no flag between settings


def _check_help(command: Subcommand, flags: list[str], words: list[str]) -> None:
    """Check the arguments of a command that asks for help or information."""
    from ssl_samix.config.compose import check

    for flag in flags:
        if re.match("--config-|-c[pnd]", flag):
            raise ConfigError(f"{flag} is not an option: write config_dir=<folder of your choices>")
    if {"-h", "--help"} & {*flags}:
        check(command.config, words)


def _last(words: list[str], key: str) -> str | None:
    """Return the value that the last argument for a key gives it; None if there is none."""
    from ssl_samix.config.compose import parse

    given = [o.value() for o in parse(words) if o.key_or_group == key]
    return None if not given or given[-1] is None else str(given[-1])


def _refuse_several(words: list[str], sweeps: bool) -> None:
    from ssl_samix.config.compose import parse

    for override in parse(words):
        if override.is_sweep_override():
            way = ", --multirun runs them all" if sweeps else ""
            key, _, value = str(override.input_line).partition("=")
            raise ConfigError(f"{key} has several values: a list is {key}=[{value}]{way}")


class _Stopped(BaseException):
    """Carries an error of a job through Hydra, which catches ``Exception``."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def _run_job(command: Subcommand, folders: list[str]) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from ssl_samix.artifacts.run_folder import default_out
    from ssl_samix.config.compose import compose, quoted

    signal.signal(signal.SIGTERM, _on_sigterm)
    job = HydraConfig.get()
    # Not resolved: interpolations refer to the job's configuration, and this one is Hydra's.
    given: Any = OmegaConf.to_container(job.overrides.task, resolve=False)
    words = [word.removeprefix(FORCED) for word in given]
    if job.mode == RunMode.MULTIRUN:
        out = _last(words, "out")
        words = [word for word in words if not word.startswith("out=")]
        print(f"job {job.job.num}: {' '.join(words)}", flush=True)
        if out:
            out = f"{out}/{job_name(words)}"
        elif command.trains and not _last(words, "resume"):
            config, choices = compose(command.config, words)
            out = str(default_out(choices, config.seed))
        if out:
            words.append(f"out={quoted(out)}")
            folders.append(out)
    command.job(words)


def job_name(words: list[str]) -> str:
    """Return the name of a sweep's job: its settings, in characters that need no quotes."""
    name = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-") for word in words)
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{digest}"


def _on_sigterm(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


GROUP = "hydra/launcher"
_SLURM = ("slurm", "submitit_slurm")
_SUBMITIT = (*_SLURM, "submitit_local")


def check_launcher(name: str, sweeping: bool) -> None:
    """Check that a Hydra launcher can start jobs on this machine.

    Args:
        name: The choice of ``hydra/launcher``; only submitit's launchers are checked.
        sweeping: Whether the command has ``--multirun``; Hydra ignores launchers without it.

    Raises:
        ConfigError: If ``--multirun``, the launcher's package or SLURM's commands are missing.
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
    """Return whether Hydra's submitit plugin is installed; submitit itself always is."""
    names = ("hydra_plugins", "hydra_plugins.hydra_submitit_launcher")  # find_spec needs the parent
    return all(importlib.util.find_spec(name) is not None for name in names)


@contextmanager
def jobs_reported(name: str, folder: str) -> Iterator[None]:
    """Print where the jobs of a submitit launcher log, and convert its errors to user errors.

    Args:
        name: The choice of ``hydra/launcher``; nothing is done for launchers of others.
        folder: Folder of the sweep.

    Raises:
        UserError: If a job ended before its run was finished or could not be composed or submitted.
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
