"""Decode many pictures: all of them into memory, or a sample to check for damage."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ssl_samix.data.folder import join_names
from ssl_samix.data.images import MemoryImages, fit, resized_side, to_rgb
from ssl_samix.data.sources import UNREADABLE, EncodedSource, Source, described
from ssl_samix.errors import DataError

_log = logging.getLogger(__name__)
# At most this share of unreadable images is skipped, or a few in a small set, but not over half.
_TOLERATED = 0.01
_A_FEW = 3
_CHUNK = 256  # images per task of a thread
_BAR_FROM = 5000  # images; fewer are decoded too fast for a progress bar
_WORTH_THREADS = 1e-3  # seconds per image


def memory_images(source: Source, labels: Tensor, size: int) -> MemoryImages:
    """Return all pictures decoded into memory; unreadable ones are skipped with a warning.

    Args:
        source: N pictures.
        labels: (N,) int64.
        size: S, image side in pixels.

    Returns:
        The readable images, in order.

    Raises:
        DataError: More pictures are unreadable than 1%, or 3 of a small set, or half of them.
    """
    total = len(source)
    pixels = torch.empty(total, 3, size, size, dtype=torch.uint8)
    bad = _visit(source, size, lambda i, image: pixels[i].copy_(fit(image, size)))
    _judge(list(bad.values()), total)
    if bad:
        keep = [i for i in range(total) if i not in bad]
        pixels, labels, source = pixels[keep], labels[keep], source.take(keep)
    names = [source.name(i) for i in range(len(source))]
    kept = source if isinstance(source, EncodedSource) else None  # an array would stay alive
    return MemoryImages(pixels, labels, names, len(bad), kept)


def check_sample(source: Source, size: int, seed: int = 0, most: int = 1000) -> None:
    """Decode a random sample, to check a set that is decoded on demand later.

    Args:
        source: N pictures.
        size: S, image side in pixels.
        seed: Fixes the sample.
        most: Pictures in the sample at most.

    Raises:
        DataError: More of the sample is unreadable than 1%, or 3 of a small one, or half of it.
    """
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(source), generator=generator)[:most].sort().values.tolist()
    chosen = source.take(sample)
    bad = _visit(chosen, size, lambda _, image: image, at_once=16)
    _judge(list(bad.values()), len(chosen))


def typical_side(source: EncodedSource, seed: int = 0, most: int = 200) -> int:
    """Return the median shorter side in pixels, from the headers of a random sample.

    Args:
        source: N pictures.
        seed: Fixes the sample.
        most: Pictures in the sample at most.

    Raises:
        DataError: No header in the sample can be read.
    """
    generator = torch.Generator().manual_seed(seed)
    sides, bad = [], []
    for i in torch.randperm(len(source), generator=generator)[:most].tolist():
        try:
            with source.open(i) as image:
                sides.append(min(image.size))
        except UNREADABLE as error:
            bad.append(described(source.name(i), error))
    if not sides:
        _judge(bad, len(bad))
    return int(torch.tensor(sides).median())


def _visit(
    source: Source, size: int, keep: Callable[[int, Image.Image], object], at_once: int = _CHUNK
) -> dict[int, str]:
    """Decode all pictures; return positions and names of unreadable pictures.

    Args:
        source: N pictures.
        size: S, image side in pixels.
        keep: Called with the position of each readable picture, and the picture.
        at_once: Pictures per task of a thread.
    """
    at_least = 2 * resized_side(size)  # reducing to twice the size keeps the result sharp

    def visit(span: range) -> dict[int, str]:
        bad = {}
        for i in span:
            image = decoded(source, i, at_least)
            if isinstance(image, str):
                bad[i] = image
            else:
                keep(i, image)
        return bad

    total = len(source)
    spans = [range(i, min(i + at_once, total)) for i in range(0, total, at_once)]
    hidden = total <= _BAR_FROM or not sys.stderr.isatty()
    with tqdm(total=total, unit=" images", desc="loading", disable=hidden) as bar:
        found = {}
        for span, bad in zip(spans, _each(visit, spans), strict=True):
            found.update(bad)
            bar.update(len(span))
    return found


def _each(
    decode: Callable[[range], dict[int, str]], spans: list[range]
) -> Iterator[dict[int, str]]:
    """Yield ``decode(span)`` in order, on several threads where that helps."""
    begin = time.perf_counter()
    yield decode(spans[0])
    # Opening a file holds Python's lock for about 0.2 ms: if decoding takes little more, threads
    # only wait for each other
    if (time.perf_counter() - begin) / len(spans[0]) < _WORTH_THREADS:
        yield from map(decode, spans[1:])
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(decode, spans[1:])


def decoded(source: Source, index: int, at_least: int) -> Image.Image | str:
    """Return the picture in RGB, or its name for the warning if it cannot be read."""
    try:
        return to_rgb(source.image(index, at_least))
    except UNREADABLE as error:
        return described(source.name(index), error)


def _judge(bad: list[str], total: int) -> None:
    """Warn about unreadable images, or raise if there are too many."""
    if not bad:
        return
    most = min(max(int(_TOLERATED * total), _A_FEW), total // 2)
    if len(bad) > most:
        raise DataError(
            f"{len(bad)} of {total} images cannot be read, more than the {most} that would be "
            f"skipped: repair or remove {join_names(bad, 20)}"
        )
    _log.warning(
        "%d of %d images cannot be read and are skipped: %s", len(bad), total, join_names(bad)
    )
