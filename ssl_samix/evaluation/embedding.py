"""Features of any number of pictures, streamed to a file, and nearest neighbours among them.

Legend: N pictures, R rows (readable pictures), D feature width, S image side.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from pandas import DataFrame, concat
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ssl_samix.artifacts.encoder import Encoder
from ssl_samix.data.folder import join_names
from ssl_samix.data.images import FileImages, ImageSet, fit, to_rgb
from ssl_samix.data.sources import UNREADABLE, Source
from ssl_samix.data.views import normalize
from ssl_samix.errors import DataError, UserError
from ssl_samix.evaluation.knn import check_finite
from ssl_samix.files import PARTIAL, write_atomically

BLOCK = 65536  # rows read from a file at a time
MOST_COSINES = 2**25  # computed at a time: 128 MB
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}  # names may be no text
_log = logging.getLogger(__name__)


@dataclass
class Embedded:
    """Which pictures have a row in the features, and which could not be read.

    Attributes:
        rows: (R,) position of each row's picture, ascending.
        damaged: Position and reason of each picture that could not be read.
    """

    rows: list[int] = field(default_factory=list)
    damaged: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class HeldPictures:
    """The pictures of an in-memory data set."""

    images: ImageSet

    def __len__(self) -> int:
        """Return N."""
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the picture's name: its position in the data set."""
        return self.images.name(index)

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """Return one picture; it needs no decoding, so ``at_least`` is ignored."""
        return Image.fromarray(self.images.original(index).permute(1, 2, 0).numpy())


Pictures = Source | HeldPictures


@dataclass(frozen=True)
class Gallery:
    """Pictures with their ids and labels.

    Attributes:
        pictures: N pictures.
        root: Folder of the images, as their names begin; empty if they are not files.
        labels: N names of classes, empty where there is none; None without labels.
    """

    pictures: Pictures
    root: str = ""
    labels: Sequence[str] | None = None

    def id(self, index: int) -> str:
        """Return the id by which runs are joined: the path relative to ``root``, with slashes.

        Pictures that are not files in ``root`` have their name: ``"cifar10 train 17"``.
        """
        name, folder = self.pictures.name(index), os.path.join(self.root, "")
        if not self.root or not name.startswith(folder):
            return name
        return PurePath(name[len(folder) :]).as_posix()

    def table(self, rows: Sequence[int]) -> DataFrame:
        """Return path, id and, if known, label of the pictures at these positions."""
        columns = {
            "path": [self.pictures.name(i) for i in rows],
            "id": [self.id(i) for i in rows],
        }
        if self.labels is not None:
            columns["label"] = [self.labels[i] for i in rows]
        # A file name may hold bytes that are not valid text, which a text column cannot store.
        return DataFrame(columns, dtype=object)


def pictures(images: ImageSet) -> Pictures:
    """Return the pictures of a data set, without substitutes for damaged ones."""
    return images.source if isinstance(images, FileImages) else HeldPictures(images)


def picture(source: Pictures, index: int, size: int) -> Tensor:
    """Return one picture resized as by an encoder's ``prepare``, (3, S, S) uint8.

    Raises:
        One of ``UNREADABLE`` if the picture is damaged.
    """
    # Decoded at full size: the features of a JPEG decoded at a reduced size differ slightly.
    return fit(to_rgb(source.image(index)), size)


class _Chunks(Dataset[Any]):
    """Chunks: the readable pictures, (r, 3, S, S) uint8, and which pictures are readable."""

    def __init__(self, source: Pictures, size: int, chunk: int) -> None:
        self.source, self.size = source, size
        self.spans = [range(i, min(i + chunk, len(source))) for i in range(0, len(source), chunk)]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> tuple[Tensor, Embedded]:
        images, found = [torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)], Embedded()
        for i in self.spans[index]:
            try:
                images.append(picture(self.source, i, self.size)[None])
            except UNREADABLE as error:
                found.damaged.append((i, " ".join(str(error).split())))
                continue
            found.rows.append(i)
        return torch.cat(images), found


