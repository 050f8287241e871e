"""The user's cache folder: what took long to find out, and may be deleted at any time."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_samix.errors import UserError
from ssl_samix.files import expanded, write_atomically

VARIABLE = "SSL_SAMIX_CACHE"


def cache_folder() -> Path:
    """Return ``$SSL_SAMIX_CACHE``, else ``$XDG_CACHE_HOME/ssl_samix``, else ``~/.cache/ssl_samix``.

    It need not exist.
    """
    if own := os.environ.get(VARIABLE):
        return expanded(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(base).absolute() / "ssl_samix"


def digest(*parts: str) -> str:
    """Return 32 hexadecimal digits for a key of any characters."""
    text = json.dumps(parts)  # ASCII, also of file names that are no UTF-8
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(path: Path) -> Any:
    """Return what ``store`` wrote; None if it is not there or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def store(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole or not at all.

    A cache that cannot be written is no mistake, and what another process is writing at this
    moment is the same.
    """
    from filelock import FileLock

    data = json.dumps(content, separators=(",", ":")).encode()
    # filelock: OSError also for a lock that is taken, NotImplementedError on some network disks
    with suppress(OSError, UserError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=0):
            write_atomically(path, lambda temporary: temporary.write_bytes(data))
