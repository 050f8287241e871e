"""Where the configurations are, and what each group of them offers. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ssl_samix import experiments

_PACKAGE = Path(__file__).resolve().parent
# Installed, the configurations are inside the package; in a checkout they stand beside it.
CONFIG_DIR = next(d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir())
RECIPES = CONFIG_DIR / "experiment"


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
    found = {d.name: sorted(f.stem for f in d.glob("[!_]*.yaml")) for d in folders}
    if "experiment" in found:
        found["experiment"] = experiments.names(RECIPES, config_name)
    return found


def describe_groups(config_name: str) -> str:
    """Return the lines of a configuration's help that name its groups and their choices."""
    return "\n".join(f"{group}: {', '.join(n)}" for group, n in groups(config_name).items() if n)
