"""Which runs have the same configuration, and in which keys others differ. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ssl_samix.config import compose, dotted, plain
from ssl_samix.errors import ConfigError
from ssl_samix.run_folder import FREE_KEYS, RunFolder, command_of

# What a resume may change does not change what is learned, but for the number of epochs.
UNLEARNED = ("seed", *(key for key in FREE_KEYS if key != "trainer.max_epochs"))
OF_THE_NETWORK = ("backbone.", "data.image_size")  # what an untrained network follows from
# Of the groups that are told.
FIRST = ("method", "mixup", "data", "backbone", "views", "augment", "optimizer")


@dataclass(frozen=True)
class Configuration:
    """What a run learned with.

    Attributes:
        values: Dotted key -> value, without the keys that do not change what is learned.
        choices: Group -> name.
    """

    values: dict[str, Any]
    choices: dict[str, str | None]

    @property
    def identity(self) -> str:
        """The same text for the same values, however they were chosen."""
        return json.dumps(self.values, sort_keys=True)

    def network(self) -> Configuration:
        """Return what an untrained network follows from."""
        values = {k: v for k, v in self.values.items() if k.startswith(OF_THE_NETWORK)}
        return Configuration(values, {"backbone": self.choices.get("backbone")})

    def shown(self, key: str) -> str | None:
        """Return the choice or value under ``key`` as text; None if there is none."""
        if key == "method" and "augment" in self.choices:
            return "supervised"
        if key not in self.values:
            return self.choices.get(key)
        value = self.values[key]
        return value if isinstance(value, str) else json.dumps(value)


def read_configuration(run: RunFolder) -> Configuration:
    """Read what a run learned with.

    Raises:
        CheckpointError: If the folder holds no configuration, or a damaged one.
    """
    config, choices = run.load_config()
    return Configuration(_learned(plain(config)), {**choices})


def _learned(config: dict[str, Any]) -> dict[str, Any]:
    return {k: _number(v) for k, v in dotted(config).items() if not k.startswith(UNLEARNED)}


def _number(value: Any) -> Any:
    """Write 1.0 as 1, as which a user may have given it."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def differing(configurations: Sequence[Configuration]) -> list[str]:
    """Return the groups, then the keys, in which configurations differ.

    A key is left out where each configuration has the value that its choices bring along: that
    ``method=moco`` has a queue and ``method=simclr`` has none is said by the method's name.
    """
    names = {group for c in configurations for group in c.choices if group != "callbacks"}
    ordered = [g for g in FIRST if g in names] + sorted(names.difference(FIRST))
    chosen = {g: {c.choices[g] for c in configurations if g in c.choices} for g in ordered}
    groups = [g for g in ordered if len(chosen[g]) > 1]
    if len({"method" in c.choices for c in configurations}) > 1 and "method" not in groups:
        groups.insert(0, "method")  # of two ways to train, one of which has it
    if all(c.choices.get("views") == c.choices.get("method") for c in configurations):
        groups = [g for g in groups if g != "views"]  # a method brings its own
    keys = dict.fromkeys(key for c in configurations for key in c.values)
    return groups + [key for key in keys if _differs(key, configurations)]


def _differs(key: str, configurations: Sequence[Configuration]) -> bool:
    values = {json.dumps(c.values.get(key)) for c in configurations}
    return len(values) > 1 and any(
        c.values.get(key) != _usual(tuple(c.choices.items())).get(key) for c in configurations
    )


@cache
def _usual(choices: tuple[tuple[str, str | None], ...]) -> dict[str, Any]:
    """Return the values that choices bring along; none if one of them is unknown here."""
    try:
        words = [f"{group}={name}" for group, name in choices if name is not None]
        config, _ = compose(command_of(dict(choices)), words)
    except ConfigError:
        return {}
    return _learned(plain(config))
