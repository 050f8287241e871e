"""Features of any number of pictures, written as they come, and nearest neighbours among them.

Legend: N pictures, R rows (readable pictures), D feature width, S image side.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_samix.artifacts.encoder import Encoder
from ssl_samix.data.images import FileImages, ImageSet, fit, to_rgb
from ssl_samix.data.sources import UNREADABLE
from ssl_samix.data.views import normalize
from ssl_samix.errors import DataError, UserError
from ssl_samix.evaluation.knn import check_finite
from ssl_samix.files import PARTIAL, write_atomically

BLOCK = 65536  # rows that are read from a file at a time


def _unit_blocks(features: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the place of each block of rows, and its rows scaled to length 1."""
    for begin in range(0, len(features), BLOCK):
        block = torch.from_numpy(np.array(features[begin : begin + BLOCK]))
        yield begin, F.normalize(block, dim=1).numpy()


def write_index(path: Path, features: np.ndarray) -> None:
    """Write an exact faiss index of the features, rows in their order.

    It holds rows of length 1 and compares by inner product, which is the cosine when what is asked
    for has length 1 too.

    Args:
        path: The file.
        features: (R, D); a memory map is read block by block.

    Raises:
        UserError: If it cannot be written.
    """
    index = faiss.IndexFlatIP(features.shape[1])
    for _, block in _unit_blocks(features):
        index.add(block)

    def write(temporary: Path) -> None:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error

    write_atomically(path, write)


def nearest_rows(
    features: np.ndarray, asked: Sequence[int], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest rows of some rows by cosine, exactly, block by block.

    Args:
        features: (R, D); a memory map is read block by block.
        asked: (A,) which rows ask; none finds itself, copies of it are found.
        k: Neighbours; at most R - 1.

    Returns:
        Cosines (A, k), falling, and rows (A, k).
    """
    question = F.normalize(torch.from_numpy(np.array(features[list(asked)])), dim=1).numpy()
    best = faiss.ResultHeap(len(asked), k + 1, keep_max=True)
    for begin, block in _unit_blocks(features):
        near, rows = faiss.knn(
            question, block, min(k + 1, len(block)), metric=faiss.METRIC_INNER_PRODUCT
        )
        best.add_result(near, rows + begin)
    best.finalize()
    own = np.asarray(asked)[:, None] == best.I
    # Of many copies of one picture, the others may be found and the row itself not.
    own[:, -1] |= ~own.any(axis=1)
    return best.D[~own].reshape(-1, k), best.I[~own].reshape(-1, k)


_log = logging.getLogger(__name__)


@dataclass
class Embedded:
    """Which pictures have a row, and which could not be read.

    Attributes:
        rows: (R,) position of each row's picture, ascending.
        damaged: Position and reason of each of the others.
    """

    rows: list[int] = field(default_factory=list)
    damaged: list[tuple[int, str]] = field(default_factory=list)


class Pictures(Protocol):
    """N pictures that are decoded on request: a ``Source``, or those held in memory."""

    def __len__(self) -> int:
        """Return N."""

    def name(self, index: int) -> str:
        """Return the path of a picture, or its place in its data set."""

    def image(self, index: int) -> Image.Image:
        """Decode one picture; raises one of ``UNREADABLE`` for a damaged one."""


class HeldPictures:
    """The pictures of a data set that is held in memory."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        """Return N."""
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the picture's place in its data set."""
        return self.images.name(index)

    def image(self, index: int) -> Image.Image:
        """Return one picture."""
        return Image.fromarray(self.images.original(index).permute(1, 2, 0).numpy())


def pictures(images: ImageSet) -> Pictures:
    """Return the pictures of a data set, none of them standing in for a damaged one."""
    return images.source if isinstance(images, FileImages) else HeldPictures(images)


def picture(source: Pictures, index: int, size: int) -> Tensor:
    """Return one picture as an encoder's ``prepare`` fits it, (3, S, S) uint8.

    Raises:
        One of ``UNREADABLE`` for a damaged one.
    """
    # Decoded in full: at a reduced size a JPEG's features would differ a little.
    return fit(to_rgb(source.image(index)), size)


class _Chunks(Dataset[Any]):
    """The readable pictures of a chunk, (r, 3, S, S) uint8, and which of them are readable."""

    def __init__(self, source: Pictures, size: int, chunk: int) -> None:
        self.source, self.size = source, size
        self.spans = [range(i, min(i + chunk, len(source))) for i in range(0, len(source), chunk)]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> tuple[Tensor, Embedded]:
        images, found = [], Embedded()
        for i in self.spans[index]:
            try:
                images.append(picture(self.source, i, self.size))
            except UNREADABLE as error:
                found.damaged.append((i, " ".join(str(error).split())))
                continue
            found.rows.append(i)
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return (torch.stack(images) if images else empty), found


def _same(item: Any) -> Any:
    return item


@torch.no_grad()
def write_features(
    file: BinaryIO,
    encoder: Encoder,
    source: Pictures,
    device: torch.device,
    *,
    workers: int = 0,
    chunk: int = 512,
    progress: Callable[[int], object] = _same,
) -> Embedded:
    """Write the features of all readable pictures as an array of NumPy's format (.npy).

    Args:
        file: Empty; gets (R, D) float32, as the encoder gives them.
        encoder: In eval mode, on ``device``.
        source: N pictures.
        device: Where features are computed.
        workers: Processes that decode pictures.
        chunk: Pictures per forward pass.
        progress: Told how many pictures were done, after each pass.

    Raises:
        DataError: If a feature is not finite.
    """
    result = Embedded()
    mean, std = (torch.tensor(values, device=device) for values in (encoder.mean, encoder.std))
    chunks = _Chunks(source, encoder.image_size, chunk)
    begin = _write_header(file, len(source), encoder.feature_dim)
    for pixels, found in DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=_same):
        if found.rows:
            features = encoder(normalize(pixels.to(device), mean, std)).float().cpu()
            check_finite("image", features)
            file.write(np.ascontiguousarray(features.numpy(), "<f4").data)
        result.rows += found.rows
        result.damaged += found.damaged
        progress(len(found.rows) + len(found.damaged))
    # How many rows there are is known only now; the format keeps room for the number to change.
    file.seek(0)
    assert _write_header(file, len(result.rows), encoder.feature_dim) == begin
    return result


