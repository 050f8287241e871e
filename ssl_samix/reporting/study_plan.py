"""Reading a study file: its runs, their arguments and folders. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ssl_samix.errors import ConfigError, check_choice, nearest
from ssl_samix.files import expanded
from ssl_samix.processes import cores

KEYS = (
    "command", "base", "methods", "policies", "seeds", "length", "evaluate", "workers",
    "launcher", "slurm", "reference", "out", "csv",
)  # fmt: skip
COMMANDS = ("pretrain", "supervised")
PROTOCOLS = ("knn", "linear")
LAUNCHERS = ("local", "slurm")
# Resources of a job on a cluster, by submitit's names.
RESOURCE_NUMBERS = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb")
RESOURCES = (*RESOURCE_NUMBERS, "partition", "account", "qos", "constraint")
LENGTHS = {"epochs": "e", "cpu_seconds": "t"}  # kind -> its letter in a run's name
OWN_WORDS = ("seed", "out", "resume", "trainer.max_epochs")  # set by the study for every run
# Arguments that may differ between machines without changing the run.
MACHINE_WORDS = ("data.root=", "data.workers=", "data.memory_gb=", "data.download=", "callbacks.")
RunKey = tuple[str, str, str, str]


class Length(NamedTuple):
    """The length of runs: epochs, or CPU seconds of training without start-up and monitor."""

    kind: str  # epochs | cpu_seconds
    amount: int

    def __str__(self) -> str:
        return f"{LENGTHS[self.kind]}{self.amount}"


@dataclass(frozen=True)
class Run:
    """A run of a study; its arguments exclude seed, folder and number of epochs."""

    method: str  # its name in the study file
    policy: str  # likewise
    length: Length
    seed: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.method}-{self.policy}-{self.length}-s{self.seed}"

    @property
    def key(self) -> RunKey:
        """Method, policy, length and seed, which identify the run's row in the table."""
        return self.method, self.policy, str(self.length), str(self.seed)

    @property
    def settings(self) -> str:
        """The arguments that define the run, equal on all machines."""
        return settings_of(self.words)


def settings_of(words: Sequence[str]) -> str:
    """Return arguments as sorted text, without those that may differ between machines."""
    return " ".join(sorted(word for word in words if not word.startswith(MACHINE_WORDS)))


def differing_words(ours: str, theirs: str) -> str:
    """Return the arguments that only one of two settings has."""
    return " ".join(sorted({*ours.split()} ^ {*theirs.split()}))


@dataclass(frozen=True)
class Study:
    """The contents of a study file; words are ``key=value`` arguments of ``command``."""

    path: Path
    command: str  # pretrain | supervised
    base: tuple[str, ...]  # arguments of all runs
    methods: dict[str, tuple[str, ...]]  # name -> arguments
    policies: dict[str, tuple[str, ...]]  # likewise
    seeds: dict[str, tuple[int, ...]]  # by policy
    lengths: tuple[Length, ...]  # of one kind, the shortest first
    evaluate: tuple[str, ...]  # evaluation protocols of every run
    workers: int  # number of parallel runs
    launcher: str  # local | slurm
    slurm: dict[str, Any]  # resources of a job on a cluster, by the names in RESOURCES
    reference: str  # the policy that the others are compared with
    out: Path  # folder of all runs
    csv: Path  # file of the table

    def words(self, method: str, policy: str) -> tuple[str, ...]:
        """Return the arguments of a method with a policy; the last value of a key wins."""
        last: dict[str, str] = {}
        for word in (*self.base, *self.methods[method], *self.policies[policy]):
            key = word.partition("=")[0].lstrip("+")
            last.pop(key, None)  # the position is that of the last one, too
            last[key] = word
        return tuple(last.values())

    def runs(self) -> list[Run]:
        """Return all runs, shortest first; within a length, ordered by seed first."""
        seeds = sorted({seed for own in self.seeds.values() for seed in own})
        cells = product(self.lengths, seeds, self.methods, self.policies)
        return [
            Run(method, policy, length, seed, self.words(method, policy))
            for length, seed, method, policy in cells
            if seed in self.seeds[policy]
        ]

    def folder(self, run: Run) -> Path:
        """Return a run's folder."""
        return self.out / run.name

    @property
    def logs(self) -> Path:
        """Folder of the runs' logs, notes and locks."""
        return self.out / "logs"

    def training(self, run: Run, epochs: int | str) -> list[str]:
        """Return the ``samix`` arguments that train a run, starting from its last checkpoint."""
        own = [f"trainer.max_epochs={epochs}", f"seed={run.seed}", f"out={self.folder(run)}"]
        return [self.command, *run.words, *own]

    def measuring(self, run: Run, protocol: str) -> list[str]:
        """Return the ``samix`` arguments that evaluate a run."""
        return [protocol, f"run={self.folder(run)}", f"out={self.results(run, protocol).parent}"]

    def results(self, run: Run, protocol: str) -> Path:
        """Return the results file of a protocol for a run."""
        return self.folder(run) / "results" / f"study-{protocol}" / "results.json"


