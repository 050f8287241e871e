"""A study file, read and checked: its runs, their words and folders. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl_samix.errors import ConfigError, check_choice, check_range, nearest
from ssl_samix.files import expanded

LENGTHS = {"epochs": "e", "cpu_seconds": "t"}  # key -> how a run's name says it
# What a run may have otherwise on another machine, and is the same run all the same.
ELSEWHERE = ("data.root=", "data.workers=", "data.memory_gb=", "data.download=", "callbacks.")


@dataclass(frozen=True)
class Length:
    """How long runs are.

    Attributes:
        kind: ``epochs`` or ``cpu_seconds``.
        amount: How many; seconds are processor time of training, start and monitor left out.
    """

    kind: str
    amount: int

    def __str__(self) -> str:
        return f"{LENGTHS[self.kind]}{self.amount}"


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        method: Its name in the study file.
        policy: Likewise.
        length: How long it is.
        seed: Of weights, order and views.
        words: ``key=value`` words, without seed, folder and number of epochs.
    """

    method: str
    policy: str
    length: Length
    seed: int
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.method}-{self.policy}-{self.length}-s{self.seed}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What its row of the table is found by."""
        return self.method, self.policy, str(self.length), str(self.seed)

    @property
    def settings(self) -> str:
        """The words that make it what it is, wherever it runs."""
        return settings_of(self.words)


def settings_of(words: Sequence[str]) -> str:
    """Write words, but for those that may differ between machines, in one order."""
    return " ".join(sorted(word for word in words if not word.startswith(ELSEWHERE)))


def differing_words(ours: str, theirs: str) -> str:
    """Return the words that only one of two settings has."""
    return " ".join(sorted({*ours.split()} ^ {*theirs.split()}))


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        path: The file.
        command: ``pretrain`` or ``supervised``.
        base: Words of all runs.
        methods: Words by name.
        policies: Words by name.
        seeds: By policy.
        lengths: The shortest first.
        evaluate: Protocols that measure every run.
        workers: Runs at the same time.
        reference: The policy that others are compared with.
        out: Folder of the runs.
        csv: The table.
    """

    path: Path
    command: str
    base: tuple[str, ...]
    methods: dict[str, tuple[str, ...]]
    policies: dict[str, tuple[str, ...]]
    seeds: dict[str, tuple[int, ...]]
    lengths: tuple[Length, ...]
    evaluate: tuple[str, ...]
    workers: int
    reference: str
    out: Path
    csv: Path

    def words(self, method: str, policy: str) -> tuple[str, ...]:
        """Return the words of a cell of the table; of those for one key the last wins."""
        last: dict[str, str] = {}
        for word in (*self.base, *self.methods[method], *self.policies[policy]):
            key = word.partition("=")[0].lstrip("+")
            last.pop(key, None)  # its place, too, is that of the last
            last[key] = word
        return tuple(last.values())

    def runs(self) -> list[Run]:
        """Return all runs: the shortest first, and the first seed of all before the second."""
        every = sorted({seed for seeds in self.seeds.values() for seed in seeds})
        return [
            Run(method, policy, length, seed, self.words(method, policy))
            for length, seed, method, policy in product(
                self.lengths, every, self.methods, self.policies
            )
            if seed in self.seeds[policy]
        ]

    def folder(self, run: Run) -> Path:
        """Return a run's folder."""
        return self.out / run.name

    @property
    def logs(self) -> Path:
        """Folder of what the runs say, and of what the study notes of them."""
        return self.out / "logs"

    def training(self, run: Run, epochs: int) -> list[str]:
        """Return the words after ``samix`` that train a run, from its last checkpoint on."""
        given = [f"trainer.max_epochs={epochs}", f"seed={run.seed}", f"out={self.folder(run)}"]
        return [self.command, *run.words, *given]

    def measuring(self, run: Run, protocol: str) -> list[str]:
        """Return the words after ``samix`` that measure a run."""
        out = self.results(run, protocol).parent
        return [protocol, f"run={self.folder(run)}", f"out={out}"]

    def results(self, run: Run, protocol: str) -> Path:
        """Return the file that is there when a run has been measured."""
        return self.folder(run) / "results" / f"study-{protocol}" / "results.json"


