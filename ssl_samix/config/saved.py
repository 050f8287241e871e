"""Reading saved configurations safely, as values and never as code. Imports no torch.

A run folder may come from an untrusted source. So only values are read from a file; the classes
that are instantiated are those that the installed configuration has at the same keys.
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

LARGEST = 64 * 1024  # bytes; a run's file has about 4,000
DEEPEST = 8  # levels of nesting; a run's file has 4
# Classes of the package may move between versions; the choices identify them.
PACKAGE_PREFIX = "ssl_samix."
# Classes of libraries in older runs, and those of the package that do the same.
REPLACED = {("lightly.utils.lars.LARS", "ssl_samix.optim.LARS")}


def read_plain(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file of keys, lists and values, without aliases and tags.

    Raises:
        CheckpointError: If it is unreadable, damaged, too large, or has anything else.
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
    return read  # type: ignore[return-value]  # its root is a mapping


def _beyond_plain(text: str) -> str | None:
    """Return what makes a YAML text unsafe or not a configuration, or None; builds no objects."""
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
    """Return a file's keys and values, checked, with the classes of the installed configuration.

    Args:
        said: Nested keys and values of any origin.
        installed: The composed configuration, with its classes.
        prefix: Prefix of the keys, for errors.

    Returns:
        The file's keys and values; keys that the file lacks are not added. Classes and other keys
        of Hydra are those of ``installed``.

    Raises:
        ConfigError: For an unknown key, a value of the wrong type, a class that is not the
            installed one, or an interpolation.
    """
    config = _merged(said, installed, prefix)
    check_fit(prefix.rstrip("."), config, installed)
    return config


def without_classes(part: Any) -> dict[str, Any]:
    """Return a part of a file's configuration without classes and other keys of Hydra.

    Raises:
        ConfigError: If it does not consist of keys and values.
    """
    if not isinstance(part, dict):
        raise ConfigError(f"{part} is where keys and values belong")
    inner = {k: without_classes(v) if isinstance(v, dict) else v for k, v in part.items()}
    return {key: value for key, value in inner.items() if not is_hydras(key)}


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
    """Check that a class is the installed one; if both are of this package, it may have moved."""
    moved = str(theirs).startswith(PACKAGE_PREFIX) and str(own).startswith(PACKAGE_PREFIX)
    moved |= isinstance(theirs, str) and (theirs, own) in REPLACED
    if theirs != own and not moved:
        instead = "nothing is built" if own is None else f"{own} is built"
        raise ConfigError(f"{key} is {theirs}, where {instead}")


def _check_resolved(key: str, value: Any) -> None:
    """Raise ``ConfigError`` for interpolations and missing values (``???``), at any depth."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left.extend([*part, *part.values()])
        elif isinstance(part, list):
            left.extend(part)
        elif isinstance(part, str) and ("${" in part or part == "???"):
            raise ConfigError(f"{key} is {part}, and only values are read")
