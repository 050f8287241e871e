"""``samix embed``: writes the features of a folder of images to files.

Modules that need torch are imported inside functions, so that errors are reported at once.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ssl_samix.config.compose import compose
from ssl_samix.data.folder import FolderIndex, given_images
from ssl_samix.data.layout import is_there
from ssl_samix.errors import ConfigError, DataError, UserError, check_choice, check_range
from ssl_samix.evaluation.request import WEIGHTS, Origin, find_origin
from ssl_samix.files import expanded, new_folder
from ssl_samix.processes import worker_count

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame
    from PIL import Image

    from ssl_samix.evaluation.embedding import Gallery

MOST_SHOWN = 64  # images in the picture
NEIGHBOURS = 8  # shown beside each image
LONGEST_NAME = 24  # characters beside a row of the picture
TABLES = ("csv", "parquet")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedRequest:
    """A checked ``samix embed`` command: which images are embedded by which encoder.

    Attributes:
        origin: Where the encoder comes from.
        images: The image files; None for the run's own training images.
        out: The output folder.
        config: The other keys.
    """

    origin: Origin
    images: FolderIndex | None
    out: Path
    config: DictConfig


@dataclass(frozen=True)
class Written:
    """What ``write_features`` wrote.

    Attributes:
        folder: The folder with ``features.npy`` and ``paths.csv``.
        gallery: N images.
        rows: (R,) the position of each row's image.
        image_size: The encoder's image side in px.
    """

    folder: Path
    gallery: Gallery
    rows: Sequence[int]
    image_size: int


def parse_embed(words: list[str]) -> EmbedRequest:
    """Parse and check ``key=value`` arguments.

    Raises:
        UserError: For the first error found.
    """
    config, _ = compose("embed", words)
    check_range("sheet", config.sheet, 0, MOST_SHOWN)
    if config.table is not None:
        check_choice("table", config.table, TABLES)
    if config.table == "parquet" and find_spec("pyarrow") is None:
        raise ConfigError("table=parquet needs pyarrow: pip install 'ssl_samix[parquet]'")
    return checked("embed", config, "embeddings")


def checked(command: str, config: DictConfig, name: str) -> EmbedRequest:
    """Check which images are embedded by which encoder, and return the request.

    Args:
        command: Subcommand, for messages.
        config: Its configuration, with the keys of ``load_source`` and of reading images.
        name: Begin of the output folder's name, unless it is given.

    Raises:
        UserError: For the first error found.
    """
    if config.run is None:
        raise ConfigError(f"{command} needs an encoder: run=<run folder, checkpoint or weights>")
    check_choice("weights", config.weights, WEIGHTS)
    check_range("seed", config.seed, 0)
    check_range("chunk", config.chunk, 1)
    if config.limit is not None:
        check_range("limit", config.limit, 1)
    if config.workers != "auto":
        check_range("workers", config.workers, 0)
    origin = find_origin(str(config.run), config.weights)
    if config.images is None:
        _check_own_images(origin)
    images = None if config.images is None else given_images(str(config.images))
    return EmbedRequest(origin, images, _out(config.out, origin, name), config)


def _check_own_images(origin: Origin) -> None:
    if origin.run is None:
        raise ConfigError(f"run={origin.given} names no images: give images=<folder>")
    data = origin.run.load_config()[0].data
    if not is_there(data.name, data.root):
        gone = f"not in {data.root} any more" if data.root else "not with it"
        raise DataError(f"the run's images are {gone}: give images=<folder>")


def _out(given: Any, origin: Origin, name: str) -> Path:
    if given is None:
        return origin.home / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = expanded(str(given))
    if (out / "features.npy").exists():
        raise UserError(f"out={out} holds features already: choose another out")
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file: give a folder")
    return out


def embed(request: EmbedRequest) -> Path:
    """Write the features and return their folder.

    The table, ``index.faiss`` and ``neighbours.png`` are made from the files of ``write_folder``,
    if the configuration asks for them.

    Raises:
        UserError: If there is no encoder or no readable image, or a file cannot be written.
    """
    import numpy as np

    from ssl_samix.evaluation.embedding import write_index, write_table
    from ssl_samix.pictures import write_png

    config = request.config
    written = write_features(request, normalise=config.normalise)
    out, features = written.folder, np.load(written.folder / "features.npy", mmap_mode="r")
    if config.table is not None:
        write_table(out / f"features.{config.table}", read_names(out), features)
    if config.index:
        write_index(out / "index.faiss", features)
    if config.sheet and len(features) > 1:
        sheet = _sheet(features, written, config)
        write_png(out / "neighbours.png", sheet)
    return out


def write_features(request: EmbedRequest, normalise: bool = False) -> Written:
    """Write the features of a request's images to its folder, by ``write_folder``.

    Raises:
        UserError: If there is no encoder or no readable image, or a file cannot be written.
    """
    from ssl_samix.data.datasets import SPECS
    from ssl_samix.evaluation.embedding import write_folder
    from ssl_samix.evaluation.source import load_source
    from ssl_samix.evaluation.task import choose_device

    config, spec = request.config, SPECS["folder"]
    device = choose_device(config.device)
    encoder = load_source(request.origin, config, 224, spec.mean, spec.std).to(device)
    gallery = _gallery(request, encoder.image_size)
    out = new_folder(request.out) if config.out is None else request.out
    workers = _workers(config, len(gallery.pictures))
    done = write_folder(
        out, encoder, gallery, workers=workers, chunk=config.chunk, normalise=normalise
    )
    return Written(out, gallery, done.rows, encoder.image_size)


def read_names(folder: Path) -> DataFrame:
    """Return the table of a folder's ``paths.csv``: row, path, id and, if known, label."""
    from pandas import read_csv

    # Names such as NA and 007 are text.
    return read_csv(
        folder / "paths.csv", dtype=dict.fromkeys(("path", "id", "label"), object),
        keep_default_na=False,
        encoding="utf-8", encoding_errors="surrogateescape",
    )  # fmt: skip


