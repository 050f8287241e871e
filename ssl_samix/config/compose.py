"""Compose a checked configuration from command-line arguments.

Also: the YAML files and the choices of each group, recipes, and Python values in Hydra's grammar.
Nothing here imports torch: a mistyped key is reported before the first heavy import.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from ssl_samix.config.key_types import OPEN_KEYS, PATHS, converted, is_plain
from ssl_samix.config.source import check_target
from ssl_samix.errors import ConfigError, UserError, check_choice, nearest
from ssl_samix.files import expanded

_PACKAGE = Path(__file__).resolve().parent.parent
# An installed package contains the configurations; in a checkout they are next to it.
CONFIG_DIR = next(d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir())
RECIPES = CONFIG_DIR / "experiment"


def groups(config_name: str | None = None, config_dir: str | None = None) -> dict[str, list[str]]:
    """Return the config groups, each with the names of its choices.

    Args:
        config_name: Return only the groups in this configuration's defaults list; None: all.
        config_dir: A user's own folder, whose choices are added.

    Raises:
        ConfigError: If that is not a folder with choices of its own.
    """
    folders = sorted(d for d in CONFIG_DIR.iterdir() if d.is_dir() and not d.name.startswith("_"))
    if config_name is not None:
        defaults = OmegaConf.load(CONFIG_DIR / f"{config_name}.yaml").defaults
        # An entry is _self_ or {"method": choice}, where "optional" may precede the group.
        own = {
            str(k).split()[-1] for entry in defaults if isinstance(entry, DictConfig) for k in entry
        }
        folders = [d for d in folders if d.name in own]
    found = {d.name: sorted(f.stem for f in d.glob("[!_]*.yaml")) for d in folders}
    if "experiment" in found:
        found["experiment"] = recipe_names(RECIPES, config_name)
    for group, name in [] if config_dir is None else _own_choices(config_dir):
        if group in found:
            found[group] = sorted([*found[group], name])
    return found


def _own_choices(config_dir: str) -> list[tuple[str, str]]:
    """Return group and name of each YAML file in a user's folder, such as ``method/mine.yaml``."""
    folder = expanded(config_dir)
    if not folder.is_dir():
        raise ConfigError(f"config_dir={config_dir} is not a folder")
    own = []
    for file in sorted(folder.glob("*/*.yaml")):
        if (CONFIG_DIR / file.parent.name / file.name).exists():
            raise ConfigError(f"{file} has the name of one of ssl_samix's own files: rename it")
        if file.parent.name in groups() and not file.name.startswith("_"):
            own.append((file.parent.name, file.stem))
    if not own:
        raise ConfigError(
            f"config_dir={config_dir} has no <group>/<name>.yaml, such as method/mine.yaml"
        )
    return own


def typed_config_dir(overrides: Iterable[Override]) -> str | None:
    """Return the value of ``config_dir`` among the arguments of a command; None if there is none.

    Code runs from that folder, so it is taken from arguments only, never from a saved run.
    """
    values = [o.value() for o in overrides if o.key_or_group == "config_dir"]
    return str(values[-1]) if values and values[-1] is not None else None


def search_path(config_dir: str | None) -> list[str]:
    """Return the argument with which Hydra finds the choices of a user's folder, if given."""
    if config_dir is None:
        return []
    return [f"hydra.searchpath=[{quoted(f'file://{os.path.abspath(expanded(config_dir))}')}]"]


def describe_groups(config_name: str, config_dir: str | None = None) -> str:
    """Return the lines of a configuration's help that list its groups and their choices."""
    found = groups(config_name, config_dir)
    return "\n".join(f"{group}: {', '.join(n)}" for group, n in found.items() if n)


PRETRAINED = "pretrained"  # a value of init: published weights
SEVERAL = ("logger",)  # groups of which several choices may be made, as a list
MOST_SHOWN = 200  # characters of an argument, in an error
MOST_COMBINATIONS = 64  # of a sweep, checked before it starts


