"""The configuration in a checkpoint of OpenMixup: Python's text, read without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl_samix.errors import CheckpointError

MOST_PARTS = 100_000  # of a value; OpenMixup's longest have about 1,000
CROPS = ("RandomResizedCrop", "RandomCrop", "CenterCrop")  # say how large images are trained on


class Computed:
    """A value that only running the text would give; its text."""

    def __init__(self, node: ast.expr) -> None:
        self.text = ast.unparse(node)

    def __repr__(self) -> str:
        return self.text


def read_text(text: str, path: Path) -> dict[str, Any]:
    """Read the assignments of a configuration.

    Args:
        text: Assignments of plain values, lists and ``dict(...)``, as OpenMixup's training writes
            them (``Config.pretty_text`` of mmcv).
        path: Where it was found, for the error.

    Returns:
        What each name is assigned: numbers, texts, lists (of tuples, too) and dicts; a ``Computed``
        stands for anything else.

    Raises:
        CheckpointError: If it is not Python's text, or names in names make it endless.
    """
    try:
        return _assigned(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{path} has a configuration that cannot be read: write its state_dict alone to a file"
        ) from error


def _assigned(tree: ast.Module) -> dict[str, Any]:
    names: dict[str, Any] = {}
    sizes: dict[str, int] = {}  # of a name's value, written out
    for line in tree.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            name, parts = line.targets[0].id, ast.walk(line.value)
            sizes[name] = sum(sizes.get(getattr(part, "id", ""), 1) for part in parts)
            if sizes[name] > MOST_PARTS:
                raise ValueError(f"{name} has {sizes[name]} parts")
            names[name] = _value(line.value, names)
    return names


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id, Computed(node))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(part, names) for part in node.elts]
    if isinstance(node, ast.Dict):
        return _dict([*zip(node.keys, node.values, strict=True)], names)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        pairs = [(word.arg and ast.Constant(word.arg), word.value) for word in node.keywords]
        return _dict(pairs, names)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Computed(node)


def _dict(pairs: list[Any], names: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, node in pairs:
        value = _value(node, names)
        if key is not None:
            found[str(_value(key, names))] = value
        elif isinstance(value, dict):  # **value
            found |= value
    return found


def dicts(values: Any) -> Iterator[dict[str, Any]]:
    """Go through a value and all that is in it, and give its dicts, outer ones first."""
    if isinstance(values, dict):
        yield values
    if isinstance(values, (dict, list)):
        for part in values.values() if isinstance(values, dict) else values:
            yield from dicts(part)


def channels(settings: dict[str, Any], name: str) -> list[float] | None:
    """Return the first ``mean`` or ``std`` of three channels in [0, 1]; None: there is none."""
    for one in dicts(settings):
        value = one.get(name)
        numbers = value if isinstance(value, list) else []
        if len(numbers) == 3 and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in numbers):
            return [float(v) for v in numbers]
    return None


def side(settings: dict[str, Any]) -> int | None:
    """Return the side in px that images are cropped to in training; None: it is not said."""
    for one in dicts(settings.get("train_pipeline") or settings.get("data")):
        size = one.get("size")
        size = size[0] if isinstance(size, list) and size else size
        if one.get("type") in CROPS and isinstance(size, int):
            return size
    return None
