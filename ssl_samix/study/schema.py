"""A study file, read and checked. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl_samix.errors import ConfigError, check_choice, check_range, nearest
from ssl_samix.files import expanded
from ssl_samix.study.plan import LENGTHS, Length, Study

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