def quoted(text: str) -> str:
    """Return any text as a quoted value in Hydra's grammar."""
    # A backslash is literal, except before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


def dotted(overrides: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts flattened to dotted keys; the dicts of ``OPEN_KEYS`` stay dicts."""
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in OPEN_KEYS:
            flat.update(dotted(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def quote_paths(arguments: Sequence[str], sweeping: bool = False) -> list[str]:
    """Return the arguments with paths quoted, since Hydra's grammar forbids some characters.

    A folder that is given as a data set's name, ``data=photos``, becomes ``data=folder`` with this
    ``data.root``.

    Args:
        arguments: ``key=value`` arguments, as typed.
        sweeping: Whether a comma separates values; an existing path with a comma stays one value.

    Raises:
        ConfigError: If a folder is given twice, or beside a data set; or as ``groups``.
    """
    words = []
    for word in _with_data_folders(arguments, sweeping):
        key, equals, value = word.partition("=")
        if key in PATHS and equals and value not in ("null", "") and value[0] not in "'\"":
            whole = not sweeping or "," not in value or os.path.exists(expanded(value))
            parts = [value] if whole else value.split(",")
            words.append(f"{key}=" + ",".join(map(quoted, parts)))
        else:
            words.append(word)
    return words


def _with_data_folders(arguments: Sequence[str], sweeping: bool) -> Iterator[str]:
    typed = dict(word.partition("=")[::2] for word in arguments)
    if "data" not in typed:
        yield from arguments
        return
    known = {"null", *groups(None, _unquoted(typed.get("config_dir", "")) or None)["data"]}
    for word in arguments:
        key, _, value = word.partition("=")
        names = [_unquoted(value)]
        if sweeping and not os.path.exists(expanded(names[0])):
            names = value.split(",")
        new = [name for name in names if key == "data" and name and name not in known]
        folders = [name for name in new if expanded(name).is_dir()]
        if not folders:
            yield word
        elif "data.root" in typed:
            raise ConfigError(f"{word} is a folder, and so is data.root: give one of them")
        elif others := [name for name in names if name not in folders]:
            _check_chosen("data", others[0], {"data": [*known - {"null"}]})
            raise ConfigError(f"{word} has folders and data sets: sweep over one of the two kinds")
        else:
            yield from ("data=folder", f"data.root={value}")


def _unquoted(value: str) -> str:
    quotes = value[:1] in ("'", '"') and value[-1:] == value[:1]
    return value[1:-1] if quotes else value


def parse(arguments: Sequence[str]) -> list[Override]:
    """Return ``key=value`` arguments as Hydra's overrides.

    Raises:
        ConfigError: If an argument has another form, adds or removes a key, or sets a key such as
            ``_target_``, by which Hydra selects code.
    """
    overrides = []
    for word in arguments:
        try:
            override = OverridesParser.create().parse_override(word)
        # Hydra's parser does not catch Python's errors for too long numbers and too deep lists.
        except (HydraException, ValueError, RecursionError) as error:
            raise ConfigError(f"'{word[:MOST_SHOWN]}' is not of the form key=value") from error
        if override.is_add() or override.is_force_add() or override.is_delete():
            raise ConfigError(f"'{word}': keys are neither added nor removed, write key=value")
        keys = [*override.key_or_group.split("."), *_inner_keys(override.value())]
        if code := next(filter(is_hydras, keys), None):
            raise ConfigError(f"'{word}': {code} cannot be set, the choices say what is built")
        overrides.append(override)
    return overrides


def is_hydras(key: object) -> bool:
    """Return whether a key is one that Hydra instantiates by, such as ``_target_``."""
    return isinstance(key, str) and re.fullmatch(r"_\w+_", key) is not None


def _inner_keys(value: Any) -> Iterator[Any]:
    """Yield the keys inside a value, at any depth."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _inner_keys(part)


def check(config_name: str, arguments: Sequence[str]) -> list[DictConfig]:
    """Return the checked configuration of each job of a command line, up to a number of jobs.

    Raises:
        ConfigError: As ``compose``; for an unknown choice or key, with the nearest valid name.
    """
    return [compose(config_name, words)[0] for words in combinations(arguments)]


def combinations(arguments: Sequence[str]) -> Iterable[list[str]]:
    """Return the ``key=value`` arguments of each job of a sweep, up to a number of jobs."""
    overrides = [o for o in parse(arguments) if not o.key_or_group.startswith("hydra")]
    every = itertools.product(*(list(_variants(o)) for o in overrides))
    return map(list, itertools.islice(every, MOST_COMBINATIONS))


def _variants(override: Override) -> Iterable[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]


def compose(config_name: str, arguments: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """Return the checked configuration of a command.

    Args:
        config_name: Name of the configuration, such as ``pretrain``.
        arguments: ``key=value`` arguments.

    Returns:
        The configuration, resolved, in struct mode; and the choice made in each group.

    Raises:
        ConfigError: For an unknown name or key (with the nearest valid one), or a value of the
            wrong type.
    """
    overrides = [o for o in parse(arguments) if not o.key_or_group.startswith("hydra")]
    own_folder = typed_config_dir(overrides)
    known = groups(config_name, own_folder)
    chosen = [o for o in overrides if o.key_or_group in known]
    for override in chosen:
        for name in names_in(override.key_or_group, override.value()):
            _check_chosen(override.key_or_group, name, known)
    names = {o.key_or_group: _choice(o.value()) for o in chosen}
    words = expanded_arguments(RECIPES, names) or [str(o.input_line) for o in chosen]
    if "views" not in names and "method" in names and names["method"] not in known["views"]:
        words.append(f"views={VIEWS_OF_OWN_METHODS}")
    # A user's own files may change between two calls in one process.
    compose_once = _composed if own_folder is None else _composed.__wrapped__
    unresolved, choices = compose_once(config_name, (*words, *search_path(own_folder)))
    base = _resolved(unresolved, config_name, words)
    whole, own = unresolved.copy(), []
    for override in overrides:
        key, value = override.key_or_group, override.value()
        group = key.partition(".")[0]
        if group in groups() and group not in known and group not in base:
            command, keys = config_name.replace("_", "-"), ", ".join(sorted(map(str, base)))
            raise ConfigError(f"{command} takes no {key}: choose from {keys}")
        if override not in chosen:
            own += keys_set(base, key, value, known)
            words.append(str(override.input_line))
            set_key(whole, key, value)
    whole = _resolved(whole, config_name, words)
    check_values(whole, base, own)
    if own_folder is not None:
        _check_parts(whole, {**choices, **names})
        _admit(whole, own_folder)
    return whole, {**choices, **names}


def _check_chosen(group: str, name: str, known: Mapping[str, list[str]]) -> None:
    """Raise ``ConfigError`` unless a group has this choice; ``experiment`` may be null."""
    if name in known[group] or (group == "experiment" and name == "None"):
        return
    if group == "experiment" and name in groups()["experiment"]:
        theirs = recipe_command(RECIPES / f"{name}.yaml")
        raise ConfigError(f"experiment={name} is a recipe of samix {theirs}")
    message = nearest(name, known[group], group)
    if group == "data":
        message = f"data={name} is neither a folder nor a data set: {message.partition(': ')[2]}"
    raise ConfigError(message)


def _check_parts(config: DictConfig, choices: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` if a user's file is not a mapping, or lacks its group's class."""
    installed = groups()
    for group, name in choices.items():
        theirs = name is not None and group not in SEVERAL and name not in installed[group]
        files = (CONFIG_DIR / group).glob("*.yaml") if theirs else ()
        if any("_target_:" in file.read_text("utf-8") for file in files):
            part = config.get(group)
            if not isinstance(part, DictConfig) or "_target_" not in part:
                raise ConfigError(f"{group}/{name}.yaml in config_dir has no _target_: <class>")


def _admit(config: DictConfig, config_dir: str) -> None:
    """Let ``build`` instantiate the classes that a user's own files name in a configuration.

    They are imported from the current folder, the user's, or what is installed.

    Raises:
        ConfigError: If one of them does not exist; found without importing it.
    """
    # At the end: a file of theirs must not replace a module that others import.
    for folder in (os.getcwd(), os.path.abspath(expanded(config_dir))):
        if folder not in sys.path:
            sys.path.append(folder)
    for name in map(str, _classes(plain(config))):
        if name not in _installed_classes():
            check_target(name, config_dir)
            _own_classes.add(name)


def names_in(group: str, choice: Any) -> list[str]:
    """Return the names of a choice; a group of ``SEVERAL`` takes a list, or its text ``[a,b]``."""
    if group in SEVERAL and str(choice).startswith("["):
        return str(_choice(choice))[1:-1].split(",")
    return [str(choice)]


def _choice(value: Any) -> Any:
    """Return a choice as it is saved and compared: several names as text, ``[a,b]``."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else value


def set_key(config: DictConfig, key: str, value: Any) -> None:
    """Set a key of the configuration to a user's value.

    Raises:
        ConfigError: If OmegaConf cannot hold the value, such as a dict with unusable keys.
    """
    try:
        # They hold arguments of a library's function: any key may be new.
        OmegaConf.update(config, key, value, force_add=key.startswith(tuple(OPEN_KEYS)))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error


def keys_set(config: DictConfig, key: str, value: Any, known: Iterable[str] = ()) -> list[str]:
    """Return the keys of single values that ``key=value`` sets; several if the value is a dict.

    Raises:
        ConfigError: For a key that ``config`` does not have, with the nearest one.
    """
    keys = list(keys_of(config))
    for opened in OPEN_KEYS:
        if opened in keys and key.startswith(f"{opened}."):
            return [opened]
    if key not in keys:
        raise ConfigError(nearest(key, [*keys, *known], "key"))
    if not isinstance(OmegaConf.select(config, key), DictConfig):
        return [key]
    if not isinstance(value, dict):
        raise ConfigError(f"{key} holds keys of its own: write {key}.<key>=<value>")
    if key in OPEN_KEYS:
        return [key]
    return [k for name, each in value.items() for k in keys_set(config, f"{key}.{name}", each)]


def check_values(config: DictConfig, before: DictConfig, keys: Iterable[str]) -> None:
    """Check the types of a user's values, and convert single values of list keys to lists.

    Args:
        config: Configuration with these values; its interpolations are resolved in place.
        before: Configuration with the defaults.
        keys: Keys of the values.

    Raises:
        ConfigError: If a value has the wrong type for its key, or cannot be resolved.
    """
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    now, defaults = plain(config), plain(before)
    for key in keys:
        value, default = (reduce(dict.__getitem__, key.split("."), d) for d in (now, defaults))
        taken = _fitted(key, value, default)
        if taken is not value:
            OmegaConf.update(config, key, taken)


def check_fit(key: str, value: Any, default: Any) -> None:
    """Check that a value, or nested keys and values, has the keys and types of the default.

    Args:
        key: Dotted key; empty for a whole configuration.
        value: Plain dicts, lists and values.
        default: Likewise; a dict here has all keys that are allowed in ``value``.

    Raises:
        ConfigError: For an unknown key, with the nearest one, or a value of the wrong type.
    """
    if isinstance(default, dict) and key not in OPEN_KEYS:
        if not isinstance(value, dict):
            raise ConfigError(f"{key} holds keys of its own: write {key}.<key>=<value>")
        known = {k: f"{key}.{k}" if key else k for k in default}
        for inner, part in value.items():
            if inner not in known:
                raise ConfigError(
                    nearest(f"{key}.{inner}".lstrip("."), known.values() or [key], "key")
                )
            check_fit(known[inner], part, default[inner])
    else:
        _fitted(key, value, default)


def _fitted(key: str, value: Any, default: Any) -> Any:
    """Return the value of a single key, checked and converted to the type of its key."""
    if key in OPEN_KEYS:
        OPEN_KEYS[key](value)
        return value
    if not is_plain(value):
        raise ConfigError(f"{key} needs a value or a list of values, and has no keys of its own")
    return converted(key, value, default)


def keys_of(config: DictConfig, prefix: str = "") -> Iterable[str]:
    """Yield the dotted keys of a configuration, including those of nested configurations."""
    for key in map(str, config):
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from keys_of(node, f"{prefix}{key}.")


@cache
def _composed(config_name: str, words: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """Return Hydra's composition, cached since a command needs the same one several times.

    Returns:
        The configuration, with unresolved interpolations, and its choices. Both are shared by all
        callers and must not be changed.
    """
    # Inside a Hydra app the global state is in use; it is restored afterwards.
    taken = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            whole = hydra_compose(config_name, overrides=list(words), return_hydra_config=True)
            choices = {k: v for k, v in whole.hydra.runtime.choices.items() if "/" not in k}
            with open_dict(whole):
                del whole["hydra"]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    except (yaml.YAMLError, UnicodeError) as error:  # in a file of the user's own folder
        raise ConfigError(f"config_dir: {' '.join(str(error).split())}") from error
    finally:
        GlobalHydra.instance().hydra = taken
    return whole, choices


def _resolved(config: DictConfig, config_name: str, words: Sequence[str]) -> DictConfig:
    """Return a copy with all interpolations resolved."""
    config = config.copy()
    try:
        OmegaConf.resolve(config)
    except InterpolationKeyError as error:  # a choice refers to a key of another command
        key = str(error).partition("'")[2].partition("'")[0]
        command, given = config_name.replace("_", "-"), ", ".join(words)
        raise ConfigError(f"samix {command} has no {key}, which {given} reads") from error
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    return config


def absolute(config: DictConfig) -> DictConfig:
    """Make the input paths of a run absolute, in place, and return the configuration."""
    for key in ("data.root", "mixup.mixer", "init", "config_dir"):
        path = OmegaConf.select(config, key)
        # shards may be URLs; an empty path is an error and not the current folder
        if path and "://" not in str(path) and (key, path) != ("init", PRETRAINED):
            OmegaConf.update(config, key, os.path.abspath(expanded(str(path))))
    return config


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dicts, lists and values."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


VIEWS_OF_OWN_METHODS = "simclr"  # of a user's own method that has no views of its name
_own_classes: set[str] = set()  # named by files of the folders that were typed in this process


@cache
def _installed_classes() -> frozenset[str]:
    files = (file.read_text("utf-8") for file in CONFIG_DIR.rglob("*.yaml"))
    return frozenset(n for text in files for n in re.findall(r"(?m)^ *_target_: *(\S+)", text))


def _classes(node: Any) -> Iterator[Any]:
    """Yield the names of classes that Hydra would instantiate for a plain node, at any depth."""
    if isinstance(node, dict) and "_target_" in node:
        yield node["_target_"]
    if isinstance(node, (dict, list)):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _classes(part)


def build(config: DictConfig, **arguments: Any) -> Any:
    """Return the object of a config node, made with plain arguments.

    Raises:
        ConfigError: If the node names a class that none of the installed configurations names, nor
            a file in the user's ``config_dir``, or a module that it imports is missing.
            A name in ``ssl_samix`` is not enough: modules have ``os`` as an attribute.
        UserError: If the constructor raises one.
    """
    for name in map(str, _classes(plain(config))):
        if name not in _installed_classes() | _own_classes:
            raise ConfigError(f"{name} is not built: no installed configuration names it")
    try:
        return instantiate(config, _partial_=True, _convert_="all")(**arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = error.__cause__ and error.__cause__.__cause__
        if isinstance(error.__cause__, ImportError) and isinstance(reason, ImportError):
            raise ConfigError(f"{config.get('_target_')} cannot be imported: {reason}") from error
        raise


def in_hydras_grammar(value: Any) -> str:
    """Return a Python value as text in Hydra's grammar.

    Raises:
        ConfigError: For a value that a configuration cannot hold.
    """
    if isinstance(value, (str, os.PathLike)):
        return quoted(os.fspath(value))
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{in_hydras_grammar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(in_hydras_grammar, value)) + "]"
    value = value.item() if hasattr(value, "item") else value  # numbers of NumPy and torch
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, (int, float)):
        return repr(value)
    raise ConfigError(f"a configuration cannot hold a {type(value).__name__}: {value!r}")


OVERRIDE = "override /"  # before a group, in the defaults list of a recipe


def recipe_command(file: Path) -> str | None:
    """Return the command named in a recipe's second line, or None."""
    lines = file.read_text(encoding="utf-8").splitlines()
    found = re.match(r"# samix (\w+) \|", lines[1]) if len(lines) > 1 else None
    return found[1] if found else None


def recipe_names(folder: Path, command: str | None = None) -> list[str]:
    """Return the names of the recipes in a folder, such as ``cifar10/resnet18``.

    Args:
        folder: Folder of recipes.
        command: Return only recipes for this command, and those that name none; None: all.
    """
    files = folder.rglob("*.yaml")
    fitting = [f for f in files if command is None or recipe_command(f) in (None, command)]
    return sorted(f.relative_to(folder).with_suffix("").as_posix() for f in fitting)


def expanded_arguments(folder: Path, chosen: Mapping[str, Any]) -> list[str] | None:
    """Return a recipe as arguments, if the user replaces some of its choices.

    Settings of a replaced group are left out, since a recipe's settings are for its own choices:
    SAMix's ratios do not apply to CutMix, nor SGD's learning rate to AdamW.

    Args:
        folder: Folder of recipes.
        chosen: The user's choices by group, including ``experiment``.

    Returns:
        ``key=value`` arguments for all choices, including the user's, and the recipe's settings;
        None if there is no recipe, or none of its choices is replaced.
    """

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
    if "method" in replaced and "views" not in chosen:  # a method has its own views
        replaced.add("views")
        own.pop("views", None)
    left = {group: values for group, values in settings.items() if group not in replaced}
    names = {**own, **{group: name for group, name in chosen.items() if group != "experiment"}}
    choices = [f"{group}={in_hydras_grammar(name)}" for group, name in names.items()]
    # Forced, since options of a timm model may be new keys.
    return choices + [f"++{k}={in_hydras_grammar(value)}" for k, value in dotted(left).items()]


def check_hydra(config_name: str, arguments: Sequence[str]) -> None:
    """Check the arguments for Hydra itself, such as ``hydra/launcher=slurm``.

    Raises:
        ConfigError: With the nearest group, choice or key, or else with Hydra's message.
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
                whole = hydra_compose(config_name, overrides=words, return_hydra_config=True)
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
    """Raise ``ConfigError`` for a group, choice or key that Hydra (initialised) does not have."""
    key, loader = override.key_or_group, GlobalHydra.instance().config_loader()
    if "/" in key:
        known = [f"hydra/{name}" for name in loader.list_groups("hydra")]
        if key not in known:
            raise ConfigError(nearest(key, known, "key"))
        check_choice(key, override.value(), loader.get_group_options(key))
    else:
        whole = hydra_compose(config_name, return_hydra_config=True)
        keys = list(keys_of(whole.hydra, "hydra."))
        if key not in keys:
            raise ConfigError(nearest(key, keys, "key"))