def _gallery(request: EmbedRequest, size: int) -> Gallery:
    from ssl_samix.data.datasets import load_splits
    from ssl_samix.data.sources import PathSource
    from ssl_samix.evaluation.embedding import Gallery, pictures

    limit = request.config.limit
    if request.images is not None:
        notes, paths = request.images.notes, request.images.train.paths
        if limit is not None and limit < len(paths):
            picks = random.Random(request.config.seed).sample(range(len(paths)), limit)
            paths = [paths[i] for i in sorted(picks)]
        root = os.path.abspath(expanded(str(request.config.images)))
        gallery = Gallery(PathSource(paths), root)
    else:
        assert request.origin.run is not None
        data = request.origin.run.load_config()[0].data
        most = min((n for n in (limit, data.limit) if n is not None), default=None)
        # Images are not cached: each is decoded when it is read, and damaged ones are reported.
        splits = load_splits(data.name, data.root, size, most, labels=data.labels, memory_gb=0)
        names = [*splits.classes, ""]  # label -1 is the last
        labels = [names[label] for label in splits.train.labels.tolist()]
        notes = splits.notes
        gallery = Gallery(
            pictures(splits.train), str(data.root or ""), labels if splits.classes else None
        )
    for note in notes:
        _log.warning("%s", note)
    return gallery


def _workers(config: DictConfig, total: int) -> int:
    if config.workers != "auto":
        return int(config.workers)
    return 0 if total <= config.chunk else worker_count()


def _sheet(features: np.ndarray, written: Written, config: DictConfig) -> Image.Image:
    """Return a picture of sampled images, each beside its nearest neighbours in feature space."""
    import torch

    from ssl_samix.evaluation.embedding import nearest_rows, picture
    from ssl_samix.pictures import paint

    source, places, size = written.gallery.pictures, written.rows, written.image_size
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randperm(len(features), generator=generator)[: config.sheet].tolist()
    count = min(NEIGHBOURS, len(features) - 1)
    cosines, rows = nearest_rows(features, drawn, count)
    tiles, captions = [], []
    for row, near, found in zip(drawn, cosines, rows.tolist(), strict=True):
        tiles.append([picture(source, places[i], size) for i in (row, *found)])
        name = _short(source.name(places[row]))
        captions.append(f"{row}: {name}\ncos {near[0]:.2f} to {near[-1]:.2f}")
    return paint(["image", *(str(n + 1) for n in range(count))], tiles, captions)


def _short(name: str) -> str:
    last = Path(name).name.encode("utf-8", "replace").decode()
    return last if len(last) <= LONGEST_NAME else f"{last[: LONGEST_NAME - 3]}..."
