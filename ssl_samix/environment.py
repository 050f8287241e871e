"""What a run ran on: versions and revision, for whoever wants to repeat it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ssl_samix.files import write_atomically

PACKAGES = (
    "ssl_samix", "torch", "torchvision", "lightly", "pytorch_lightning", "timm", "faiss-cpu",
    "hydra-core", "numpy",
)  # fmt: skip


def record_start(path: Path, precision: str) -> None:
    """Append what a run is started, or resumed, with to the list in a JSON file.

    Args:
        path: The file.
        precision: That the trainer has chosen; the configuration may say ``auto``.
    """
    starts = json.loads(path.read_text("utf-8")) if path.exists() else []
    text = json.dumps([*starts, {**describe_environment(), "precision": precision}], indent=2)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def describe_environment() -> dict[str, Any]:
    """Return package versions, git revision of the package's checkout, system and command."""
    import torch

    return {
        "command": sys.orig_argv,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_revision": git_revision(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Return the commit of the checkout that the package runs from; None if it is installed."""
    package = Path(__file__).resolve().parent
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
