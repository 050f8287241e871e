"""``samix push``: write a finished run to a repository on the Hugging Face hub.

Modules that need torch are imported inside functions, so that errors are reported at once.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ssl_samix.artifacts.hub import FILES, PREFIX, REPO, WEIGHTS, is_remote, reported
from ssl_samix.artifacts.model_card import FREE_ARGUMENTS, write_card
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import PRETRAINED, compose, dotted
from ssl_samix.config.key_types import PATHS
from ssl_samix.config.saved import read_plain
from ssl_samix.errors import CheckpointError, ConfigError, UserError
from ssl_samix.files import expanded

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from ssl_samix.artifacts.encoder import Encoder

CARD, TIMM_CONFIG, TIMM_WEIGHTS = "README.md", "config.json", "model.safetensors"
OURS = (*FILES, CARD, TIMM_CONFIG, TIMM_WEIGHTS)
HARMLESS = {".gitattributes", CARD}  # in a repository that was made by hand
LICENSE = r"[a-z0-9][a-z0-9.-]{0,60}"


@dataclass(frozen=True)
class PushRequest:
    """Checked arguments of ``samix push``.

    Attributes:
        run: A finished run.
        repo: ``<user>/<name>``.
        private: Whether only its owner may read the repository.
        license: The hub's name of a licence, such as ``mit``; None: not stated.
    """

    run: RunFolder
    repo: str
    private: bool
    license: str | None


def parse_push(words: list[str]) -> PushRequest:
    """Return the checked request of ``key=value`` arguments; nothing is sent.

    Raises:
        UserError: For the first error in them, or if there is no token.
    """
    config, _ = compose("push", words)
    if config.run is None or is_remote(str(config.run)):
        raise ConfigError("push needs a run of this machine: run=<run folder>")
    run = RunFolder(expanded(str(config.run)))
    run.load_config()  # raises if it is not a run folder
    if not run.encoder.exists():
        raise CheckpointError(f"{run.path} holds no {run.encoder.name}: finish the run first")
    repo = str(config.repo).removeprefix(PREFIX)
    if config.repo is None or not re.fullmatch(REPO, repo):
        raise ConfigError("push needs the name of a repository: repo=<user>/<name>")
    if config.license is not None and not re.fullmatch(LICENSE, config.license):
        raise ConfigError(f"license={config.license} is not a name such as mit or apache-2.0")
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("push needs a token: log in with 'hf auth login', or set HF_TOKEN")
    return PushRequest(run, repo, config.private, config.license)


def push(request: PushRequest) -> str:
    """Send a run's weights, configuration and model card, and return their address.

    Optimizer states, images, paths of this machine and the settings of trackers are not sent.

    Raises:
        UserError: If the encoder is damaged, the hub refuses, there is no network, or the
            repository holds other things, or is public and a private one is wanted.
    """
    from huggingface_hub import HfApi, constants

    from ssl_samix.artifacts.encoder import load_encoder

    encoder = load_encoder(request.run.encoder)
    api = HfApi(library_name="ssl_samix")
    address = f"{PREFIX}{request.repo}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _fill(folder, request, encoder)
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        with reported(address):
            whose = "private" if _made(api, request) else "public"
            place = f"{constants.ENDPOINT}/{request.repo} ({whose})"
            print(f"sending to {place}: {names}", file=sys.stderr)
            api.upload_folder(
                repo_id=request.repo,
                folder_path=folder,
                commit_message="Push by ssl_samix",
                delete_patterns=list(OURS),  # those of an earlier push that this one does not have
            )
    return address


def _made(api: HfApi, request: PushRequest) -> bool:
    """Make the repository, if it does not exist, and return whether it is private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(request.repo)
    except RepositoryNotFoundError:
        api.create_repo(request.repo, private=request.private)
        return request.private
    held = {file.rfilename for file in info.siblings or []}
    if held - HARMLESS and not held & {*WEIGHTS}:
        raise UserError(f"{request.repo} holds what is not of samix push: give another repo")
    if request.private and not info.private:
        raise UserError(f"{request.repo} exists and is public: make it private on the hub first")
    return bool(info.private)


def _fill(folder: Path, request: PushRequest, encoder: Encoder) -> None:
    """Write all that is sent into a folder."""
    for name in WEIGHTS:
        if (request.run.path / name).exists():
            shutil.copyfile(request.run.path / name, folder / name)
    text = OmegaConf.to_yaml(OmegaConf.create(without_paths(read_plain(request.run.config))))
    (folder / request.run.config.name).write_text(text, "utf-8")
    usage = _write_timm(folder, request.repo, encoder)
    meta = {**encoder.meta, "feature_dim": encoder.feature_dim}
    write_card(folder / CARD, request.run, request.repo, meta, usage, request.license)


def without_paths(said: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration without what belongs to this machine.

    Paths, free arguments of libraries, which may be paths, and trackers, which may name accounts.
    """
    said = {key: value for key, value in said.items() if key != "logger"}
    said["choices"] = {k: v for k, v in said.get("choices", {}).items() if k != "logger"}
    flat = dotted(said)
    for key in (key for key in PATHS if flat.get(key) not in (None, PRETRAINED)):
        _set(said, key, "own" if key == "config_dir" else None)
    for key in (key for key in FREE_ARGUMENTS if flat.get(key)):
        _set(said, key, {})
    return said


def _set(said: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        said = said[parent]
    said[last] = value


def _write_timm(folder: Path, repo: str, encoder: Encoder) -> list[str]:
    """Write timm's form of an encoder, if there is one, and return the lines that load it.

    ``config.json`` is written only if ``timm.create_model("hf-hub:...")`` alone makes the network.
    """
    from safetensors.torch import save_file

    from ssl_samix.artifacts.export_formats import (
        check_same,
        library_weights,
        timm_call,
        timm_network,
    )
    from ssl_samix.models.backbone import other_library

    if other_library(encoder.backbone.name) == "timm":
        return []
    network, lines = timm_network(encoder)
    network.load_state_dict(library_weights(encoder), strict=True)
    check_same(encoder, network.eval(), "timm")
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / TIMM_WEIGHTS, metadata={"format": "pt"})
    made = timm_call(encoder)
    if made is None:
        return [
            *lines,
            "from huggingface_hub import hf_hub_download",
            "from safetensors.torch import load_file",
            f'model.load_state_dict(load_file(hf_hub_download("{repo}", "{TIMM_WEIGHTS}")))',
            "features = model.eval()(images)",
        ]
    text = json.dumps(_timm_config(network, encoder, *made), indent=2)
    (folder / TIMM_CONFIG).write_text(text, "utf-8")
    return [
        "import timm",
        f'model = timm.create_model("hf-hub:{repo}", pretrained=True)',
        "features = model.eval()(images)",
    ]


def _timm_config(
    network: Any, encoder: Encoder, name: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of timm's ``config.json``."""
    theirs = network.pretrained_cfg
    kept = {k: theirs[k] for k in ("first_conv", "classifier", "fixed_input_size") if k in theirs}
    size = encoder.image_size
    images = {"input_size": [3, size, size], "mean": encoder.mean, "std": encoder.std}
    fit = {"interpolation": "bilinear", "crop_pct": 1.0, "num_classes": 0}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.feature_dim,
        "model_args": {k: v for k, v in arguments.items() if k != "num_classes"},
        "pretrained_cfg": {**kept, **images, **fit},
    }
