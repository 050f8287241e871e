"""Which arguments of ``timm.create_model`` a configuration or a file may give. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssl_samix.errors import ConfigError

KEY = "backbone.options"
FILES = ("checkpoint_path", "cache_dir")  # a local file or folder
PUBLISHED = "pretrained"  # what names of published weights begin with
LISTS = (list, tuple)
VALUES = (str, int, float, bool, type(None))


def check_options(options: Any) -> None:
    """Refuse options that name weights, which may be any file, and values that are not plain.

    Raises:
        ConfigError: With the option.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(f"{KEY} holds keys of its own: write {KEY}={{<option>: <value>}}")
    for name, value in options.items():
        if str(name) in FILES or str(name).startswith(PUBLISHED):
            raise ConfigError(
                f"{KEY} cannot have {name}: a network is built without weights; "
                "samix supervised init=<file> starts from some"
            )
        if not isinstance(name, str) or not is_plain(value):
            raise ConfigError(f"{KEY}.{name} needs a number, a text, or a list of these")


def is_plain(value: Any) -> bool:
    """Say whether a value is a number, a text, true, false, null, or a list of these (of lists)."""
    parts = value if isinstance(value, LISTS) else [value]
    inner = (part if isinstance(part, LISTS) else [part] for part in parts)
    return all(isinstance(one, VALUES) for ones in inner for one in ones)
