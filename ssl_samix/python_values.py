"""Python values as the words of a command line, for the functions of the package."""

from __future__ import annotations

import os
from typing import Any

from ssl_samix.config import quoted
from ssl_samix.errors import ConfigError


def in_hydras_grammar(value: Any) -> str:
    """Write a Python value in Hydra's grammar.

    Raises:
        ConfigError: For a value that a configuration cannot hold.
    """
    if isinstance(value, (str, os.PathLike)):
        return quoted(os.fspath(value))
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{in_hydras_grammar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(in_hydras_grammar, value)) + "]"
    value = value.item() if hasattr(value, "item") else value  # NumPy's and torch's numbers
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, (int, float)):
        return repr(value)
    raise ConfigError(f"a configuration cannot hold a {type(value).__name__}: {value!r}")
