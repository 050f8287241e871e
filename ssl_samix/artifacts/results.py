"""Reading and writing results.csv, a row per evaluation of a run. Imports no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ssl_samix.errors import UserError
from ssl_samix.files import write_atomically

# Columns of numbers; other measurements of a protocol are in results.json.
NUMBERS = (
    "top1", "top5", "rankme", "alignment", "uniformity", "nmi", "ari", "cluster_accuracy", "ece",
    "fgsm_top1", "corrupted_top1", "gaussian_noise_top1", "gaussian_blur_top1", "contrast_top1",
    "jpeg_top1",
)  # fmt: skip
COLUMNS = (
    "time", "protocol", "variant", "weights", "data", "test_images", *NUMBERS, "seed", "seconds",
    "encoder", "data_fingerprint", "settings", "folder",
)  # fmt: skip


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a results.csv; its existing rows are kept.

    Raises:
        UserError: If it cannot be read or written.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):  # several evaluations may write at once
        write_rows(path, COLUMNS, [*read_rows(path), *rows])


def write_rows(path: Path, first: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV: first the columns ``first``, then all others; missing cells are empty.

    Raises:
        UserError: If it cannot be written.
    """
    columns = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a results.csv; an empty list if the file does not exist.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
