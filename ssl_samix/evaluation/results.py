"""Output of an evaluation: results.json, pictures, and rows in results.csv."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from ssl_samix.artifacts.results import NUMBERS, append_rows
from ssl_samix.config.compose import plain
from ssl_samix.errors import UserError
from ssl_samix.evaluation.request import ProtocolRequest
from ssl_samix.evaluation.task import Task, data_fingerprint, encoder_fingerprint
from ssl_samix.files import expanded, write_atomically
from ssl_samix.trainer import describe_environment


@dataclass(frozen=True)
class Row:
    """One result of a protocol.

    Attributes:
        variant: Which of the protocol's results this is, such as ``heads`` or ``lbfgs``.
        numbers: Values by name; accuracies in percent.
        settings: Settings of the result, such as the chosen learning rate.
    """

    variant: str
    numbers: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)


class Report:
    """The output folder of one evaluation, created before the work begins.

    Args:
        request: The evaluation command.

    Raises:
        UserError: If the folder cannot be created.
    """

    def __init__(self, request: ProtocolRequest) -> None:
        self.request = request
        self.home = request.origin.home
        self.folder = self._new_folder()
        self.begin = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def _new_folder(self) -> Path:
        out = self.request.config.out
        if out is None:
            stem = f"{self.request.protocol}-{self.request.data}-{time.strftime('%Y%m%d-%H%M%S')}"
            places = (self.home / "results" / (f"{stem}-{i}" if i else stem) for i in count())
            return next(p for p in places if self._made(p, exist_ok=False))
        folder = expanded(str(out))
        if (folder / "results.json").exists():
            raise UserError(f"out={folder} holds results already: choose another out")
        self._made(folder, exist_ok=True)
        return folder

    def _made(self, folder: Path, exist_ok: bool) -> bool:
        """Create a folder; return False if an evaluation started in the same second has it."""
        try:
            folder.mkdir(parents=True, exist_ok=exist_ok)
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not exist_ok and folder.is_dir():
                return False
            reason = error.strerror or error
            raise UserError(f"cannot make {folder}: {reason}; give another out=<folder>") from error
        return True

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Record the duration of a part of the work in seconds."""
        begin = time.perf_counter()
        yield
        self.seconds[what] = round(time.perf_counter() - begin, 3)

    def write(self, task: Task, rows: list[Row], details: dict[str, Any] | None = None) -> None:
        """Write results.json and append the rows to results.csv.

        Args:
            task: The encoder and images that were measured.
            rows: The results.
            details: Further results of the protocol, as plain values.

        Raises:
            UserError: If a file cannot be written.
        """
        self.seconds["total"] = round(time.perf_counter() - self.begin, 3)
        record = self._record(task, rows, details or {})
        text = json.dumps(record, indent=2) + "\n"
        write_atomically(
            self.folder / "results.json", lambda temporary: temporary.write_text(text, "utf-8")
        )
        append_rows(self.home / "results.csv", [self._line(record, row) for row in rows])

    def _record(self, task: Task, rows: list[Row], details: dict[str, Any]) -> dict[str, Any]:
        request, splits = self.request, task.splits
        sets = [s for s in (splits.train, splits.bank, splits.val) if s is not None]
        unique = list({id(s): s for s in sets}.values())
        meta = task.encoder.meta
        return {
            "protocol": request.protocol,
            "results": [
                {"variant": r.variant, "numbers": r.numbers, "settings": r.settings} for r in rows
            ],
            "details": details,
            "seed": request.config.get("seed", 0),
            "seconds": self.seconds,
            "encoder": {
                "from": request.origin.given,
                "weights": request.config.get("weights", "own"),
                "fingerprint": encoder_fingerprint(task),
                **{k: v for k, v in meta.items() if k != "mixer"},
            },
            "data": {
                "name": request.data,
                "fingerprint": data_fingerprint(*unique),
                "train_images": len(splits.bank or splits.train),
                "test_images": 0 if splits.val is None else len(splits.val),
                "classes": len(splits.classes),
            },
            "settings": plain(request.config),
            "device": str(task.device),
            "environment": describe_environment(),
        }

    def _line(self, record: dict[str, Any], row: Row) -> dict[str, Any]:
        numbers = {k: f"{row.numbers[k]:.6g}" for k in NUMBERS if k in row.numbers}
        return {
            "time": record["environment"]["time"],
            "protocol": record["protocol"],
            "variant": row.variant,
            "weights": record["encoder"]["weights"],
            "data": record["data"]["name"],
            "test_images": record["data"]["test_images"],
            **numbers,
            "seed": record["seed"],
            "seconds": record["seconds"]["total"],
            "encoder": record["encoder"]["fingerprint"],
            "data_fingerprint": record["data"]["fingerprint"],
            "settings": json.dumps(row.settings),
            "folder": str(self.folder.resolve()),
        }


def table(rows: list[Row]) -> str:
    """Return the results as text for the screen."""
    names = {"top1": "top-1 {:.2f}%", "top5": "top-5 {:.2f}%", "rankme": "RankMe {:.1f}"}
    names |= {"alignment": "alignment {:.3f}", "uniformity": "uniformity {:.3f}"}
    names |= {"ece": "ECE {:.2f}%", "fgsm_top1": "FGSM top-1 {:.2f}%"}
    names |= {"corrupted_top1": "corrupted top-1 {:.2f}%"}
    names |= {"nmi": "NMI {:.3f}", "ari": "ARI {:.3f}"}
    names |= {"cluster_accuracy": "cluster accuracy {:.2f}%"}
    width = max(len(row.variant) for row in rows) + 2
    lines = []
    for row in rows:
        numbers = "  ".join(t.format(row.numbers[k]) for k, t in names.items() if k in row.numbers)
        settings = ", ".join(f"{k} {_short(v)}" for k, v in row.settings.items())
        lines.append(f"{row.variant:<{width}}{numbers}" + (f"   ({settings})" if settings else ""))
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
