"""Parsing of evaluation commands; checked before any slow import."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open

from ssl_samix.artifacts.description import META, described
from ssl_samix.artifacts.hub import is_remote, local, short_name
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import absolute, compose, groups, parse, plain
from ssl_samix.config.saved import merged
from ssl_samix.data.folder import scan, wanted_labels
from ssl_samix.data.layout import check_layout
from ssl_samix.data.shards import index, is_url, numbered
from ssl_samix.errors import CheckpointError, ConfigError, DataError, check_choice, check_range

WEIGHTS = ("own", "random", "pretrained")
UNLABELLED = (
    "this protocol needs labelled images to train and to test on: give class folders, best under "
    "train/ and val/, or another data set"
)


@dataclass(frozen=True)
class Origin:
    """The origin of an encoder.

    Attributes:
        given: The user's argument.
        path: The run folder or file; None for a model name.
        run: The run that it belongs to, if any.
    """

    given: str
    path: Path | None
    run: RunFolder | None

    @property
    def home(self) -> Path:
        """The folder for its results."""
        if is_remote(self.given):  # whose copy is in a cache
            return Path("runs") / short_name(self.given)
        if self.run is not None:
            return self.run.path
        if self.path is None:
            return Path("runs") / self.given
        return _measured_from(self.path) or Path("runs") / Path(self.given).stem


@dataclass(frozen=True)
class ProtocolRequest:
    """A checked evaluation command: protocol, encoder, data and settings.

    Attributes:
        protocol: Name of the protocol.
        config: Its configuration.
        data: Name of the data set's configuration.
        origin: Where the encoder comes from.
    """

    protocol: str
    config: DictConfig
    data: str
    origin: Origin


def find_origin(given: str, weights: str) -> Origin:
    """Return what ``given`` refers to: a run folder, a file, or the name of a model.

    Raises:
        CheckpointError: If, judging by the name alone, it is none of them.
    """
    path = local(given)
    if path.is_dir():
        run = RunFolder(path)
        if run.encoder.exists() or run.last.exists():
            return Origin(given, path, run if run.config.exists() else None)
        if run.classifier.exists():
            return Origin(given, run.classifier, _owner(run.classifier))
        raise CheckpointError(f"{path} holds no encoder.safetensors and no last.ckpt")
    if path.is_file():
        return Origin(given, path, _owner(path))
    if weights == "own" or os.sep in given:
        raise CheckpointError(
            f"run={given} does not exist: give a run folder, a checkpoint or a file of weights, or "
            "the name of a model with weights=random or weights=pretrained (downloads them)"
        )
    return Origin(given, None, None)


def _owner(file: Path) -> RunFolder | None:
    """Return the run whose folder, or whose results, contain a file; None if there is none."""
    candidates = (file.parent, _measured_from(file))
    runs = [RunFolder(folder) for folder in candidates if folder is not None]
    return next((run for run in runs if run.config.exists()), None)


def _measured_from(file: Path) -> Path | None:
    """Return the folder whose evaluation wrote this classifier, or None."""
    results = Path(os.path.abspath(file)).parent
    left = file.name == "classifier.safetensors" and (results / "results.json").is_file()
    return results.parent.parent if left and results.parent.name == "results" else None


def parse_protocol(protocol: str, words: list[str]) -> ProtocolRequest:
    """Compose a protocol's configuration; without ``data=``, use the encoder's own data.

    Args:
        protocol: The configuration's name.
        words: ``key=value`` arguments.

    Raises:
        UserError: For the first error: an unknown key or name, a missing encoder or data set.
    """
    given = {o.key_or_group: o.value() for o in parse(words)}
    own: dict[str, Any] = {}
    if "data" not in given:
        # First composed with an arbitrary data set, to report mistyped keys before missing ones.
        config, _ = compose(protocol, ["data=digits", *words])
        choice, own = _own_data(_origin(protocol, config), config.get("config_dir"))
        words = [f"data={choice}", *words]
    config, choices = compose(protocol, words)
    origin = _origin(protocol, config)
    untold = {key: value for key, value in own.items() if f"data.{key}" not in given}
    for key, value in _settings(untold, config, origin).items():
        OmegaConf.update(config, f"data.{key}", value)
    check_range("seed", config.get("seed", 0), 0)
    check_range("chunk", config.chunk, 1)
    check_layout(config.data.name, config.data.root, config.data.download)
    return ProtocolRequest(protocol, absolute(config), choices["data"], origin)


def check_labels(data: DictConfig) -> None:
    """Raise unless the images of a checked data set have labels; no image is opened.

    Args:
        data: Its configuration. Shards behind a URL are not read.

    Raises:
        DataError: If they have none; or for folders as ``scan``, for shards as ``index``.
    """
    wanted, labelled = wanted_labels(data.labels), True
    if data.name == "folder":
        labelled = bool(scan(data.root, data.labels).classes)
    elif data.name == "webdataset" and wanted is None and not is_url(data.root):
        found = [label for _, members in index(data.root) for label in members.labels]
        labelled = bool(numbered(found, data.labels)[1])
    elif data.name == "webdataset":
        labelled = wanted is not False
    if not labelled:
        raise DataError(UNLABELLED)


def _origin(protocol: str, config: DictConfig) -> Origin:
    if config.run is None:
        raise ConfigError(f"{protocol} needs an encoder: run=<run folder, checkpoint or weights>")
    weights = config.get("weights", "own")
    check_choice("weights", weights, WEIGHTS)
    return find_origin(str(config.run), weights)


def _settings(own: dict[str, Any], config: DictConfig, origin: Origin) -> dict[str, Any]:
    """Return the data settings read from an encoder's own files, which are untrusted, as values."""
    try:
        return merged(own, plain(config.data), "data.")
    except ConfigError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{origin.given} has data settings that cannot be used: {reason}"
        ) from error


def _own_data(origin: Origin, config_dir: str | None) -> tuple[str, dict[str, Any]]:
    """Return the data set and the data settings that an encoder was trained with.

    For a classifier from ``samix linear``, those of the logistic regression. For a data set of the
    user's own folder, unless it is given, the one that its settings are of.
    """
    meta = _described(origin.path)
    known = groups(None, config_dir)["data"]
    if "data_settings" in meta:
        check_choice("data", meta.get("data"), known)
        return meta["data"], meta["data_settings"]
    if origin.run is not None:
        config, choices = origin.run.load_config(config_dir)
        choice = choices["data"] if choices["data"] in known else config.data.name
        return choice, plain(config.data)
    if meta.get("data") in known:
        return meta["data"], {}
    raise ConfigError(
        f"{origin.given} does not say what to measure it on: give data=<{', '.join(known)}>"
    )


def _described(path: Path | None) -> dict[str, Any]:
    """Return the metadata of a safetensors file of this package; empty for any other file."""
    if path is not None and path.is_dir():
        path = path / "encoder.safetensors"
    if path is None or path.suffix != ".safetensors" or not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(META)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file") from error
    return {} if text is None else described(text, path)
