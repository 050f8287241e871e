"""What is left to do for a run, and what has been spent on it. Imports no torch."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from ssl_samix.errors import CheckpointError, UserError
from ssl_samix.files import write_atomically
from ssl_samix.run_folder import RunFolder, read_metrics
from ssl_samix.study.children import Usage
from ssl_samix.study.plan import Run, Study, differing_words
from ssl_samix.study.table import MIXER, Row

SAID = 300  # characters of a log that are quoted, at most


class Notes:
    """What a study remembers of a run between two starts, in a JSON file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.epochs: int | None = None
        self.trained = False
        self.settings: str | None = None  # what was trained; notes of an earlier version do not say
        # One of each start: epochs that were done before, and what was used, if the end was seen.
        self.parts: list[dict[str, float]] = []
        if path.exists():
            try:
                held = json.loads(path.read_text("utf-8"))
                self.epochs, self.trained = held["epochs"], held["trained"]
                self.parts, self.settings = held["parts"], held.get("settings")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged: remove it and the run's folder") from error

    def write(self) -> None:
        """Write the file."""
        held = {
            "epochs": self.epochs,
            "trained": self.trained,
            "settings": self.settings,
            "parts": self.parts,
        }
        write_atomically(self.path, lambda temporary: temporary.write_text(json.dumps(held)))


