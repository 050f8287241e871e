"""Words that are Hydra's own, such as ``hydra/launcher=slurm``: errors are one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ssl_samix.config.compose import CONFIG_DIR, keys_of, parse
from ssl_samix.errors import ConfigError, check_choice, nearest


def check_hydra(config_name: str, arguments: Sequence[str]) -> None:
    """Find mistakes in the words that are Hydra's own, such as ``hydra/launcher=slurm``.

    Raises:
        ConfigError: With the nearest group, choice or key, or else in Hydra's words.
    """
    own = [o for o in parse(arguments) if o.key_or_group.startswith("hydra")]
    if not own:
        return
    taken = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            words = [str(o.input_line) for o in own]
            try:
                whole = compose(config_name, overrides=words, return_hydra_config=True)
            except (HydraException, OmegaConfBaseException) as error:
                for override in own:
                    _check_hydras(config_name, override)
                raise ConfigError(str(error).strip().splitlines()[0]) from error
            for part in ("launcher", "sweeper"):
                if not isinstance(whole.hydra[part], DictConfig):
                    raise ConfigError(f"hydra.{part} is not a key: write hydra/{part}=<name>")
    finally:
        GlobalHydra.instance().hydra = taken


def _check_hydras(config_name: str, override: Override) -> None:
    """Refuse a group, a choice or a key that Hydra, which is initialised, does not have."""
    key, loader = override.key_or_group, GlobalHydra.instance().config_loader()
    if "/" in key:
        known = [f"hydra/{name}" for name in loader.list_groups("hydra")]
        if key not in known:
            raise ConfigError(nearest(key, known, "key"))
        check_choice(key, override.value(), loader.get_group_options(key))
    else:
        whole = compose(config_name, return_hydra_config=True)
        keys = list(keys_of(whole.hydra, "hydra."))
        if key not in keys:
            raise ConfigError(nearest(key, keys, "key"))