def _write_header(file: BinaryIO, rows: int, width: int) -> int:
    shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, shape)
    return file.tell()


def write_folder(out: Path, source: Pictures, features: Callable[[BinaryIO], Embedded]) -> Embedded:
    """Write features.npy and what says which row is which; nothing is left if that fails.

    ``paths.csv`` names the picture of each row; ``damaged.csv``, if there is one, those without.
    Both are there when features.npy takes its name.

    Args:
        out: The folder; made if there is none.
        source: The pictures.
        features: Writes the array, as ``write_features`` does.

    Raises:
        UserError: If no picture can be read, or nothing can be written.
    """
    found = []

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            done = features(file)
        _tell_damaged(done, source, out)
        rows = ((row, source.name(i)) for row, i in enumerate(done.rows))
        _write_csv(out / "paths.csv", ("row", "path"), rows)
        found.append(done)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror or error}") from error
    try:
        write_atomically(out / "features.npy", write)
    except BaseException:
        (out / f".features.npy{PARTIAL}").unlink(missing_ok=True)
        with suppress(OSError):  # something else may be in it
            out.rmdir()
        raise
    return found[0]


def _tell_damaged(done: Embedded, source: Pictures, out: Path) -> None:
    """Name the pictures that cannot be read; all of them in damaged.csv."""
    if not done.damaged:
        return
    names = [source.name(i).encode("utf-8", "replace").decode() for i, _ in done.damaged]
    named = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    if not done.rows:
        raise DataError(f"none of {len(names)} images can be read: repair {named}")
    rows = [(source.name(i), reason) for i, reason in done.damaged]
    _write_csv(out / "damaged.csv", ("path", "reason"), rows)
    total = len(names) + len(done.rows)
    _log.warning("%d of %d images cannot be read and have no row: %s", len(names), total, named)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    def write(temporary: Path) -> None:
        # A file's name may be of bytes that are no text.
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    write_atomically(path, write)
