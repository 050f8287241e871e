"""``samix <subcommand>``: a user's mistake is one sentence and exit status 2."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from ssl_samix.errors import ConfigError, UserError, nearest

SPINS = "10000"  # of libgomp; its own 300,000 last about a millisecond
LONGEST_NAME = 180  # characters of a job's folder; file systems allow 255 bytes


@dataclass(frozen=True)
class Subcommand:
    """What ``samix <name>`` does; both functions import what they need when they are called."""

    text: str  # its line in the help
    config: str  # name of its configuration
    check: Callable[[list[str], bool], None]  # finds mistakes early: words, sweeping
    job: Callable[[list[str]], None]  # does what ``key=value`` words say
    sweeps: bool = True  # whether it takes --multirun; its ``out`` is then the folder of all jobs


def main() -> None:
    """Run the command line."""
    # torch's CPU threads wait for each other in busy loops: as soon as anything else runs on the
    # machine, a step takes many times as long. Shorter loops; none at all would be slower where
    # the machine is free. Read when torch is imported, later.
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        _dispatch(sys.argv[1:])
    except UserError as error:
        _stop(f"samix: {error}", 2)
    except PermissionError as error:
        _stop(f"samix: no permission for {error.filename}", 2)
    except KeyboardInterrupt as interrupt:
        _stop(f"samix: {interrupt or 'interrupted'}", 130)


def _stop(sentence: str, status: int) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(status)


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    elif words[0] == "--version":
        from importlib.metadata import version

        print(version("ssl_samix"))
    elif words[0] in SUBCOMMANDS:
        _run(words[0], words[1:])
    else:
        raise ConfigError(nearest(words[0], SUBCOMMANDS, "subcommand"))


def _help() -> str:
    width = max(map(len, SUBCOMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{entry.text}" for name, entry in SUBCOMMANDS.items())
    return (
        "Usage: samix <subcommand> [key=value ...]\n\n"
        f"{rows}\n\n"
        "samix <subcommand> --help shows its configuration."
    )


def _run(name: str, words: list[str]) -> None:
    import hydra

    from ssl_samix.config import CONFIG_DIR, quote_paths
    from ssl_samix.launch import COMMAND

    command = SUBCOMMANDS[name]
    flags = [word for word in words if word.startswith("-")]
    sweeping = "--multirun" in flags or "-m" in flags
    if sweeping and not command.sweeps:
        raise ConfigError(f"{name} does one thing at a time and takes no --multirun")
    words = quote_paths(words, sweeping)
    if all(flag in ("--multirun", "-m") for flag in flags):  # others ask for help or information
        settings = [word for word in words if word not in flags]
        if sweeping:
            words += _sweep_folder(settings)
        else:
            _refuse_several(settings, command.sweeps)
        command.check(settings, sweeping)

    @hydra.main(config_path=str(CONFIG_DIR), config_name=command.config, version_base="1.3")
    def app(_config: object) -> None:
        # An error is kept from Hydra, which would print a traceback and go on with a sweep.
        try:
            _run_job(command)
        except (UserError, KeyboardInterrupt) as error:
            raise _Stopped(error) from error

    before = sys.argv
    os.environ[COMMAND] = str(os.getpid())
    sys.argv = [before[0], *words]
    try:
        app()
    except _Stopped as stopped:
        raise stopped.error from None
    finally:
        sys.argv = before


def _sweep_folder(words: list[str]) -> list[str]:
    """Tell Hydra where a sweep writes its record: in ``out``, if it is given."""
    from ssl_samix.config import parse, quoted

    out = [o.value() for o in parse(words) if o.key_or_group == "out"]
    return [f"hydra.sweep.dir={quoted(out[-1])}"] if out and out[-1] is not None else []


def _refuse_several(words: list[str], sweeps: bool) -> None:
    from ssl_samix.config import parse

    for override in parse(words):
        if override.is_sweep_override():
            way = ", --multirun runs them all" if sweeps else ""
            key, _, value = str(override.input_line).partition("=")
            raise ConfigError(f"{key} has several values: a list is {key}=[{value}]{way}")


class _Stopped(BaseException):
    """Carries a job's error through Hydra."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def _run_job(command: Subcommand) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from ssl_samix.config import parse, quoted

    signal.signal(signal.SIGTERM, _on_sigterm)
    job = HydraConfig.get()
    words = list(job.overrides.task)
    if job.mode == RunMode.MULTIRUN:
        given = [o.value() for o in parse(words) if o.key_or_group == "out"]
        words = [word for word in words if not word.startswith("out=")]
        print(f"job {job.job.num}: {' '.join(words)}", flush=True)
        if given:
            words.append(f"out={quoted(f'{given[-1]}/{job_name(words)}')}")
    command.job(words)


def job_name(words: list[str]) -> str:
    """Name a sweep's job by its settings, in characters that need no quotes anywhere."""
    name = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-") for word in words)
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{digest}"


def _on_sigterm(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _check_pretrain(words: list[str], sweeping: bool) -> None:
    """Find mistyped keys, missing data and a taken folder before anything heavy is imported.

    Args:
        words: ``key=value`` words.
        sweeping: Whether lists of values are sweeps; each job then has a folder of its own.

    Raises:
        UserError: For the first mistake.
    """
    from ssl_samix.config import absolute, check, parse
    from ssl_samix.data.layout import check_layout
    from ssl_samix.launch import is_main_process
    from ssl_samix.run_folder import RunFolder, resumed_config

    resume = [o.value() for o in parse(words) if o.key_or_group == "resume"]
    if resume and resume[-1] is not None:
        configs = [resumed_config(resume[-1], words)[0]]
    else:
        configs = check("pretrain", words)
    for config in configs:
        check_layout(config.data.name, config.data.root, config.data.download)
        if config.out is not None and not (sweeping or resume) and is_main_process():
            RunFolder(config.out).check_mine(absolute(config))


def _pretrain(words: list[str]) -> None:
    from ssl_samix.pretraining import configured, run

    run(*configured(words))


def _check_show_mixing(words: list[str], _sweeping: bool) -> None:
    from ssl_samix.show_mixing import configured

    configured(words)


def _show_mixing(words: list[str]) -> None:
    from ssl_samix.show_mixing import configured, show

    print(show(configured(words)))


SUBCOMMANDS = {
    "pretrain": Subcommand(
        "learn an encoder from images without labels", "pretrain", _check_pretrain, _pretrain
    ),
    "show-mixing": Subcommand(
        "paint what a trained Mixer makes of images",
        "show_mixing",
        _check_show_mixing,
        _show_mixing,
        sweeps=False,
    ),
}
