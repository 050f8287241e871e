"""Recipes as files, ``configs/experiment/<data>/<name>.yaml``: whose they are, what is left of one.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

OVERRIDE = "override /"  # before a group, in the defaults list of a recipe


def command_of(file: Path) -> str | None:
    """Return the command that a recipe says, in its second line, that it is for."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found = re.match(r"# samix (\w+) \|", lines[1]) if len(lines) > 1 else None
    return found[1] if found else None


def names(folder: Path, command: str | None = None) -> list[str]:
    """Return the recipes in a folder, such as ``cifar10/resnet18``.

    Args:
        folder: Of recipes.
        command: Only those of this command, and those that name none.
    """
    files = folder.rglob("*.yaml")
    fitting = [f for f in files if command is None or command_of(f) in (None, command)]
    return sorted(f.relative_to(folder).with_suffix("").as_posix() for f in fitting)


def spelled_out(folder: Path, chosen: Mapping[str, Any]) -> list[str] | None:
    """Write a recipe as words, if some of its choices are replaced.

    What a recipe sets is for its own choices: cutmix has nothing to do with the ratios of SAMix,
    nor AdamW with the learning rate of SGD. So of a group that is chosen anew nothing is set.

    Args:
        folder: Of recipes.
        chosen: The user's choices by group, ``experiment`` among them.

    Returns:
        ``key=value`` words of all choices, the user's among them, and of the recipe's settings; or
        None if there is no recipe, or nothing of it is replaced.
    """
    from ssl_samix.config import dotted
    from ssl_samix.python_values import in_hydras_grammar

    recipe = chosen.get("experiment")
    if recipe is None:
        return None
    loaded = OmegaConf.load(folder / f"{recipe}.yaml")
    settings: dict[str, Any] = OmegaConf.to_container(loaded)  # type: ignore[assignment]
    entries = [entry for entry in settings.pop("defaults", []) if isinstance(entry, dict)]
    own = {str(k).removeprefix(OVERRIDE): name for entry in entries for k, name in entry.items()}
    replaced = {group for group, name in chosen.items() if own.get(group, name) != name}
    if not replaced:
        return None
    if "method" in replaced and "views" not in chosen:  # a method brings its own
        replaced.add("views")
        own.pop("views", None)
    left = {group: values for group, values in settings.items() if group not in replaced}
    names = {**own, **{group: name for group, name in chosen.items() if group != "experiment"}}
    choices = [f"{group}={in_hydras_grammar(name)}" for group, name in names.items()]
    # Forced, since options of a timm model need not be there.
    return choices + [f"++{k}={in_hydras_grammar(value)}" for k, value in dotted(left).items()]
