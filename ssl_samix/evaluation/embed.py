"""``samix embed``: writes the features of a folder of images to files.

Modules that need torch are imported inside functions, so that errors are reported at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    from PIL import Image

    from ssl_samix.evaluation.embedding import Pictures

MOST_SHOWN = 64  # images in the picture
NEIGHBOURS = 8  # shown beside each image
LONGEST_NAME = 24  # characters beside a row of the picture
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


def parse_embed(words: list[str]) -> EmbedRequest:
    """Parse and check ``key=value`` arguments.

    Raises:
        UserError: For the first error found.
    """
    config, _ = compose("embed", words)
    if config.run is None:
        raise ConfigError("embed needs an encoder: run=<run folder, checkpoint or weights>")
    check_choice("weights", config.weights, WEIGHTS)
    check_range("seed", config.seed, 0)
    check_range("chunk", config.chunk, 1)
    check_range("sheet", config.sheet, 0, MOST_SHOWN)
    if config.workers != "auto":
        check_range("workers", config.workers, 0)
    origin = find_origin(str(config.run), config.weights)
    if config.images is None:
        _check_own_images(origin)
    images = None if config.images is None else given_images(str(config.images))
    return EmbedRequest(origin, images, _out(config.out, origin), config)


def _check_own_images(origin: Origin) -> None:
    if origin.run is None:
        raise ConfigError(f"run={origin.given} names no images: give images=<folder>")
    data = origin.run.load_config()[0].data
    if not is_there(data.name, data.root):
        raise DataError(f"the run's images are not in {data.root} any more: give images=<folder>")


def _out(given: Any, origin: Origin) -> Path:
    if given is None:
        return origin.home / f"embeddings-{time.strftime('%Y%m%d-%H%M%S')}"
    out = expanded(str(given))
    if (out / "features.npy").exists():
        raise UserError(f"out={out} holds features already: choose another out")
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file: give a folder")
    return out


def embed(request: EmbedRequest) -> Path:
    """Write the features and return their folder.

    ``index.faiss`` and ``neighbours.png`` are made from the files of ``write_folder``, if the
    configuration asks for them.

    Raises:
        UserError: If there is no encoder or no readable image, or a file cannot be written.
    """
    import numpy as np

    from ssl_samix.data.datasets import SPECS
    from ssl_samix.evaluation.embedding import write_folder, write_index
    from ssl_samix.evaluation.source import load_source
    from ssl_samix.evaluation.task import choose_device
    from ssl_samix.pictures import write_png

    config, spec = request.config, SPECS["folder"]
    device = choose_device(config.device)
    encoder = load_source(request.origin, config, 224, spec.mean, spec.std).to(device)
    source = _pictures(request, encoder.image_size)
    out = new_folder(request.out) if config.out is None else request.out
    workers = _workers(config, len(source))
    done = write_folder(out, encoder, source, workers=workers, chunk=config.chunk)
    features = np.load(out / "features.npy", mmap_mode="r")
    if config.index:
        write_index(out / "index.faiss", features)
    if config.sheet and len(features) > 1:
        sheet = _sheet(features, done.rows, source, encoder.image_size, config)
        write_png(out / "neighbours.png", sheet)
    return out


def _pictures(request: EmbedRequest, size: int) -> Pictures:
    from ssl_samix.data.datasets import load_splits
    from ssl_samix.data.sources import PathSource
    from ssl_samix.evaluation.embedding import pictures

    source: Pictures
    if request.images is not None:
        notes, source = request.images.notes, PathSource(request.images.train.paths)
    else:
        assert request.origin.run is not None
        data = request.origin.run.load_config()[0].data
        # Images are not cached: each is decoded when it is read, and damaged ones are reported.
        splits = load_splits(
            data.name, data.root, size, data.limit, labels=data.labels, memory_gb=0
        )
        notes, source = splits.notes, pictures(splits.train)
    for note in notes:
        _log.warning("%s", note)
    return source


def _workers(config: DictConfig, total: int) -> int:
    if config.workers != "auto":
        return int(config.workers)
    return 0 if total <= config.chunk else worker_count()


def _sheet(
    features: np.ndarray, places: Sequence[int], source: Pictures, size: int, config: DictConfig
) -> Image.Image:
    """Return a picture of sampled images, each beside its nearest neighbours in feature space."""
    import torch

    from ssl_samix.evaluation.embedding import nearest_rows, picture
    from ssl_samix.pictures import paint

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
