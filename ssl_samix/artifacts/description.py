"""Descriptions stored in our files, checked before a network is built. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_samix.errors import CheckpointError, ConfigError, check_range

META = "ssl_samix"  # key of the encoder's description in checkpoints and safetensors
LARGEST_SIDE = 4096  # px, of an image
NETWORK = {"name": str, "width": int, "stem": str}  # keys that every description of a backbone has
NETWORK_MAY = {"options": dict, "checkpointing": bool}


def described(text: str, path: Path) -> dict[str, Any]:
    """Return the checked description in the metadata of a safetensors file.

    Args:
        text: JSON.
        path: The file, for errors.

    Raises:
        CheckpointError: As ``check_description``, and if the text is not JSON.
    """
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "it is not JSON") from error
    check_description(meta, path)
    return meta


def check_description(meta: Any, path: Path) -> None:
    """Check that a description has the keys of a network and its images, with the right types.

    Args:
        meta: Description of any origin; unknown keys may hold any value.
        path: File that it was read from, for errors.

    Raises:
        CheckpointError: Names the first key that is missing or has another type.
    """
    if not isinstance(meta, dict):
        raise _damaged(path, "it has no keys")
    needed = {"backbone": dict, "image_size": int, "mean": list, "std": list}
    _check_types(path, meta, needed, {"mixer": dict, "classes": list, "data_settings": dict})
    _check_types(path, meta["backbone"], NETWORK, NETWORK_MAY, prefix="backbone.")
    unknown = sorted(map(str, meta["backbone"].keys() - NETWORK.keys() - NETWORK_MAY.keys()))
    if unknown:
        raise _damaged(path, f"backbone.{unknown[0]} is unknown")
    if "mixer" in meta:
        _check_types(path, meta["mixer"], {"stage": int, "settings": dict}, prefix="mixer.")
        _check_types(path, meta["mixer"]["settings"], {"channels": int}, prefix="mixer.settings.")
    if not all(isinstance(name, str) for name in meta.get("classes", [])):
        raise _damaged(path, "classes are not names")
    try:
        check_images(meta)
    except ConfigError as error:
        raise _damaged(path, str(error)) from error


def check_images(given: Mapping[str, Any]) -> None:
    """Check ``image_size``, ``mean`` and ``std``, as far as they are given.

    Raises:
        ConfigError: If the size is not a whole number of px, or ``mean`` or ``std`` are not three
            numbers, or a value is out of range.
    """
    if "image_size" in given:
        check_range("image_size", given["image_size"], 1, LARGEST_SIDE)
    for key in ("mean", "std"):
        if key not in given:
            continue
        if len(given[key]) != 3:
            raise ConfigError(f"{key} needs three numbers, as [0.485,0.456,0.406]")
        for value in given[key]:
            check_range(key, value, 1e-6 if key == "std" else 0, 1)


def _check_types(
    path: Path,
    given: Mapping[str, Any],
    needed: Mapping[str, type],
    may: Mapping[str, type] | None = None,
    prefix: str = "",
) -> None:
    for key, kind in {**needed, **(may or {})}.items():
        if key not in given and key in needed:
            raise _damaged(path, f"{prefix}{key} is missing")
        if key in given and type(given[key]) is not kind:
            raise _damaged(path, f"{prefix}{key} is '{given[key]}'")


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: what it says of itself is unusable ({reason})")
