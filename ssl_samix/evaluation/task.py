"""The encoder and images of an evaluation, loaded according to the configuration."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_samix.artifacts.encoder import Encoder
from ssl_samix.data.datasets import SPECS, Splits, load_splits
from ssl_samix.data.images import FileImages, ImageSet, MemoryImages
from ssl_samix.errors import ConfigError, DataError
from ssl_samix.evaluation.features import extract
from ssl_samix.evaluation.knn import check_finite
from ssl_samix.evaluation.request import UNLABELLED, ProtocolRequest
from ssl_samix.evaluation.source import fingerprint, load_source
from ssl_samix.processes import worker_count

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """The encoder and data of a protocol.

    Attributes:
        encoder: In eval mode, on ``device``.
        splits: The data set, at the encoder's image size.
        device: Where features are computed.
        chunk: Images per forward pass.
        workers: Number of processes that decode images.
    """

    encoder: Encoder
    splits: Splits
    device: torch.device
    chunk: int
    workers: int

    @property
    def labelled(self) -> tuple[ImageSet, ImageSet]:
        """The labelled training images and the test images.

        Raises:
            DataError: If the data set has no labels or no test images.
        """
        if self.splits.classes and self.splits.val is None:
            raise DataError(
                "this protocol needs images to test on, and each class has one image: add some, or "
                "give class folders under train/ and val/"
            )
        if self.splits.bank is None or self.splits.val is None:
            raise DataError(UNLABELLED)
        return self.splits.bank, self.splits.val

    def embed(self, images: ImageSet, what: str, picks: Sequence[int] | None = None) -> Tensor:
        """Return the features of images, (N, D) float32 on the CPU; shows a progress bar."""
        picks = range(len(images)) if picks is None else picks
        # On a terminal only: in a log file, partial progress bars would pile up.
        with tqdm(
            total=len(picks), desc=what, unit="img", leave=False, disable=not _watched()
        ) as bar:
            features = extract(
                self.encoder,
                images,
                list(picks),
                self.encoder.mean,
                self.encoder.std,
                device=self.device,
                workers=self.workers,
                chunk=self.chunk,
                progress=bar.update,
            )
        check_finite(what, features)
        return features


def _watched() -> bool:
    return sys.stderr.isatty()


def open_task(request: ProtocolRequest, encoder: Encoder | None = None) -> Task:
    """Load the encoder and the images.

    Args:
        request: Names the encoder and the images.
        encoder: The encoder, if it has already been loaded.

    Raises:
        UserError: As ``load_source`` and ``load_splits``, or if the device does not exist.
    """
    config, data = request.config, request.config.data
    device = choose_device(config.device)
    encoder = (encoder or _source(request)).to(device)
    splits = _load(request, encoder.image_size)
    for note in splits.notes:
        _log.warning("%s", note)
    workers = _workers(data.workers, splits)
    return Task(encoder, splits, device, config.chunk, workers)


def _source(request: ProtocolRequest) -> Encoder:
    config, data = request.config, request.config.data
    spec, own = SPECS[data.name], data.image_size
    size = own if own != "auto" else None
    if request.origin.path is None and config.image_size is None and size is None:
        # A model without an image size of its own uses that of the data, read from the files.
        size = _load(request, "auto").image_size
    return load_source(request.origin, config, size or 224, spec.mean, spec.std)


def _load(request: ProtocolRequest, size: int | str) -> Splits:
    data = request.config.data
    return load_splits(
        data.name,
        data.root,
        size,  # type: ignore[arg-type]
        data.limit,
        download=data.download,
        labels=data.labels,
        memory_gb=data.memory_gb,
    )


def _workers(wanted: int | str, splits: Splits) -> int:
    if wanted != "auto":
        return int(wanted)
    images = splits.val or splits.train
    return 0 if isinstance(images, MemoryImages) else worker_count()


def choose_device(name: str) -> torch.device:
    """Return the device with this name; ``auto`` is a GPU if there is one.

    Raises:
        ConfigError: If the device does not exist on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name} is not there: give auto, cpu, cuda or mps") from error
    return device


def data_fingerprint(*sets: ImageSet) -> str:
    """Return a fingerprint of image sets: 12 hexadecimal digits.

    It depends on labels, order and, for in-memory images, all pixels; for image files, on their
    names and sizes.
    """
    digest = hashlib.sha256()
    for images in sets:
        digest.update(images.labels.numpy().tobytes())
        digest.update(str(images.image_size).encode())
        if isinstance(images, MemoryImages):
            digest.update(images.pixels.contiguous().numpy().data)
        elif isinstance(images, FileImages):
            for i in range(len(images)):
                name = images.name(i)
                size = os.path.getsize(name) if os.path.isfile(name) else 0
                digest.update(f"{os.path.basename(name)} {size}\n".encode())
    return digest.hexdigest()[:12]


def encoder_fingerprint(task: Task) -> str:
    """Return a fingerprint of the encoder's weights and statistics: 12 hexadecimal digits."""
    return fingerprint(task.encoder.backbone)
