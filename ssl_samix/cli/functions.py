"""The subcommands as Python functions; checks and errors are those of the command line."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.cli.commands import load_protocol
from ssl_samix.training import pretrain as _pretraining
from ssl_samix.training.logging import Run
from ssl_samix.training.run import as_words

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

    from ssl_samix.evaluation.outliers import Outliers

Source = str | os.PathLike[str] | Run


@dataclass(frozen=True)
class Measured:
    """Result of a protocol.

    Attributes:
        folder: The folder with ``results.json`` and the pictures.
        table: One row per variant, such as ``heads`` and ``lbfgs``; columns are the numbers
            (accuracies in percent) and the chosen settings.
        details: Further results, such as the confusion matrix.
    """

    folder: Path
    table: DataFrame
    details: dict[str, Any]

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent of the first variant, which is the protocol's own choice."""
        return float(self.table["top1"].iloc[0])

    def _repr_html_(self) -> str:
        return str(self.table.to_html())


@dataclass(frozen=True)
class Embedded:
    """Features of a folder of images.

    Attributes:
        folder: The folder with ``features.npy`` and ``paths.csv``.
        features: (N, D) float32, read from the disk when it is used.
        paths: The image of each row: ``row``, ``path``, ``id`` (the path relative to the images,
            by which runs are joined) and, of a labelled run's own images, ``label``.
    """

    folder: Path
    features: np.ndarray
    paths: DataFrame


@wraps(_pretraining.pretrain)
def pretrain(*given: Any, **settings: Any) -> Run:
    """Pretrain an encoder, and write its report if ``report=True``."""
    from ssl_samix.reporting.report import write_wanted

    run = _pretraining.pretrain(*given, **settings)
    write_wanted(RunFolder(run.out))
    return run


def linear(run: Source, data: str | os.PathLike[str] | None = None, **settings: Any) -> Measured:
    """Measure an encoder by a linear classifier: ``samix linear`` as a function.

    Args:
        run: A run, its folder, a checkpoint, a file of weights, or the name of a model.
        data: A data set's name or a folder of images; None: the images of the run.
        **settings: Keys of ``configs/linear.yaml``, as nested dicts or dotted.

    Raises:
        UserError: For all errors that the command line reports, with the same message.
    """
    return _measured("linear", "linear", run, data, settings)


def knn(run: Source, data: str | os.PathLike[str] | None = None, **settings: Any) -> Measured:
    """Measure an encoder by nearest neighbours: ``samix knn``; arguments as of ``linear``."""
    return _measured("knn", "knn", run, data, settings)


def semi(run: Source, data: str | os.PathLike[str] | None = None, **settings: Any) -> Measured:
    """Measure an encoder with few labels: ``samix semi``; arguments as of ``linear``."""
    return _measured("semi", "semi_supervised", run, data, settings)


def measures(run: Source, data: str | os.PathLike[str] | None = None, **settings: Any) -> Measured:
    """Measure an encoder without labels: ``samix measures``; arguments as of ``linear``."""
    return _measured("measures", "measures", run, data, settings)


def robustness(
    run: Source, data: str | os.PathLike[str] | None = None, **settings: Any
) -> Measured:
    """Measure a classifier under attack: ``samix robustness``; arguments as of ``linear``."""
    return _measured("robustness", "robustness", run, data, settings)


def embed(run: Source, images: str | os.PathLike[str] | None = None, **settings: Any) -> Embedded:
    """Compute the features of images: ``samix embed`` as a function.

    Args:
        run: A run, its folder, a checkpoint, a file of weights, or the name of a model.
        images: A folder of images; None: the run's training images.
        **settings: Keys of ``configs/embed.yaml``.

    Raises:
        UserError: For all errors that the command line reports, with the same message.
    """
    import numpy as np

    from ssl_samix.evaluation.embed import embed as embedded
    from ssl_samix.evaluation.embed import parse_embed, read_names

    folder = embedded(parse_embed(_words(run, None, {**settings, "images": images})))
    features = np.load(folder / "features.npy", mmap_mode="r")
    return Embedded(folder, features, read_names(folder))


def outliers(
    run: Source, images: str | os.PathLike[str] | None = None, **settings: Any
) -> Outliers:
    """List the most isolated and the most alike images: ``samix outliers`` as a function.

    Args:
        run: A run, its folder, a checkpoint, a file of weights, or the name of a model.
        images: A folder of images; None: the run's training images.
        **settings: Keys of ``configs/outliers.yaml``.

    Raises:
        UserError: For all errors that the command line reports, with the same message.
    """
    from ssl_samix.evaluation.outliers import find_outliers, parse_outliers

    return find_outliers(parse_outliers(_words(run, None, {**settings, "images": images})))


def export(run: Source, format: str, **settings: Any) -> Path:
    """Write an encoder for another library or runtime: ``samix export`` as a function.

    Args:
        run: A run, its folder, a checkpoint or an ``encoder.safetensors``.
        format: ``torchvision``, ``timm``, ``onnx``, ...: see ``configs/export.yaml``.
        **settings: Further keys of that file.

    Returns:
        The file that was written.

    Raises:
        UserError: For all errors that the command line reports, with the same message.
    """
    from ssl_samix.artifacts.export import export as exported
    from ssl_samix.artifacts.export import parse_export

    return exported(parse_export(_words(run, None, {**settings, "format": format}))).path


def compare(*runs: Source, variants: str = "headline") -> DataFrame:
    """Return the results of several runs as one table: ``samix compare`` as a function.

    Args:
        *runs: Runs, their folders, or folders of them.
        variants: ``headline``: of each evaluation only its first row of each number; or ``all``.

    Returns:
        One row per configuration; cells are text, as on the command line.

    Raises:
        UserError: For all errors that the command line reports, with the same message.
    """
    from pandas import DataFrame

    from ssl_samix.reporting.compare import compared, find_results, parse_comparison

    wanted = parse_comparison([*map(_path, runs), f"variants={variants}"])
    table = compared(find_results(wanted.paths), wanted.variants == "all")
    return DataFrame(table.rows, columns=[" ".join(filter(None, name)) for name in table.header])


def report(*runs: Source, **settings: Any) -> Path:
    """Write an HTML report of runs: ``samix report`` as a function.

    Args:
        *runs: Runs or their folders.
        **settings: Keys of ``configs/report.yaml``.

    Returns:
        The file that was written.

    Raises:
        UserError: For all errors that the command line reports, with the same message.
    """
    from ssl_samix.reporting.report import parse_report, write_report

    keys = {key: os.fspath(v) if key == "out" else v for key, v in settings.items()}
    words = [f"{key}={value}" for key, value in keys.items() if value is not None]
    return write_report(parse_report([*map(_path, runs), *words]))


def _measured(
    command: str,
    module: str,
    run: Source,
    data: str | os.PathLike[str] | None,
    settings: dict[str, Any],
) -> Measured:
    from pandas import DataFrame

    from ssl_samix.evaluation.request import parse_protocol

    request = parse_protocol(command, _words(run, data, settings))
    protocol = load_protocol(module)
    protocol.check(request.config)
    folder: Path = protocol.run(request)
    record = json.loads((folder / "results.json").read_text("utf-8"))
    rows = [{"variant": r["variant"], **r["numbers"], **r["settings"]} for r in record["results"]]
    return Measured(folder, DataFrame(rows), record["details"])


def _path(run: Source) -> str:
    return os.fspath(run.out if isinstance(run, Run) else run)


def _words(run: Source, data: str | os.PathLike[str] | None, settings: dict[str, Any]) -> list[str]:
    return as_words(data, settings, run=_path(run))
