"""Nearest neighbours by cosine among rows that may be too many to be in memory twice.

Legend: R rows, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from ssl_samix.files import write_atomically

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
