"""File name endings that count as images: still-picture formats of the installed Pillow.

Pillow is imported inside the functions that need it, torch and numpy not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Literal

from ssl_samix.errors import DataError

# Common ones first: Pillow tries them in this order. Missing on purpose: formats that start other
# programs (EPS, PDF, WMF), films (FLI, MPEG), formats of which Pillow reads only the header (BUFR,
# GRIB, HDF5), and endings that mostly mean something else (.pcd: point clouds).
_STILL_PICTURES = (
    "JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF", "MPO", "ICO",
    "ICNS", "TGA", "DIB", "DDS", "PCX", "QOI", "SGI", "SUN", "PSD", "XBM", "XPM", "FITS",
)  # fmt: skip
# Names that file servers and operating systems create, in lower case.
_SYSTEM = frozenset(
    {
        "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
        "system volume information", "lost+found", "thumbs.db", "desktop.ini",
    }
)  # fmt: skip
_HEIF = frozenset({".heic", ".heif", ".hif"})
_NAMED = 8  # endings
Kind = Literal["folder", "image", "other", "neither"]


@cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are opened.

    HEIF is among them where ``pillow-heif`` is installed.
    """
    from PIL import Image

    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in _STILL_PICTURES if name in Image.OPEN)


@cache
def endings() -> frozenset[str]:
    """Return the file name endings of images, in lower case, such as ``.jpg``."""
    opened = {*formats(), "MPO"}  # Pillow opens these as JPEG
    from PIL import Image

    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in opened
    )


def count_by_ending(others: Mapping[str, int]) -> str:
    """Return a text: how many files were not taken for images, by ending.

    Args:
        others: Ending -> number of files; at least one.
    """
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{ending or 'without an ending'} {count}" for ending, count in most[:_NAMED]]
    more = [f"{len(most) - _NAMED} other endings"] if len(most) > _NAMED else []
    heif = "; .heic needs pip install pillow-heif" if _HEIF & others.keys() else ""
    total = sum(others.values())
    return f"{total} files that are not images here ({', '.join(named + more)}{heif})"


def visible(path: str | os.PathLike[str]) -> Iterator[tuple[os.DirEntry[str], Kind, str]]:
    """Yield the entries of a folder, without hidden and system files.

    Links are followed, at one ``stat`` each; nothing else costs more than the listing.

    Returns:
        Each entry; whether it is a folder, a regular file named as an image, another regular file,
        or neither folder nor file (a link to nothing or in a circle, a pipe, a device); and the
        ending of its name, in lower case.

    Raises:
        DataError: If the folder may not be listed, or a link in it not be followed.
        OSError: If ``path`` is not a folder.
    """
    known = endings()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith(".") or name in _SYSTEM:
                    continue
                _, dot, last = name.rpartition(".")
                ending = dot and dot + last
                yield entry, _kind(entry, ending in known), ending
    except PermissionError:
        raise DataError(f"no permission to list {path}: grant it or give another folder") from None


def _kind(entry: os.DirEntry[str], named_as_image: bool) -> Kind:
    try:
        if entry.is_file():
            return "image" if named_as_image else "other"
        if entry.is_dir():
            return "folder"
    except PermissionError:
        raise
    except OSError:  # links in a circle
        return "neither"
    return "neither"
