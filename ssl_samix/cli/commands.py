"""The table of ``samix`` subcommands, with the function that checks and the one that runs each.

Nothing here imports torch before a subcommand runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Subcommand:
    """A subcommand with a configuration; both functions import lazily, when they are called."""

    text: str  # its line in the help
    config: str  # name of its configuration
    check: Callable[[list[str], bool], None]  # finds errors early: arguments, sweeping
    job: Callable[[list[str]], None]  # runs with ``key=value`` arguments
    late_keys: tuple[str, ...] = ()  # prefixes of keys that only the job can compose
    sweeps: bool = True  # whether --multirun is allowed; ``out`` then holds all jobs
    trains: bool = False  # whether each job has a run folder


@dataclass(frozen=True)
class PlainSubcommand:
    """A subcommand without a configuration: ``samix <name> <argument>...``."""

    text: str  # its line in the help
    main: Callable[[list[str]], str]  # returns the text to print


def _training(text: str, command: str, module: str) -> Subcommand:
    """Return the subcommand of a training mode, run by ``train_from_words`` of ``module``."""

    def check(words: list[str], sweeping: bool) -> None:
        """Check keys, data and the run folder before torch is imported.

        Args:
            words: ``key=value`` arguments.
            sweeping: Whether several values are a sweep; each job then has its own folder.

        Raises:
            UserError: For the first error.
        """
        from ssl_samix.artifacts.run_folder import RunFolder, resumed_config
        from ssl_samix.config.compose import absolute, check, parse
        from ssl_samix.config.extras import check_extras
        from ssl_samix.data.layout import check_layout
        from ssl_samix.errors import ConfigError
        from ssl_samix.processes import is_main_process

        roots = sum(override.key_or_group == "data.root" for override in parse(words))
        if roots > 1:  # only the last would be used, one shard of many
            raise ConfigError(
                f"data.root is given {roots} times: put a pattern with braces in quotes, else the "
                "shell writes it out"
            )
        resume = [o.value() for o in parse(words) if o.key_or_group == "resume"]
        if resume and resume[-1] is not None:
            configs = [resumed_config(command, resume[-1], words)[0]]
        else:
            configs = check(command, words)
        for config in configs:
            check_extras(config)
            check_layout(config.data.name, config.data.root, config.data.download)
            if config.out is not None and not (sweeping or resume) and is_main_process():
                RunFolder(config.out).check_same_run(absolute(config))

    def job(words: list[str]) -> None:
        from importlib import import_module

        from ssl_samix.artifacts.run_folder import RunFolder
        from ssl_samix.reporting.report import write_wanted

        run = import_module(f"ssl_samix.{module}").train_from_words(words)
        write_wanted(RunFolder(run.out))

    late = ("backbone.options", "trainer.extra", "callbacks.extra", "views.")
    return Subcommand(text, command, check, job, late, trains=True)


def _check_show_mixing(words: list[str], _sweeping: bool) -> None:
    from ssl_samix.cli.show_mixing import parse_show_mixing

    parse_show_mixing(words)


def _show_mixing(words: list[str]) -> None:
    from ssl_samix.cli.show_mixing import parse_show_mixing, show

    print(show(parse_show_mixing(words)))


def _check_export(words: list[str], _sweeping: bool) -> None:
    from ssl_samix.artifacts.export import parse_export

    parse_export(words)


def _export(words: list[str]) -> None:
    from ssl_samix.artifacts.export import export, parse_export

    done = export(parse_export(words))
    print(done.path)
    print(done.usage, file=sys.stderr)  # stdout has the path only, for scripts


def _check_push(words: list[str], _sweeping: bool) -> None:
    from ssl_samix.artifacts.push import parse_push

    parse_push(words)


def _push(words: list[str]) -> None:
    from ssl_samix.artifacts.push import parse_push, push

    print(push(parse_push(words)))


def _protocol(text: str, name: str, module: str, labels: bool = True) -> Subcommand:
    """Return the subcommand of ``eval_protocols/<module>.py`` with configuration ``name``.

    Args:
        text: Its line in the help.
        name: Name of the configuration.
        module: Name of the file.
        labels: Whether it needs labelled images.
    """

    def check(words: list[str], _sweeping: bool) -> None:
        from ssl_samix.config.compose import combinations
        from ssl_samix.evaluation.request import check_labels, parse_protocol

        sets = [
            parse_protocol(name, combination).config.data for combination in combinations(words)
        ]
        if labels:  # each data set once: large folders take a second
            for data in {(data.root, data.labels): data for data in sets}.values():
                check_labels(data)

    def job(words: list[str]) -> None:
        from ssl_samix.evaluation.request import parse_protocol

        request = parse_protocol(name, words)
        protocol = load_protocol(module)
        protocol.check(request.config)
        print(protocol.run(request))

    return Subcommand(text, name, check, job, late_keys=("data.",))


def load_protocol(module: str) -> Any:
    """Return the module of ``eval_protocols``."""
    from importlib import import_module
    from importlib.util import find_spec

    # An installed package contains the protocols; in a checkout they are next to it.
    inside = find_spec("ssl_samix.eval_protocols") is not None
    return import_module(f"{'ssl_samix.' if inside else ''}eval_protocols.{module}")


def _compare(words: list[str]) -> str:
    from ssl_samix.reporting.compare import main

    return main(words)


def _runs(words: list[str]) -> str:
    from ssl_samix.reporting.runs import main

    return main(words)


def _report(words: list[str]) -> str:
    from ssl_samix.reporting.report import main

    return main(words)


def _recipes(words: list[str]) -> str:
    from ssl_samix.cli.recipes import main

    return main(words)


def _convert(words: list[str]) -> str:
    from ssl_samix.cli.convert import main

    return main(words)


def _study(words: list[str]) -> str:
    if os.name == "nt":
        from ssl_samix.errors import UserError

        raise UserError("samix study needs Linux or macOS: on Windows use --multirun")
    from ssl_samix.reporting.study import main

    return main(words)


def _check_embed(words: list[str], _sweeping: bool) -> None:
    from ssl_samix.evaluation.embed import parse_embed

    parse_embed(words)


def _embed(words: list[str]) -> None:
    from ssl_samix.evaluation.embed import embed, parse_embed

    print(embed(parse_embed(words)))


def _check_outliers(words: list[str], _sweeping: bool) -> None:
    from ssl_samix.evaluation.outliers import parse_outliers

    parse_outliers(words)


def _outliers(words: list[str]) -> None:
    from ssl_samix.evaluation.outliers import find_outliers, parse_outliers, summary

    request = parse_outliers(words)
    print(summary(find_outliers(request), request.config.shown))


SUBCOMMANDS: dict[str, Subcommand | PlainSubcommand] = {
    "pretrain": _training(
        "learn an encoder from images without labels", "pretrain", "training.pretrain"
    ),
    "supervised": _training(
        "train a classifier from labelled images", "supervised", "training.supervised"
    ),
    "show-mixing": Subcommand(
        "paint what a trained Mixer makes of images",
        "show_mixing",
        _check_show_mixing,
        _show_mixing,
        sweeps=False,
    ),
    "linear": _protocol("measure an encoder by a linear classifier", "linear", "linear"),
    "knn": _protocol("measure an encoder by nearest neighbours", "knn", "knn"),
    "semi": _protocol("measure an encoder with few labels", "semi", "semi_supervised"),
    "recipes": PlainSubcommand("list published recipes", _recipes),
    "robustness": _protocol(
        "measure a classifier, also under attack and corruptions", "robustness", "robustness"
    ),
    "measures": _protocol(
        "measure an encoder without labels, and by clustering",
        "measures",
        "measures",
        labels=False,
    ),
    "runs": PlainSubcommand("list run folders", _runs),
    "compare": PlainSubcommand("put the results of several runs into one table", _compare),
    "report": PlainSubcommand("write an HTML report of runs", _report),
    "study": PlainSubcommand("do a table of runs from one file", _study),
    "convert": PlainSubcommand("turn another project's checkpoint into files of ours", _convert),
    "embed": Subcommand(
        "write the features of a folder of images", "embed", _check_embed, _embed, sweeps=False
    ),
    "outliers": Subcommand(
        "list the most isolated and the most alike images",
        "outliers",
        _check_outliers,
        _outliers,
        sweeps=False,
    ),
    "export": Subcommand(
        "write an encoder for other libraries and runtimes",
        "export",
        _check_export,
        _export,
        sweeps=False,
    ),
    "push": Subcommand(
        "send a run to the Hugging Face hub", "push", _check_push, _push, sweeps=False
    ),
}