class Job:
    """A run at work: training, then each protocol, each a process of its own.

    Args:
        study: The study.
        run: Its run.
        epochs: How many, if it has not begun yet; one that has keeps its own.

    Raises:
        UserError: If it has begun with other words, or its notes are damaged.
    """

    def __init__(self, study: Study, run: Run, epochs: int) -> None:
        self.study, self.run = study, run
        self.folder = RunFolder(study.folder(run))
        self.log = study.logs / f"{run.name}.log"
        self.notes = Notes(study.logs / f"{run.name}.json")
        if not self.folder.last.exists():  # as a new one, whatever the notes say
            self.notes.trained, self.notes.epochs = False, epochs
            self.notes.settings = None
        if self.notes.settings not in (None, run.settings):
            changed = differing_words(run.settings, self.notes.settings)
            raise UserError(
                f"{self.folder.path} was trained with other words ({changed}): rename what was "
                "changed, or remove the folder"
            )
        self.epochs = self.notes.epochs or epochs
        self.training = False
        self._heard = 0  # bytes of the log that are of earlier processes

    def next_words(self) -> list[str] | None:
        """Return the words after ``samix`` of what is to be done next, or None."""
        self.training = not self.notes.trained
        if self.training:
            return self.study.training(self.run, self.epochs)
        for protocol in self.study.evaluate:
            if not self.study.results(self.run, protocol).exists():
                return self.study.measuring(self.run, protocol)
        return None

    def begun(self) -> None:
        """Note that a process is about to start."""
        self._heard = self.log.stat().st_size if self.log.exists() else 0
        if self.training:
            self.notes.epochs, self.notes.settings = self.epochs, self.run.settings
            self.notes.parts.append({"before": len(read_metrics(self.folder.metrics))})
            self.notes.write()

    def ended(self, usage: Usage) -> str | None:
        """Note what a process has used.

        Returns:
            Why it failed, in a sentence, if it did.
        """
        if self.training:
            self.notes.parts[-1] |= asdict(usage)
            self.notes.trained = usage.status == 0
            self.notes.write()
        if usage.status == 0:
            return None
        how = f"exit status {usage.status}" if usage.status > 0 else f"signal {-usage.status}"
        said = last_words(self.log, self._heard)
        return f"{self.run.name} failed ({how}): {said}; its log is {self.log}"

    def row(self) -> Row:
        """Return the row of a run that is done.

        Raises:
            CheckpointError: If its folder holds no epochs.
        """
        epochs = read_metrics(self.folder.metrics)
        if not epochs:
            raise CheckpointError(f"{self.folder.metrics} has no epochs: remove {self.folder.path}")
        method, policy, length, seed = self.run.key
        row: Row = {
            "method": method,
            "policy": policy,
            "length": length,
            "seed": seed,
            "epochs": str(int(epochs[-1]["epoch"]) + 1),
            "steps": epochs[-1]["step"],
            "images": f"{sum(map(_images, epochs)):.0f}",
            "peak_mib": f"{max(part.get('peak_mib', 0) for part in self.notes.parts):.0f}",
            "processor": processor(),
            "precision": self._precision(),
            "settings": self.run.settings,
        }
        for name in ("seconds", "cpu_seconds"):
            row[name] = f"{self._spent(epochs, name):.1f}"
        row["cpu_ms_per_step"] = f"{1000 * median(_steps_cost(epochs)):.2f}"
        for name, column in MIXER.items():
            row[name] = _shortened(_newest(epochs, column))
        if self.study.command == "supervised":
            row["top1"] = _shortened(_newest(epochs, "val/top1"))
        for protocol in self.study.evaluate:
            row |= _accuracies(self.study.results(self.run, protocol))
        return row

    def _precision(self) -> str:
        """Return the precision of the last start."""
        try:
            starts = json.loads(self.folder.environment.read_text("utf-8"))
            return str(starts[-1]["precision"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""  # a run of an earlier version does not tell

    def _spent(self, epochs: list[dict[str, str]], name: str) -> float:
        """Sum over the starts; one whose end nobody saw counts with the epochs that it wrote."""
        parts, total = self.notes.parts, 0.0
        ends = [*(int(part["before"]) for part in parts[1:]), len(epochs)]
        for part, end in zip(parts, ends, strict=True):
            own = epochs[int(part["before"]) : end]
            total += part[name] if name in part else sum(float(epoch[name]) for epoch in own)
        return total


def last_words(log: Path, heard: int = 0) -> str:
    """Return the sentence of a log that says what went wrong: the command's own, or the last.

    Args:
        log: The file; it may not exist.
        heard: Bytes at its beginning that do not count.
    """
    text = log.read_bytes()[heard:] if log.exists() else b""
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("samix: ") for line in lines if line.startswith("samix: ")]
    return ((own or lines)[-1:] or ["it said nothing"])[0][:SAID]


def processor(told: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor, as far as the system tells; times of different ones do not compare.

    Args:
        told: Where Linux tells. Virtual machines often hide all but the maker and the numbers of
            family and model, which are therefore part of the name.
    """
    found: dict[str, str] = {}
    try:
        for line in told.read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux
    if "model name" not in found:
        return platform.processor() or platform.machine()
    if {"cpu family", "model"} <= found.keys():
        return f"{found['model name']} ({found['cpu family']}.{found['model']})"
    return found["model name"]


def _images(epoch: dict[str, str]) -> float:
    return float(epoch["images_per_second"]) * float(epoch["seconds"])


def _steps_cost(epochs: list[dict[str, str]]) -> list[float]:
    """Return each epoch's CPU seconds per step."""
    before = [0, *(int(epoch["step"]) for epoch in epochs)]
    return [
        float(epoch["cpu_seconds"]) / max(1, int(epoch["step"]) - begin)
        for epoch, begin in zip(epochs, before, strict=False)
    ]


def _newest(epochs: list[dict[str, str]], column: str) -> str:
    values = [epoch[column] for epoch in epochs if epoch.get(column)]
    return values[-1] if values else ""


def _shortened(number: str) -> str:
    return f"{float(number):.5g}" if number else ""


def _accuracies(path: Path) -> Row:
    """Read what a protocol found.

    Raises:
        UserError: If its file is damaged.
    """
    try:
        results: dict[str, Any] = {
            found["variant"]: found for found in json.loads(path.read_text("utf-8"))["results"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove its folder") from error
    top1 = {name: f"{found['numbers']['top1']:.6g}" for name, found in results.items()}
    if "heads" in top1:
        return {"linear_top1": top1["heads"]}
    setting = results["chosen"]["settings"]
    return {
        "knn_top1": top1["chosen"],
        "knn_k200_top1": top1.get("k200-T0.1", ""),
        "knn_k": str(setting["k"]),
        "knn_temperature": str(setting["temperature"]),
    }
