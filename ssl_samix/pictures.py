"""Pictures of image grids and confusion matrices, and writing them as PNG files.

Legend: K images, S image side in px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_samix.files import write_atomically

Channels = tuple[float, float, float]
MAX_TILE = 128  # px, up to which a small image is enlarged
GAP, MARGIN = 4, 12  # px between tiles, and around all of them
FONT, LINE = 14, 18  # px, size of the text and height of a line
PAPER, INK = (236, 232, 222), (40, 40, 40)  # background unlike black, grey and white; text


def paint(
    header: Sequence[str], rows: Sequence[Sequence[Tensor]], captions: Sequence[str] = ()
) -> Image.Image:
    """Return a picture of rows of tiles under a header, small ones enlarged by a whole factor.

    Args:
        header: A name for each column; it may have several lines.
        rows: As many tiles per row as there are columns, uint8, colour (3, S, S) or grey (1, S, S).
        captions: A text to the left of each row; none if it is empty.
    """
    font = ImageFont.load_default(FONT)
    factor = max(1, MAX_TILE // rows[0][0].shape[-1])
    side = factor * rows[0][0].shape[-1]
    lines = [line for caption in captions for line in caption.splitlines()]
    left = MARGIN + math.ceil(max((font.getlength(line) + MARGIN for line in lines), default=0))
    top = MARGIN + LINE * max(name.count("\n") + 1 for name in header)
    width, height = (len(tiles) * (side + GAP) - GAP + MARGIN for tiles in (header, rows))
    picture = Image.new("RGB", (left + width, top + height), PAPER)
    draw = ImageDraw.Draw(picture)
    text: dict[str, Any] = {"font": font, "fill": INK, "spacing": LINE - FONT}
    for column, name in enumerate(header):
        x = left + column * (side + GAP) + side / 2
        draw.text((x, top - GAP), name, anchor="md", align="center", **text)
    for row, tiles in enumerate(rows):
        y = top + row * (side + GAP)
        if captions:
            draw.text((MARGIN, y + side / 2), captions[row], anchor="lm", **text)
        for column, tile in enumerate(tiles):
            shown = Image.fromarray(tile.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            shown = shown.resize((side, side), Image.Resampling.NEAREST)
            picture.paste(shown, (left + column * (side + GAP), y))
    return picture


def colours(images: Tensor, mean: Channels, std: Channels) -> Tensor:
    """Return normalised images (K, 3, S, S) as pixels, uint8 on the CPU."""
    images = images.float().cpu()
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return _bytes(images * scale + shift)


def greys(masks: Tensor) -> Tensor:
    """Return masks (K, 1, S, S) as pixels, uint8 on the CPU: white is the partner."""
    return _bytes(masks.float().cpu())


def _bytes(values: Tensor) -> Tensor:
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture atomically, and make its folder if it does not exist.

    Raises:
        UserError: If it cannot be written.
    """

    def write(temporary: Path) -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        picture.save(temporary, format="PNG")

    write_atomically(path, write)
