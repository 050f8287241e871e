"""``samix <subcommand>``: a user's mistake is one sentence and exit status 2."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
from typing import NoReturn

from ssl_samix.errors import ConfigError, UserError, nearest

LONGEST_NAME = 180  # characters of a job's folder; file systems allow 255 bytes
SUBCOMMANDS = {
    "pretrain": "learn an encoder from images without labels",
}


def main() -> None:
    """Run the command line."""
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
    elif words[0] == "pretrain":
        _pretrain(words[1:])
    else:
        raise ConfigError(nearest(words[0], SUBCOMMANDS, "subcommand"))


def _help() -> str:
    width = max(map(len, SUBCOMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{text}" for name, text in SUBCOMMANDS.items())
    return (
        "Usage: samix <subcommand> [key=value ...]\n\n"
        f"{rows}\n\n"
        "samix <subcommand> --help shows its configuration."
    )


def _pretrain(words: list[str]) -> None:
    import hydra

    from ssl_samix.config import CONFIG_DIR, parse, quote_paths, quoted
    from ssl_samix.launch import COMMAND

    flags = [word for word in words if word.startswith("-")]
    sweeping = "--multirun" in flags or "-m" in flags
    words = quote_paths(words, sweeping)
    if all(flag in ("--multirun", "-m") for flag in flags):  # others ask for help or information
        settings = [word for word in words if word not in flags]
        early_checks(settings, sweeping)
        out = [o.value() for o in parse(settings) if o.key_or_group == "out"]
        if sweeping and out and out[-1] is not None:
            words.append(f"hydra.sweep.dir={quoted(out[-1])}")

    @hydra.main(config_path=str(CONFIG_DIR), config_name="pretrain", version_base="1.3")
    def app(_config: object) -> None:
        # An error is kept from Hydra, which would print a traceback and go on with a sweep.
        try:
            _run_job()
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


class _Stopped(BaseException):
    """Carries a job's error through Hydra."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def early_checks(words: list[str], sweeping: bool = False) -> None:
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


def _run_job() -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from ssl_samix.config import parse, quoted
    from ssl_samix.pretraining import configured, run

    signal.signal(signal.SIGTERM, _on_sigterm)
    job = HydraConfig.get()
    words = list(job.overrides.task)
    if job.mode == RunMode.MULTIRUN:
        given = [o.value() for o in parse(words) if o.key_or_group == "out"]
        words = [word for word in words if not word.startswith("out=")]
        print(f"job {job.job.num}: {' '.join(words)}", flush=True)
        if given:
            words.append(f"out={quoted(f'{given[-1]}/{job_name(words)}')}")
    run(*configured(words))


def job_name(words: list[str]) -> str:
    """Name a sweep's job by its settings, in characters that need no quotes anywhere."""
    name = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-") for word in words)
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{digest}"


def _on_sigterm(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
