"""``samix <subcommand>``: a user's mistake is one sentence and exit status 2."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from ssl_samix.errors import ConfigError, UserError, nearest

SUBCOMMANDS = {
    "pretrain": "learn an encoder from images without labels",
}


def main() -> None:
    """Run the command line."""
    try:
        _dispatch(sys.argv[1:])
    except UserError as error:
        _stop(f"samix: {error}", 2)
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

    from ssl_samix.config import CONFIG_DIR

    settings = [word for word in words if not word.startswith("-")]
    early_checks(settings, sweeping="--multirun" in words or "-m" in words)

    @hydra.main(config_path=str(CONFIG_DIR), config_name="pretrain", version_base="1.3")
    def app(_config: object) -> None:
        # An error is kept from Hydra, which would print a traceback and go on with a sweep.
        try:
            _run_job()
        except (UserError, KeyboardInterrupt) as error:
            raise _Stopped(error) from error

    before = sys.argv
    os.environ["SSL_SAMIX_COMMAND"] = str(os.getpid())
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
    from ssl_samix.config import check, parse

    values = {o.key_or_group: o for o in parse(words)}
    if "resume" in values and values["resume"].value() is not None:
        from ssl_samix.run_folder import resumed_config

        rest = [word for word in words if not word.startswith("resume=")]
        resumed_config(str(values["resume"].value()), rest)
        return
    for config in check("pretrain", words):
        from ssl_samix.data.layout import check_layout
        from ssl_samix.run_folder import RunFolder

        check_layout(config.data.name, config.data.root, config.data.download)
        out = None if sweeping or config.out is None else RunFolder(config.out)
        if out is not None and out.path.is_dir():
            out.check_mine(config, os.listdir(out.path))


def _run_job() -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from ssl_samix.pretraining import configured, run

    signal.signal(signal.SIGTERM, _on_sigterm)
    job = HydraConfig.get()
    words = list(job.overrides.task)
    if job.mode == RunMode.MULTIRUN:
        given = [w for w in words if w.startswith("out=")]
        words = [w for w in words if not w.startswith("out=")]
        name = job.job.override_dirname.replace("/", "_")
        print(f"job {job.job.num}: {' '.join(words)}", flush=True)
        if given:
            words.append(f"{given[-1]}/{name}".replace("out=", "out='", 1) + "'")
    run(*configured(words))


def _on_sigterm(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
