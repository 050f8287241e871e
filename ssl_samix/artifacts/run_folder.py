"""Run folders: paths, saved configuration, metrics, lock and resume. Imports no torch."""

from __future__ import annotations

import logging
import os
import re
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ssl_samix.artifacts.hub import local
from ssl_samix.config.compose import (
    check_values,
    compose,
    dotted,
    groups,
    keys_set,
    names_in,
    parse,
    plain,
    quoted,
    set_key,
    typed_config_dir,
)
from ssl_samix.config.saved import merged, read_plain, without_classes
from ssl_samix.errors import CheckpointError, ConfigError, UserError, check_choice
from ssl_samix.files import PARTIAL, expanded, make_folder, new_folder, write_atomically

_log = logging.getLogger(__name__)
# Keys that a resume may change; the network, data and training settings must stay the same.
FREE_KEYS = (
    "out", "resume", "trainer.max_epochs", "trainer.devices", "trainer.accelerator",
    "trainer.precision", "trainer.num_nodes", "trainer.strategy", "trainer.compile", "data.root",
    "data.workers", "data.memory_gb", "data.download", "callbacks.", "logger.", "config_dir",
    "report",
)  # fmt: skip


# Keys added in later versions -> the behaviour of runs from before.
DEFAULTS_FOR_OLD_RUNS = {
    "mixup.during": [0.0, 1.0],
    "mixup.optimizer": "encoder",
    "mixup.lam": "drawn",
    "mixup.mask_decay": True,
    "mixup.local_weight": 1.0,
    "classifier.heads": "one",
}

# Keys that every run's configuration must have, since they are read by name.
NEEDED = (
    "out", "seed", "data.name", "data.root", "data.limit", "data.labels", "data.download",
    "backbone.name", "trainer.max_epochs", "callbacks.checkpoint.every_n_epochs", "callbacks.knn",
    "callbacks.accuracy", "optimizer.optimizer",
)  # fmt: skip
LATER_GROUPS = ("logger",)  # runs from before have no such choice
LONGEST_REASON = 300  # characters


