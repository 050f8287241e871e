"""Which layout of images a network bears."""

from __future__ import annotations

from torch import nn

NARROW = 16  # channels: numbers in the longest vector of a CPU


def breaks_in_channels_last(module: nn.Module) -> bool:
    """Say whether the module may not be given images or weights in channels_last.

    oneDNN's backward pass of a strided 1x1 convolution writes past its memory in channels_last
    when it reads fewer channels than fit a vector: 8 numbers, with AVX-512 16 (seen with torch 2.15
    from 48 px on).
    """
    return any(
        conv.in_channels < NARROW and conv.kernel_size == (1, 1) and conv.stride != (1, 1)
        for conv in module.modules()
        if isinstance(conv, nn.Conv2d)
    )