KEYS = (
    "command", "base", "methods", "policies", "seeds", "length", "evaluate", "workers",
    "reference", "out", "csv",
)  # fmt: skip
COMMANDS = ("pretrain", "supervised")
PROTOCOLS = ("knn", "linear")
OWN_WORDS = ("seed", "out", "resume", "trainer.max_epochs")  # which the study gives every run


def read_study(path: Path, words: Sequence[str] = (), **changed: Any) -> Study:
    """Read a study file.

    Args:
        path: The file.
        words: Further words of all runs, after those of ``base``.
        **changed: Keys of the file with other values; None is left out.

    Raises:
        ConfigError: For the first mistake.
    """
    try:
        read = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ConfigError(f"cannot read the study {path}: {error.strerror or error}") from error
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    except Exception as error:  # yaml.YAMLError has no base that says more
        if not type(error).__module__.startswith("yaml"):
            raise
        raise ConfigError(f"{path} is no YAML: {_first_line(error)}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{path} needs keys: {', '.join(KEYS)}")
    given = {**read, **{k: v for k, v in changed.items() if v is not None}}
    try:
        return _study(path, given, tuple(words))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _study(path: Path, given: dict[Any, Any], words: tuple[str, ...]) -> Study:
    for key in given:
        if key not in KEYS:
            raise ConfigError(nearest(str(key), KEYS, "key"))
    for key in ("methods", "policies", "seeds", "length"):
        if not given.get(key):
            raise ConfigError(f"it lacks {key}")
    command = given.get("command", "pretrain")
    check_choice("command", command, COMMANDS)
    policies = _named("policies", given["policies"])
    reference = given.get("reference", "none" if "none" in policies else next(iter(policies)))
    check_choice("reference", reference, policies)
    evaluate = given.get("evaluate", PROTOCOLS if command == "pretrain" else ())
    for protocol in _list("evaluate", evaluate):
        check_choice("evaluate", protocol, PROTOCOLS)
    out = expanded(str(given.get("out", f"runs/studies/{path.stem}")))
    return Study(
        path,
        command,
        (*_words("base", given.get("base", [])), *_words("the command line", list(words))),
        _named("methods", given["methods"]),
        policies,
        _seeds(given["seeds"], policies),
        _lengths(given["length"]),
        tuple(evaluate),
        _workers(given.get("workers", "auto")),
        reference,
        out,
        expanded(str(given.get("csv", out / f"{path.stem}.csv"))),
    )


def _list(key: str, value: object) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key} must be a list, got {value!r}")
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
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be names with lists of words, got {value!r}")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.]+", name):
            raise ConfigError(f"{key}: a name is of letters, digits, _ and ., got {name!r}")
    return {name: _words(f"{key}.{name}", words or []) for name, words in value.items()}


def _seeds(value: object, policies: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    by_name: Mapping[Any, Any] = value if isinstance(value, Mapping) else {"default": value}
    found = {}
    for name, seeds in by_name.items():
        check_choice("seeds", name, ["default", *policies])
        for seed in _list(f"seeds.{name}", seeds):
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise ConfigError(f"seeds.{name} needs whole numbers from 0, got {seed!r}")
        found[name] = tuple(dict.fromkeys(seeds))
    lacking = [name for name in policies if name not in found and "default" not in found]
    if lacking:
        raise ConfigError(f"seeds says nothing of {lacking[0]}: add it, or default")
    return {name: found.get(name, found.get("default", ())) for name in policies}


def _lengths(value: object) -> tuple[Length, ...]:
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"length needs one of {' and '.join(LENGTHS)}, got {value!r}")
    [(kind, amounts)] = value.items()
    check_choice("length", kind, LENGTHS)
    amounts = amounts if isinstance(amounts, list) else [amounts]
    for amount in amounts:
        if isinstance(amount, bool) or not isinstance(amount, int) or amount < 1:
            raise ConfigError(f"length.{kind} needs whole numbers from 1, got {amount!r}")
    return tuple(Length(str(kind), amount) for amount in sorted(set(amounts)))


def _workers(value: object) -> int:
    if value == "auto":
        affinity = getattr(os, "sched_getaffinity", None)  # Linux's
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if not isinstance(value, int):
        raise ConfigError(f"workers must be auto or a whole number, got {value!r}")
    check_range("workers", value, 1)
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
