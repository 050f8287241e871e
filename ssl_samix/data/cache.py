"""The user's cache folder: results that are slow to compute; may be deleted at any time."""

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
    """Return a hash of 32 hexadecimal digits of a key."""
    text = json.dumps(parts)  # ASCII, also for file names that are not UTF-8
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(path: Path) -> Any:
    """Return the content that ``store`` wrote; None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def store(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically.

    Errors are ignored: a run works without the cache, and another process that is writing the file
    writes the same content.
    """
    from filelock import FileLock

    data = json.dumps(content, separators=(",", ":")).encode()
    # filelock: OSError also for a lock that is held, NotImplementedError on some network disks
    with suppress(OSError, UserError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=0):
            write_atomically(path, lambda temporary: temporary.write_bytes(data))
