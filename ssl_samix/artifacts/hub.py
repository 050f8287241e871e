"""Runs on the Hugging Face hub, as ``hf://<user>/<name>``: addresses and downloads.

Imports no torch. huggingface_hub comes with timm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ssl_samix.errors import CheckpointError, ConfigError, UserError
from ssl_samix.files import expanded

PREFIX = "hf://"
REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
WEIGHTS = ("encoder.safetensors", "classifier.safetensors", "mixer.safetensors")
# All that is downloaded: weights and plain values, nothing that could run code.
FILES = (*WEIGHTS, "config.yaml")


def is_remote(given: str | os.PathLike[str]) -> bool:
    """Return whether a run is given by its address on the hub."""
    return os.fspath(given).startswith(PREFIX)


def local(given: str | os.PathLike[str]) -> Path:
    """Return the local path of a run or file: of an address on the hub, its copy in the cache.

    Args:
        given: A path, which may begin with ``~``, or ``hf://<user>/<name>[@<revision>]``. The
            newest files are downloaded into huggingface_hub's cache, once in a process; without a
            network, or with ``HF_HUB_OFFLINE=1``, those that are there are used.

    Raises:
        ConfigError: If the address is malformed.
        UserError: If there is no such repository, or no network and no copy.
        CheckpointError: If samix did not write what is there.
    """
    return _fetched(os.fspath(given)) if is_remote(given) else expanded(given)


@cache  # a command asks several times, and should see one revision
def _fetched(address: str) -> Path:
    repo, at, revision = address.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(REPO, repo) or (at and not revision):
        raise ConfigError(f"{address} is not an address on the hub: write hf://<user>/<name>")
    from huggingface_hub import snapshot_download

    with reported(address):
        found = snapshot_download(repo, revision=revision or None, allow_patterns=list(FILES))
    folder = Path(found)
    if not any((folder / name).exists() for name in WEIGHTS):
        raise CheckpointError(f"{address} holds no encoder.safetensors: it is not of samix push")
    return folder


def short_name(address: str) -> str:
    """Return ``user-name`` of ``hf://user/name``, for files and folders made from it."""
    return address.removeprefix(PREFIX).partition("@")[0].replace("/", "-")


@contextmanager
def reported(address: str) -> Iterator[None]:
    """Convert huggingface_hub's errors to user errors, for use in ``with``.

    Args:
        address: The repository, for the sentence.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The base class of all errors of its HTTP library, which differs between its versions.
    network: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except UserError:
        raise
    except (network, OSError, ValueError) as error:
        if getattr(error, "filename", None) is not None:  # about a file of this machine
            raise
        raise UserError(_sentence(error, address)) from error


def _sentence(error: Exception, address: str) -> str:
    from huggingface_hub import constants, errors

    place, login = constants.ENDPOINT, "log in with 'hf auth login' or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        way = f"check the name, or {login} if it is private"
        return f"there is no {address} on {place} that you may read: {way}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{address}: the repository has no such revision"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        way = f": {login} with the right to write there" if status in (401, 403) else ""
        return f"{place} refuses {address} ({status}){way}"
    if isinstance(error, ValueError):  # a malformed name, or the hub's answer to a model card
        return f"{place} refuses {address}: {' '.join(str(error).split())}"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{place} cannot be reached"
    return f"cannot use {address}: {why}, and there is no copy here"