def read_study(path: Path, words: Sequence[str] = (), **changed: Any) -> Study:
    """Read a study file.

    Args:
        path: The file.
        words: Further arguments of all runs, after those of ``base``.
        **changed: Values that override keys of the file; ``slurm`` is merged into the file's.

    Raises:
        ConfigError: For the first error.
    """
    try:
        held = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ConfigError(f"cannot read the study {path}: {error.strerror or error}") from error
    except YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_first_line(error)}") from error
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    if not isinstance(held, dict):
        raise ConfigError(f"{path} needs keys: {', '.join(KEYS)}")
    try:
        slurm = {**_mapping("slurm", held.get("slurm") or {}), **changed.pop("slurm", {})}
        return _study(path, {**held, **changed, "slurm": slurm}, words)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _study(path: Path, given: Mapping[Any, Any], words: Sequence[str]) -> Study:
    for key in given:
        if key not in KEYS:
            raise ConfigError(nearest(str(key), KEYS, "key"))
    for key in ("methods", "policies", "seeds", "length"):
        if not given.get(key):
            raise ConfigError(f"it lacks {key}")
    command, launcher = given.get("command", "pretrain"), given.get("launcher", "local")
    check_choice("command", command, COMMANDS)
    check_choice("launcher", launcher, LAUNCHERS)
    policies = _named("policies", given["policies"])
    reference = given.get("reference", "none" if "none" in policies else next(iter(policies)))
    check_choice("reference", reference, policies)
    evaluate = _list("evaluate", given.get("evaluate", PROTOCOLS if command == "pretrain" else ()))
    for protocol in evaluate:
        check_choice("evaluate", protocol, PROTOCOLS)
    out = expanded(str(given.get("out", f"runs/studies/{path.stem}")))
    return Study(
        path=path,
        command=command,
        base=(*_words("base", given.get("base", [])), *_words("the command line", words)),
        methods=_named("methods", given["methods"]),
        policies=policies,
        seeds=_seeds(given["seeds"], policies),
        lengths=_lengths(given["length"]),
        evaluate=tuple(evaluate),
        workers=_workers(given.get("workers", "auto"), launcher),
        launcher=launcher,
        slurm=_resources(given["slurm"]),
        reference=reference,
        out=out,
        csv=expanded(str(given.get("csv", out / f"{path.stem}.csv"))),
    )


def _list(key: str, value: object) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key} must be a list, got {value!r}")
    return value


def _mapping(key: str, value: object) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be names with values, got {value!r}")
    return value


def _whole(key: str, value: object, least: int, others: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key} needs {others}whole numbers from {least}, got {value!r}")
    return value


def _words(key: str, value: object) -> tuple[str, ...]:
    for word in _list(key, value):
        name, equals, _ = str(word).partition("=")
        if not (isinstance(word, str) and equals and name):
            raise ConfigError(f"{key} holds {word!r}, which is not of the form key=value")
        if name in OWN_WORDS:
            raise ConfigError(f"{key} holds {word}: {name} is given by the study")
    return tuple(_list(key, value))


def _named(key: str, value: object) -> dict[str, tuple[str, ...]]:
    for name in _mapping(key, value):
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.]+", name):
            raise ConfigError(f"{key}: a name is of letters, digits, _ and ., got {name!r}")
    return {k: _words(f"{key}.{k}", words or []) for k, words in _mapping(key, value).items()}


def _seeds(value: object, policies: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    by_name = value if isinstance(value, Mapping) else {"default": value}
    found: dict[str, tuple[int, ...]] = {}
    for name, seeds in by_name.items():
        check_choice("seeds", name, ["default", *policies])
        own = [_whole(f"seeds.{name}", seed, 0) for seed in _list(f"seeds.{name}", seeds)]
        found[name] = tuple(dict.fromkeys(own))
    lacking = [name for name in policies if not {name, "default"} & found.keys()]
    if lacking:
        raise ConfigError(f"seeds says nothing of {lacking[0]}: add it, or default")
    return {name: found.get(name, found.get("default", ())) for name in policies}


def _lengths(value: object) -> tuple[Length, ...]:
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"length needs one of {' and '.join(LENGTHS)}, got {value!r}")
    [(kind, amounts)] = value.items()
    check_choice("length", kind, LENGTHS)
    amounts = amounts if isinstance(amounts, list) else [amounts]
    whole = {_whole(f"length.{kind}", amount, 1) for amount in amounts}
    return tuple(Length(str(kind), amount) for amount in sorted(whole))


def _workers(value: object, launcher: str) -> int:
    if value == "auto" and launcher == "slurm":
        return 2**31  # the cluster's queue sets the limit
    if value == "auto":
        return cores()
    return _whole("workers", value, 1, "auto or ")


def _resources(given: Mapping[Any, Any]) -> dict[str, Any]:
    for key, value in given.items():
        if key not in RESOURCES:
            raise ConfigError(nearest(str(key), RESOURCES, "key of slurm"))
        if key in RESOURCE_NUMBERS:
            _whole(f"slurm.{key}", value, 0)
    return dict(given)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