def write_folder(
    out: Path,
    encoder: Encoder,
    gallery: Gallery,
    *,
    workers: int = 0,
    chunk: int = 512,
    normalise: bool = False,
) -> Embedded:
    """Write the features of all readable pictures, and files that map rows to pictures.

    ``features.npy`` holds the encoder's features, (R, D) float32. ``paths.csv`` has path, id and,
    if known, label of each row; ``damaged.csv``, if any picture is damaged, names those without a
    row.
    ``features.npy`` gets its final name last, when the others exist; on failure no file remains.

    Args:
        out: The folder; created if it does not exist.
        encoder: In eval mode.
        gallery: N pictures.
        workers: Number of processes that decode pictures.
        chunk: Pictures per forward pass.
        normalise: Whether the rows are L2-normalised.

    Raises:
        DataError: If no picture can be read, or a feature is not finite.
        UserError: If a file cannot be written.
    """
    chunks = _Chunks(gallery.pictures, encoder.image_size, chunk)
    loader = DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=_same)
    found = Embedded()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write_features(file, encoder, loader, len(gallery.pictures), found, normalise)
        _write_names(out, gallery, found)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror or error}") from error
    try:
        write_atomically(out / "features.npy", write)
    except BaseException:
        (out / f".features.npy{PARTIAL}").unlink(missing_ok=True)
        with suppress(OSError):  # the folder may hold other files
            out.rmdir()
        raise
    return found


def _same(item: Any) -> Any:
    return item


@torch.no_grad()
def _write_features(
    file: BinaryIO,
    encoder: Encoder,
    loader: DataLoader[Any],
    total: int,
    found: Embedded,
    normalise: bool,
) -> None:
    """Write the features in NumPy's format, and record in ``found`` which pictures have a row."""
    device = next(encoder.parameters()).device
    mean, std = (torch.tensor(values, device=device) for values in (encoder.mean, encoder.std))
    begin = _write_header(file, total, encoder.feature_dim)
    # On a terminal only: in a log file, partial progress bars would pile up.
    hidden = not sys.stderr.isatty()
    with tqdm(total=total, desc="features", unit="img", leave=False, disable=hidden) as bar:
        for pixels, part in loader:
            if part.rows:
                features = encoder(normalize(pixels.to(device), mean, std)).float().cpu()
                check_finite("image", features)
                features = F.normalize(features, dim=1) if normalise else features
                file.write(np.ascontiguousarray(features.numpy(), "<f4").data)
            found.rows += part.rows
            found.damaged += part.damaged
            bar.update(len(part.rows) + len(part.damaged))
    # The number of rows is known only now; the header has room for it to change.
    # No memory map: a full disk would kill the process instead of raising OSError.
    file.seek(0)
    assert _write_header(file, len(found.rows), encoder.feature_dim) == begin


def _write_header(file: BinaryIO, rows: int, width: int) -> int:
    shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, shape)
    return file.tell()


def _write_names(out: Path, gallery: Gallery, found: Embedded) -> None:
    """Write paths.csv; if pictures are damaged, write damaged.csv and warn, naming up to ten."""
    names = gallery.table(found.rows)
    rows = [(gallery.pictures.name(i), reason) for i, reason in found.damaged]
    damaged = DataFrame(rows, columns=["path", "reason"], dtype=object)
    unreadable = join_names([name.encode("utf-8", "replace").decode() for name in damaged["path"]])
    if len(names) == 0:
        raise DataError(f"none of {len(damaged)} images can be read: repair {unreadable}")
    write_atomically(out / "paths.csv", lambda file: names.to_csv(file, index_label="row", **TEXT))
    if len(damaged):
        write_atomically(
            out / "damaged.csv", lambda file: damaged.to_csv(file, index=False, **TEXT)
        )
        _log.warning(
            "%d of %d images cannot be read and have no row: %s",
            *(len(damaged), len(damaged) + len(names), unreadable),
        )


