"""Extraction of the features of un-augmented images, in a given order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightly.utils.dist import rank, world_size
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssl_samix.data.images import ImageSet
from ssl_samix.data.views import normalize
from ssl_samix.models.ema import evaluating


class _Chunks(Dataset[Tensor]):
    """Resized images, in chunks of consecutive picks."""

    def __init__(self, images: ImageSet, picks: Sequence[int], size: int) -> None:
        self.images = images
        self.chunks = [list(picks[i : i + size]) for i in range(0, len(picks), size)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, chunk: int) -> Tensor:
        return self.images.load(self.chunks[chunk])


@torch.no_grad()
def extract(  # noqa: PLR0913 - data and preprocessing
    encoder: nn.Module,
    images: ImageSet,
    picks: Sequence[int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    device: torch.device,
    workers: int = 0,
    chunk: int = 512,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Return the features of images under the un-augmented transform, in eval mode.

    Under DDP, each rank embeds a part of the images, and all ranks get all features.

    Args:
        encoder: Maps (B, 3, S, S) to (B, D).
        images: The data set.
        picks: Indices of its images, in the order of the result.
        mean: Mean of the normalisation, per channel.
        std: Standard deviation of the normalisation, per channel.
        device: Device of the encoder.
        workers: Number of processes that decode images.
        chunk: Images per forward pass.
        progress: Called after each forward pass with its number of images.

    Returns:
        (len(picks), D) float32 on the CPU.
    """
    ranks, me = world_size(), rank()
    share = -(-len(picks) // ranks)
    mine = list(picks[me * share : (me + 1) * share])
    channels = [torch.tensor(values, device=device) for values in (mean, std)]
    loader = DataLoader(
        _Chunks(images, mine, chunk),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # the loader draws a seed: keep the training's RNG state
    )
    rows = []
    with evaluating(encoder):
        for pixels in loader:
            rows.append(encoder(normalize(pixels.to(device), *channels)).float().cpu())
            if progress is not None:
                progress(len(pixels))
    assert rows or ranks > 1, "there is nothing to embed"
    features = torch.cat(rows) if rows else torch.empty(0, 0)
    return _joined(features, share, device)[: len(picks)] if ranks > 1 else features


GATHERED = 4096  # rows per rank that are on the device at once


def _joined(features: Tensor, share: int, device: torch.device) -> Tensor:
    """Return ``share`` rows of each rank on the CPU; ranks with fewer rows are padded with 0."""
    import torch.distributed as dist

    width = torch.tensor([features.shape[1]], device=device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    every = torch.empty(dist.get_world_size(), share, int(width))
    for begin in range(0, share, GATHERED):
        mine = features[begin : begin + GATHERED]
        part = torch.zeros(min(GATHERED, share - begin), int(width), device=device)
        if len(mine):
            part[: len(mine)] = mine.to(device)
        parts = [torch.empty_like(part) for _ in every]
        dist.all_gather(parts, part)
        for rows, given in zip(every, parts, strict=True):
            rows[begin : begin + len(part)] = given
    return every.flatten(0, 1)
