"""Where the configurations are, and how a command line becomes one: checked, then composed.

Nothing here imports torch: a mistyped key is told before the first heavy import.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ssl_samix.errors import ConfigError, UserError, nearest

_PACKAGE = Path(__file__).resolve().parent
# Installed, the configurations are inside the package; in a checkout they stand beside it.
CONFIG_DIR = next(d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir())
MOST_COMBINATIONS = 64  # of a sweep, checked before it starts


def groups() -> dict[str, list[str]]:
    """Return each config group and the names that it offers."""
    folders = sorted(d for d in CONFIG_DIR.iterdir() if d.is_dir() and not d.name.startswith("_"))
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in folders}


def parse(arguments: Sequence[str]) -> list[Override]:
    """Parse ``key=value`` words.

    Raises:
        ConfigError: For a word of another form, and for additions and removals.
    """
    overrides = []
    for word in arguments:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise ConfigError(f"'{word}' is not of the form key=value") from error
        if override.is_add() or override.is_force_add() or override.is_delete():
            raise ConfigError(f"'{word}': keys are neither added nor removed, write key=value")
        overrides.append(override)
    return overrides


def check(config_name: str, arguments: Sequence[str]) -> list[DictConfig]:
    """Compose every combination of a command line's choices, to find its mistakes early.

    Raises:
        ConfigError: With the nearest valid name for an unknown group choice or key.
    """
    overrides = [o for o in parse(arguments) if not o.key_or_group.startswith("hydra")]
    variants = [list(_variants(o)) for o in overrides]
    combinations = itertools.islice(itertools.product(*variants), MOST_COMBINATIONS)
    return [compose(config_name, words)[0] for words in combinations]


def _variants(override: Override) -> Iterable[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]


def compose(config_name: str, arguments: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """Compose a configuration.

    Args:
        config_name: ``pretrain`` and so on.
        arguments: ``key=value`` words.

    Returns:
        The configuration, resolved, in struct mode; and the choice made in each group.

    Raises:
        ConfigError: For an unknown name or key (with the nearest valid one) or a value of another
            type than the default's.
    """
    overrides = [o for o in parse(arguments) if not o.key_or_group.startswith("hydra")]
    known = groups()
    chosen = [o for o in overrides if o.key_or_group in known]
    for override in chosen:
        name = str(override.value())
        if override.value() is not None and name not in known[override.key_or_group]:
            raise ConfigError(nearest(name, known[override.key_or_group], override.key_or_group))
    base, _ = _compose(config_name, [str(o.input_line) for o in chosen])
    for override in overrides:
        if override not in chosen:
            check_value(base, override.key_or_group, override.value(), known)
    return _compose(config_name, [str(o.input_line) for o in overrides])


def check_value(config: DictConfig, key: str, value: Any, known: Iterable[str] = ()) -> None:
    """Check that ``config`` has ``key`` and that ``value`` is of its default's type.

    Raises:
        ConfigError: If it has not, with the nearest key; or if the type differs.
    """
    keys = list(_keys(config))
    if key not in keys:
        raise ConfigError(nearest(key, [*keys, *known], "key"))
    default = OmegaConf.select(config, key)
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}
    for kind, words in wanted.items():
        if type(default) is kind:
            fits = type(value) is kind or (kind is float and type(value) is int)
            if not fits:
                raise ConfigError(f"{key} needs {words}, got '{value}'")


def _keys(config: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in map(str, config):
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _keys(node, f"{prefix}{key}.")


def _compose(config_name: str, words: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    # Inside a Hydra app the global state is taken; it is put back afterwards.
    taken = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            whole = hydra_compose(config_name, overrides=list(words), return_hydra_config=True)
            choices = {k: v for k, v in whole.hydra.runtime.choices.items() if "/" not in k}
            with open_dict(whole):
                del whole["hydra"]
            OmegaConf.resolve(whole)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    finally:
        GlobalHydra.instance().hydra = taken
    return whole, choices


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dicts, lists and values, for checkpoints."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def build(config: DictConfig, **arguments: Any) -> Any:
    """Instantiate a node with plain arguments; a user's mistake stays a ``UserError``."""
    try:
        return instantiate(config, _partial_=True, _convert_="all")(**arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