def write_table(path: Path, names: DataFrame, features: np.ndarray) -> None:
    """Write names and features as one table, CSV or Parquet by the ending of ``path``.

    Args:
        path: The file; a Parquet file needs pyarrow.
        names: (R, ...) the first columns.
        features: (R, D), the columns ``f0``, ``f1`` and so on; a memory map is read block by block.

    Raises:
        UserError: If it cannot be written.
    """
    columns = [f"f{i}" for i in range(features.shape[1])]

    def blocks() -> Iterator[DataFrame]:
        for begin in range(0, len(features), BLOCK):
            part = slice(begin, begin + BLOCK)
            values = DataFrame(np.array(features[part]), columns=columns)
            yield concat([names[part].reset_index(drop=True), values], axis=1)

    def write_csv(temporary: Path) -> None:
        for number, block in enumerate(blocks()):
            block.to_csv(temporary, mode="a" if number else "w", header=not number, index=False,
                         **TEXT)  # fmt: skip

    def write_parquet(temporary: Path) -> None:
        from pyarrow import Table
        from pyarrow.parquet import ParquetWriter

        tables = (Table.from_pandas(_as_text(block), preserve_index=False) for block in blocks())
        first = next(tables)
        with ParquetWriter(temporary, first.schema) as writer:
            for table in (first, *tables):
                writer.write_table(table)

    write_atomically(path, write_csv if path.suffix == ".csv" else write_parquet)


def _as_text(block: DataFrame) -> DataFrame:
    """Return a table in which bytes of names that are not valid text are written as ``\\xff``."""
    names = block.select_dtypes(exclude="number")
    return block.assign(**{
        name: [str(n).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
               for n in names[name]]
        for name in names
    })  # fmt: skip


def _unit_blocks(features: np.ndarray) -> Iterator[Tensor]:
    """Yield blocks of rows, L2-normalised."""
    for begin in range(0, len(features), BLOCK):
        yield F.normalize(torch.from_numpy(np.array(features[begin : begin + BLOCK])), dim=1)


def write_index(path: Path, features: np.ndarray) -> None:
    """Write an exact faiss index of the features, in row order.

    Its rows are L2-normalised and compared by inner product, which is the cosine similarity if
    the queries are L2-normalised too.

    Args:
        path: The file.
        features: (R, D); a memory map is read block by block.

    Raises:
        UserError: If it cannot be written.
    """
    index = faiss.IndexFlatIP(features.shape[1])
    for block in _unit_blocks(features):
        index.add(block.numpy())

    def write(temporary: Path) -> None:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error

    write_atomically(path, write)


def nearest_rows(features: np.ndarray, asked: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest rows of some rows by cosine similarity, exactly.

    Args:
        features: (R, D); a memory map is read block by block.
        asked: (A,) query rows; a row is never its own neighbour, but copies of it can be.
        k: Number of neighbours; at most R - 1.

    Returns:
        Cosine similarities (A, k), in descending order, and row indices (A, k).
    """
    question = F.normalize(torch.from_numpy(np.array(features[list(asked)])), dim=1)
    cosines = torch.cat([question @ block.T for block in _unit_blocks(features)], dim=1)
    cosines[range(len(asked)), list(asked)] = -2  # less than any cosine
    near, rows = cosines.topk(k)
    return near, rows


def neighbourhoods(features: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest rows of every row by cosine similarity, as ``nearest_rows``.

    Exact, so it takes R^2 D multiplications.

    Returns:
        Cosine similarities (R, k), in descending order, and row indices (R, k).
    """
    total = len(features)
    step = max(1, MOST_COSINES // total)
    asked = [range(begin, min(begin + step, total)) for begin in range(0, total, step)]
    cosines, rows = zip(*(nearest_rows(features, part, k) for part in asked), strict=True)
    return torch.cat(cosines), torch.cat(rows)
