"""What a file says of a configuration, as data: it names values and no code. Imports no torch.

A run folder may be somebody else's. So a file gives values alone, and every class that is built
from them is the one that the installed configuration names at that place.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl_samix.config.compose import check_fit, is_hydras
from ssl_samix.errors import CheckpointError, ConfigError

LARGEST = 64 * 1024  # bytes; a run writes about 4,000
DEEPEST = 8  # mappings and lists in each other; a run writes 4
# Classes of the package move from version to version; the choices name them.
PACKAGE_PREFIX = "ssl_samix."


def read_plain(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys, lists and values, without aliases and tags.

    Raises:
        CheckpointError: If it is damaged, too large, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode("utf-8")
        reason = "it is too large" if len(content) > LARGEST else _beyond_plain(text)
        read = None if reason else OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: not a configuration") from error
    if reason:
        raise CheckpointError(f"{path} is damaged or not the configuration of a run: {reason}")
    return read  # type: ignore[return-value]  # it begins with a key


def _beyond_plain(text: str) -> str | None:
    """Say what a YAML text has that no run writes, before anything is made of it."""
    depth, root = 0, True
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = f"in line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None:  # of a definition, and of an alias
            return f"it has an anchor or alias {place}"
        if isinstance(event, (yaml.CollectionStartEvent, yaml.ScalarEvent)):
            if root and not isinstance(event, yaml.MappingStartEvent):
                break
            root = False
            if event.tag is not None:
                return f"it has a tag {place}"
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            return f"it is nested too deeply {place}"
    return "it does not consist of keys and values" if root else None


def merged(
    said: Mapping[str, Any], installed: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Return the installed configuration with the values of a file, which has no other keys.

    Args:
        said: Nested keys, of any origin.
        installed: Those of the composed configuration, with its classes.
        prefix: Of the keys, for errors.

    Returns:
        The file's keys and values; a key that it does not have is not there. Classes, and what else
        Hydra reads, are those of ``installed``.

    Raises:
        ConfigError: For an unknown key, a value of another kind, a class that is not the installed
            one, or an interpolation.
    """
    config = _merged(said, installed, prefix)
    check_fit(prefix.rstrip("."), config, installed)
    return config


def _merged(said: Mapping[str, Any], installed: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    config = {key: value for key, value in installed.items() if is_hydras(key)}
    for key, value in said.items():
        name = f"{prefix}{key}"
        own = installed.get(key)
        if is_hydras(key):
            _check_class(name, value, own)
        elif isinstance(value, dict) and isinstance(own, dict):
            config[key] = _merged(value, own, f"{name}.")
        else:
            _check_resolved(name, value)
            config[key] = value
    return config


def _check_class(key: str, theirs: Any, own: Any) -> None:
    """Refuse a class other than the installed one; one of ours has only moved."""
    moved = str(theirs).startswith(PACKAGE_PREFIX) and str(own).startswith(PACKAGE_PREFIX)
    if theirs != own and not moved:
        instead = "nothing is built" if own is None else f"{own} is built"
        raise ConfigError(f"{key} is {theirs}, where {instead}")


def _check_resolved(key: str, value: Any) -> None:
    """Refuse what OmegaConf would replace by something else, in lists too."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left.extend(part)
        elif isinstance(part, str) and ("${" in part or part == "???"):
            raise ConfigError(f"{key} is {part}, and only values are read")
