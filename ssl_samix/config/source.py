"""What is in the source of a module, read without importing it, which could take seconds."""

from __future__ import annotations

import ast
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from ssl_samix.errors import ConfigError, nearest


def arguments_of(target: str) -> frozenset[str]:
    """Return the names of the arguments with which a class is made, without ``self``.

    Args:
        target: The class, with its module; its ``__init__`` is in the module's file.
    """
    module, _, name = target.rpartition(".")
    return _arguments(_file(module), name)


@cache
def _arguments(file: Path, name: str) -> frozenset[str]:
    nodes = ast.walk(_tree(file))
    (found,) = (n for n in nodes if isinstance(n, ast.ClassDef) and n.name == name)
    (init,) = (n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    return frozenset(a.arg for a in [*init.args.args[1:], *init.args.kwonlyargs])


def check_target(target: str, config_dir: str) -> None:
    """Check that a module has the class or function that a user's file names.

    Args:
        target: The value of ``_target_``.
        config_dir: The user's folder, for the error.

    Raises:
        ConfigError: If there is no such module, it is not Python, or does not define the name.
    """
    parts = target.split(".")
    modules = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    module = next((name for name in modules if _spec(name) is not None), None)
    if module is None:
        raise ConfigError(
            f"{target}, named by a file in config_dir={config_dir}, cannot be imported: there is "
            f"no module {parts[0]} in that folder or in the current one, and none is installed"
        )
    file, name = _file(module), target[len(module) + 1 :].partition(".")[0]
    if file.suffix != ".py":  # compiled
        return
    names = _defined(_tree(file))
    if name not in names and not {"*", "__getattr__"} & names:
        raise ConfigError(nearest(name, names, f"name in {file}"))


def _spec(module: str) -> ModuleSpec | None:
    """Return where a module is, or None; unlike ``find_spec``, imports no parent packages."""
    first, *rest = module.split(".")
    try:
        spec = find_spec(first)
    except ValueError:  # empty, or __main__
        return None
    name = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return spec


def _file(module: str) -> Path:
    spec = _spec(module)
    return Path((spec and spec.origin) or "")


def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{file}{line} is not Python: {error.args[0]}") from error


def _defined(tree: ast.Module) -> set[str]:
    """Return all names that are defined, assigned or imported anywhere in a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