class RunFolder:
    """The paths of one run, with its saved configuration and its lock.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = expanded(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.csv"
        self.last = self.path / "last.ckpt"
        self.best = self.path / "best.ckpt"
        self.encoder = self.path / "encoder.safetensors"
        self.classifier = self.path / "classifier.safetensors"
        self.mixer = self.path / "mixer.safetensors"
        self.pictures = self.path / "mixing"
        self.views = self.path / "views"
        self.tensorboard = self.path / "tensorboard"

    def check_same_run(self, config: DictConfig) -> None:
        """Check that the folder is new, or holds a run with the same configuration.

        A run without a checkpoint may be started again, since nothing is lost.

        Raises:
            UserError: If it belongs to another run, holds other files, or cannot be read; or if a
                finished run has more epochs than the configuration.
        """
        try:
            held = [n for n in os.listdir(self.path) if not n.endswith(PARTIAL)]
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot use out={self.path}: {error.strerror or error}") from error
        if not held:
            return
        if not self.config.exists():
            raise UserError(
                f"out={self.path} is not empty and not a run folder: choose another out"
            )
        if not self.last.exists():
            return
        self.check_epochs(config)
        old, _ = self.load_config(config.get("config_dir"))
        now = dotted(plain(config))
        before = {k: v for k, v in DEFAULTS_FOR_OLD_RUNS.items() if k in now} | dotted(plain(old))
        before |= {key: "auto" for key in self.automatic() if now.get(key) == "auto"}
        for key in sorted({*before, *now}):
            same = before.get(key) == now.get(key)
            if not same and (key == "data.root" or not key.startswith(FREE_KEYS)):
                raise UserError(
                    f"out={self.path} belongs to another run ({key} is {before.get(key)} there, "
                    f"{now.get(key)} here): choose another out"
                )

    def check_epochs(self, config: DictConfig) -> None:
        """Raise ``UserError`` if this is a finished run with more epochs than a configuration."""
        wanted = config.trainer.max_epochs
        if not isinstance(wanted, int) or not (self.encoder.exists() or self.classifier.exists()):
            return
        rows = read_metrics(self.metrics)
        done = int(rows[-1]["epoch"]) + 1 if rows else 0
        if wanted < done:
            raise UserError(
                f"{self.path} is finished after {done} epochs and trainer.max_epochs={wanted}: "
                "give a larger number to continue it, or another out"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder and lock it against training by other processes.

        The lock ends with the process, even if it is killed. Where folders cannot be locked
        (Windows, some network disks) there is no lock.

        Raises:
            UserError: If the folder cannot be made, or another process trains in it.
        """
        make_folder(self.path, "run folder")
        descriptor = _locked(self.path)
        try:
            yield
        finally:
            with suppress(OSError):  # fails, as it should, unless the run left it empty
                self.path.rmdir()
            if descriptor is not None:
                os.close(descriptor)

    def create(
        self,
        config: DictConfig,
        choices: dict[str, str],
        automatic: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the configuration to ``config.yaml``.

        Args:
            config: Configuration in which each ``auto`` is replaced by a value.
            choices: The choice made in each group.
            automatic: Keys that were ``auto``, with their values; those saved before a resume are
                kept.
        """
        kept = {**self.automatic(), **(automatic or {})}
        whole = {"choices": choices, **({"auto": kept} if kept else {}), **plain(config)}
        text = OmegaConf.to_yaml(OmegaConf.create(whole))
        write_atomically(self.config, lambda temporary: temporary.write_text(text, "utf-8"))

    def automatic(self) -> dict[str, Any]:
        """Return the keys that were ``auto`` when the run was started, with their values."""
        said = read_plain(self.config).get("auto") if self.config.is_file() else None
        return said if isinstance(said, dict) else {}

    def load_config(self, config_dir: str | None = None) -> tuple[DictConfig, dict[str, str]]:
        """Return the run's configuration and its choices.

        Only values are read from the file. The classes are those of the installed configuration for
        these choices, since the folder may come from an untrusted source. Of choices from a user's
        own folder, all but the classes is returned, unless that folder is given.

        Args:
            config_dir: A user's folder of choices, as typed; never what the file says.

        Raises:
            CheckpointError: If there is no run in the folder, or its configuration is damaged or
                has anything but values of known keys.
        """
        if not self.config.is_file():
            raise CheckpointError(f"{self.path} is not a run folder: it has no config.yaml")
        said = read_plain(self.config)
        try:
            choices = _choices(said, config_dir)
            whole = OmegaConf.create(merged(said, _installed(said, choices, config_dir)))
        except ConfigError as error:
            reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder="...")
            raise CheckpointError(
                f"{self.config} is damaged or not the configuration of a run: {reason}"
            ) from error
        OmegaConf.set_struct(whole, True)
        return whole, choices


def _choices(said: dict[str, Any], config_dir: str | None) -> dict[str, str]:
    """Remove the choices from a saved configuration and return them.

    Raises:
        ConfigError: If there are none, or a group or choice is neither installed nor in a user's
            folder.
    """
    said.pop("auto", None)  # these values are at their own keys, too
    choices = said.pop("choices", None)
    if not isinstance(choices, dict):
        raise ConfigError("it has no choices")
    known = groups(_command(said, choices), config_dir)
    has_own = isinstance(said.get("config_dir"), str)
    for group, name in choices.items():
        check_choice("group", group, known)
        if group != "experiment":  # its values are in the configuration; the recipe may be gone
            for each in [] if has_own and isinstance(name, str) else names_in(group, name):
                check_choice(group, each, known[group])
        elif not isinstance(name, (str, type(None))):
            raise ConfigError("experiment needs a name")
    if unchosen := next((group for group in known if group in said and group not in choices), None):
        raise ConfigError(f"it has no choices.{unchosen}")
    return choices


def _command(said: dict[str, Any], choices: dict[str, Any]) -> str:
    return command_of({**said, **choices})


def _installed(
    said: dict[str, Any], choices: dict[str, str], config_dir: str | None
) -> dict[str, Any]:
    """Return the installed configuration for a run's choices, and check that the run has its parts.

    Classes are removed from the run's parts whose choices are not installed.

    Raises:
        ConfigError: If the run lacks a part, or its choices cannot be combined.
    """
    command = _command(said, choices)
    unknown = own_choices(command, choices, config_dir)
    words = [f"{g}={n}" for g, n in choices.items() if g != "experiment" and g not in unknown]
    said |= {group: without_classes(said.get(group)) for group in unknown}
    if "data" in unknown:  # read by name, so the keys are those of an installed data set
        name = said["data"].get("name")
        check_choice("data.name", name, groups(command)["data"])
        words.append(f"data={name}")
    if config_dir is None:
        installed = _composed(command, *words)
    else:  # whose files may change between two calls in one process
        installed = _composed.__wrapped__(command, *words, f"config_dir={quoted(config_dir)}")
    later = [group for group in LATER_GROUPS if group not in choices]
    parts = [k for k, v in installed.items() if isinstance(v, dict) and k not in later]
    for key in (*parts, *NEEDED):
        if _has(installed, key) and not _has(said, key):
            raise ConfigError(f"it has no {key}")
    return {**installed, **{group: said[group] for group in unknown if group != "data"}}


def own_choices(
    command: str, choices: Mapping[str, str], config_dir: str | None = None
) -> dict[str, str]:
    """Return those of a run's choices that are neither installed nor in ``config_dir``."""
    known = groups(command, config_dir)
    return {
        g: n for g, n in choices.items()
        if g != "experiment" and not {*names_in(g, n)} <= {*known[g]}
    }  # fmt: skip


@cache
def _composed(command: str, *words: str) -> dict[str, Any]:
    return plain(compose(command, words)[0])


def _has(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return True


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the undamaged rows of a metrics.csv, one per epoch; [] if the file does not exist."""
    lines = _lines(path)
    columns = lines[0].split(",")
    return [dict(zip(columns, line.split(","), strict=True)) for line in _whole(lines)]


def mend_metrics(path: Path) -> None:
    """Remove lines of a metrics.csv that a crash damaged; copy the original file first."""
    lines = _lines(path)
    whole, filled = _whole(lines), [line for line in lines if line]
    header = filled[:1] if "epoch" in lines[0].split(",") else []
    damaged = len(filled) - len(whole) - len(header)
    if not damaged:
        return
    kept, held = path.with_name("metrics.damaged.csv"), path.read_bytes()
    write_atomically(kept, lambda temporary: temporary.write_bytes(held))
    text = "".join(f"{line}\n" for line in [*header, *whole])
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
    _log.warning(
        "%s: %d damaged lines are left out, %d epochs are kept; as it was: %s",
        path, damaged, len(whole), kept,
    )  # fmt: skip


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", "replace").split("\n") if path.exists() else [""]


def _whole(lines: list[str]) -> list[str]:
    """Return the lines with a number or nothing in each column and with increasing epochs."""
    columns = lines[0].split(",")
    if "epoch" not in columns:
        return []
    whole, last = [], -1
    for line in lines[1:]:
        cells = line.split(",")
        row = dict(zip(columns, cells, strict=False))
        complete = len(cells) == len(columns) and all(map(_is_number, cells))
        if complete and re.fullmatch("[0-9]{1,9}", row["epoch"]) and int(row["epoch"]) > last:
            whole.append(line)
            last = int(row["epoch"])
    return whole


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


def weights_file(given: str | os.PathLike[str], name: str) -> Path:
    """Return a file as it is; for a run folder, its file ``name``, else its ``last.ckpt``.

    Args:
        given: The file, the folder, or an address on the hub, which is downloaded.
        name: Name of the file.

    Raises:
        CheckpointError: If the run folder has neither.
        UserError: As ``local``.
    """
    path = local(given)
    if not path.is_dir():
        return path
    found = next((f for f in (path / name, RunFolder(path).last) if f.exists()), None)
    if found is None:
        raise CheckpointError(f"{path} holds no {name} and no last.ckpt")
    return found


def resumed_config(
    command: str, run: str, arguments: list[str]
) -> tuple[DictConfig, dict[str, str]]:
    """Return the saved configuration of a run and its choices, with the arguments of a resume.

    Choices from a user's own folder need that folder among the arguments, since it runs code.

    Args:
        command: ``pretrain`` or ``supervised``.
        run: Its folder.
        arguments: ``key=value`` arguments.

    Raises:
        CheckpointError: If there is no run of this command.
        ConfigError: For an unknown key, or one that a resume cannot change; or if ``config_dir`` is
            missing.
        UserError: If the run is finished and has more epochs than the arguments say.
    """
    overrides = parse(arguments)
    config_dir = typed_config_dir(overrides)
    config, choices = RunFolder(run).load_config(config_dir)
    theirs = command_of(choices)
    if theirs != command:
        raise CheckpointError(f"{run} is a run of samix {theirs}: resume it with that")
    for group, name in own_choices(command, choices, config_dir).items():
        raise ConfigError(
            f"{run} has a {group}={name} of your own: give the folder that holds "
            f"{group}/{name}.yaml, config_dir=<folder>"
        )
    before, own = config.copy(), []
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if key in ("resume", "config_dir") or key.startswith("hydra"):
            continue
        if key not in choices:
            own += keys_set(config, key, value, choices)
        if key in choices or key == "out" or not key.startswith(FREE_KEYS):
            raise ConfigError(f"{key} cannot be changed by a resume: start a new run with it")
        set_key(config, key, value)
    check_values(config, before, own)
    OmegaConf.update(config, "config_dir", config_dir, force_add=True)
    RunFolder(run).check_epochs(config)
    return config, choices


def command_of(choices: Mapping[str, str | None]) -> str:
    """Return the command that trained a run with these choices: pretrain or supervised."""
    return "pretrain" if "method" in choices else "supervised"


def default_out(choices: dict[str, str], seed: int) -> Path:
    """Make and return a new folder under ``runs``, unique among runs started in the same second."""
    how = choices.get("method", "supervised")
    stem = "-".join([choices["data"], how, choices["mixup"], f"s{seed}"])
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return new_folder(Path("runs") / f"{stem}-{stamp}")


def _locked(folder: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"another process trains in {folder}: wait for its end, or choose another out"
        ) from error
    except OSError:
        os.close(descriptor)
        return None
    # A worker that outlives a killed run for some seconds must not keep the lock.
    os.register_at_fork(after_in_child=lambda: _close(descriptor, folder))
    return descriptor


def _close(descriptor: int, folder: Path) -> None:
    """Close a descriptor if it still refers to the folder."""
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            os.close(descriptor)
    except OSError:
        return
