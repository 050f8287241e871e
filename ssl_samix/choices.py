"""Where the configurations are, and what each group of them offers. Imports no torch."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

_PACKAGE = Path(__file__).resolve().parent
# Installed, the configurations are inside the package; in a checkout they stand beside it.
CONFIG_DIR = next(d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir())


def groups(config_name: str | None = None) -> dict[str, list[str]]:
    """Return each config group and the names that it offers.

    Args:
        config_name: Only the groups of this configuration's defaults list.
    """
    folders = sorted(d for d in CONFIG_DIR.iterdir() if d.is_dir() and not d.name.startswith("_"))
    if config_name is not None:
        defaults = OmegaConf.load(CONFIG_DIR / f"{config_name}.yaml").defaults
        # An entry is _self_ or {"method": choice}, with words such as "optional" before the group.
        own = {
            str(k).split()[-1] for entry in defaults if isinstance(entry, DictConfig) for k in entry
        }
        folders = [d for d in folders if d.name in own]
    return {d.name: _names(d, config_name) for d in folders}


def _names(folder: Path, config_name: str | None) -> list[str]:
    """Return what a group offers: ``sgd``, or ``cifar10/resnet18``, if it is for the command."""
    files = [f for f in folder.rglob("*.yaml") if config_name in (None, recipe_of(f, config_name))]
    return sorted(f.relative_to(folder).with_suffix("").as_posix() for f in files)


def recipe_of(file: Path, usual: str | None = None) -> str | None:
    """Return the command that a recipe says, in its second line, that it is for."""
    if file.parent == CONFIG_DIR / "experiment" or "experiment" not in file.parts:
        return usual
    with file.open(encoding="utf-8") as lines:
        found = re.match(r"# samix (\w+) \|", next(itertools.islice(lines, 1, None), ""))
    return found[1] if found else usual


def describe_groups(config_name: str) -> str:
    """Return the lines of a configuration's help that name its groups and their choices."""
    return "\n".join(f"{group}: {', '.join(n)}" for group, n in groups(config_name).items() if n)
