"""Generate images with known objects: coloured handwritten digits on patches of photos.

Digits are scikit-learn's, split as in ``data=digits``; photos are its two sample images, with the
upper part for training and the lower one for validation. Training and validation share no content.

Legend: S image side in px, N images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssl_samix.data.datasets import load_splits
from ssl_samix.data.images import MemoryImages, fit
from ssl_samix.errors import DataError, UserError

SPLITS = ("train", "val")
TRAIN_PART = 0.7  # of the height, from the top; the right half would be mostly leaves
DIGIT = (0.35, 0.7)  # side of a digit's 8 x 8 pixels, as a share of S
PATCH = (48, 128)  # px of a photo that become an image; at most the height of validation's part
EDGE = (0.2, 0.6)  # stroke intensity from which a digit starts to cover, and covers fully
COLOURS = 32  # attempts until a colour is visible
APART, LUMA_APART = 0.5, 0.25  # least distance from the background below, channels in 0..1
LUMA = np.array([0.299, 0.587, 0.114])
SMALLEST = 16  # px, S; a digit has 8 x 8 pixels

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """An image and its parts."""

    image: Bytes  # (S, S, 3)
    object: Bytes  # (S, S), share of the digit in a pixel: 0 to 255
    background: Bytes  # (S, S, 3), the patch without the digit
    digit: int


@dataclass(frozen=True)
class Ingredients:
    """Digits and photos of one split."""

    digits: list[Floats]  # ten, one per class, each (n, 8, 8) in 0..1
    photos: list[Image.Image]


def ingredients() -> dict[str, Ingredients]:
    """Return the digits and photos of both splits."""
    from sklearn.datasets import load_sample_images

    digits = load_splits("digits", None, 8, None)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    found = {}
    for name, part in zip(SPLITS, (digits.train, digits.val), strict=True):
        assert isinstance(part, MemoryImages)
        strokes = part.pixels[:, 0].numpy() / 255
        labels = part.labels.numpy()
        of_class = [strokes[labels == digit] for digit in range(10)]
        found[name] = Ingredients(of_class, [_side(photo, name) for photo in photos])
    return found


def _side(photo: Image.Image, split: str) -> Image.Image:
    cut = round(TRAIN_PART * photo.height)
    top, bottom = (0, cut) if split == "train" else (cut, photo.height)
    return photo.crop((0, top, photo.width, bottom))


def scenes(source: Ingredients, split: str, count: int, size: int, seed: int) -> Iterator[Scene]:
    """Yield random images, with alternating classes; each depends only on seed and position.

    Args:
        source: Digits and photos of the split.
        split: ``train`` or ``val``.
        count: N.
        size: S.
        seed: Seed of the data set.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, SPLITS.index(split), number))
        yield _scene(source, number % 10, size, rng)


def _scene(source: Ingredients, digit: int, size: int, rng: np.random.Generator) -> Scene:
    background = _patch(source.photos[rng.integers(len(source.photos))], size, rng)
    samples = source.digits[digit]
    cover = _placed(samples[rng.integers(len(samples))], size, rng)
    # Blend by the stored cover, so that a cover of 0 leaves the background unchanged.
    cover_bytes = np.rint(255 * cover).astype(np.uint8)
    share = (cover_bytes / 255)[:, :, None]
    colour = _colour((share * background).sum((0, 1)) / share.sum() / 255, rng)
    image = (1 - share) * background + share * 255 * colour
    return Scene(np.rint(image).astype(np.uint8), cover_bytes, background, digit)


def _patch(photo: Image.Image, size: int, rng: np.random.Generator) -> Bytes:
    side = round(rng.uniform(*PATCH))
    left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
    patch = photo.crop((left, top, left + side, top + side))
    return np.asarray(patch.resize((size, size), Image.Resampling.BICUBIC))


def _placed(strokes: Floats, size: int, rng: np.random.Generator) -> Floats:
    """Return a digit, (8, 8) in 0..1, enlarged at a random place inside (S, S), in 0..1."""
    # With a margin: strokes reach the border, and would end with a hard edge.
    framed = Image.fromarray(np.pad(strokes, 1).astype(np.float32))
    side = min(size, round(rng.uniform(*DIGIT) * size * framed.width / len(strokes)))
    smooth = np.asarray(framed.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    top, left = rng.integers(size - side + 1, size=2)
    placed = np.zeros((size, size))
    placed[top : top + side, left : left + side] = smooth
    rise = ((placed - EDGE[0]) / (EDGE[1] - EDGE[0])).clip(0, 1)
    return rise**2 * (3 - 2 * rise)


def _colour(below: Floats, rng: np.random.Generator) -> Floats:
    """Return a random colour (3,) in 0..1 that differs from the mean colour below the digit."""
    drawn = rng.random((COLOURS, 3))
    apart = np.linalg.norm(drawn - below, axis=1)
    seen = (apart >= APART) & (abs((drawn - below) @ LUMA) >= LUMA_APART)
    chosen: Floats = drawn[seen.argmax() if seen.any() else apart.argmax()]
    return chosen


def masks_folder(root: Path) -> Path:
    """Return the folder of the objects, beside that of the images."""
    return root.with_name(f"{root.name}-masks")


def write(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Write ``<root>/<split>/<digit>/<nnnnn>.png``, and objects likewise in ``<root>-masks``.

    Args:
        root: A folder that is empty or does not exist.
        counts: Split -> N.
        size: S.
        seed: Seed of all random numbers.

    Raises:
        DataError: The folder is not empty.
        UserError: No space, or no permission.
    """
    for folder in (root, masks_folder(root)):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"{folder} exists already: remove it, or name another folder")
    found = ingredients()
    try:
        for split, count in counts.items():
            for number, scene in enumerate(scenes(found[split], split, count, size, seed)):
                name = Path(split, str(scene.digit), f"{number:05d}.png")
                for folder, pixels in ((root, scene.image), (masks_folder(root), scene.object)):
                    path = folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path, compress_level=1)
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror or error}") from error


def read_val(root: Path, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the validation images and their objects, in an order that mixes the classes.

    Args:
        root: A folder that ``write`` has filled.
        size: S, to which images are resized; None: their own size.

    Returns:
        Images (N, 3, S, S) uint8, and the share of the object in each pixel, (N, S, S) in [0, 1].

    Raises:
        DataError: There are fewer than two images, or an object file is missing or unreadable.
    """
    paths = sorted((root / "val").glob("*/*.png"), key=lambda path: path.name)
    if len(paths) < 2:
        raise DataError(f"{root} has no validation images: create them with `make` first")
    images, objects = [], []
    for path in paths:
        mask = masks_folder(root) / path.relative_to(root)
        images.append(_read(path, size))
        objects.append(_read(mask, size)[0])
        if images[-1].shape[1:] != objects[-1].shape:
            raise DataError(f"{mask} has another size than its image: make the set again")
    return torch.stack(images), torch.stack(objects).float() / 255


def _read(path: Path, size: int | None) -> Tensor:
    try:
        with Image.open(path) as picture:
            pixels = picture.convert("RGB")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): make the set again") from error
    return fit(pixels, size or pixels.width)
