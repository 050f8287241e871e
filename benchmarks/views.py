"""Time four ways to compute views from a picture, in microseconds per view, on one core.

    python benchmarks/views.py [--device cuda] [--sizes 32,96,224]

PIL is lightly's transform as shipped; workers is our `WorkerViews`, image by image, as in a
loader's process; batched is our `BatchedViews` of a whole batch, on the device; in two parts: the
crops are cut image by image and finished as a batch on the device. All compute the same views of
the same pictures; below 64 px there is no blur. Then the same from JPEG files on disk, larger than
their views from 224 px on, as photographs are: including decoding (and, for the batch, fitting) of
one picture for its two views. The ways alternate in one process; the median round counts. A GPU
computes the batches, everything else runs on one core.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from common import (
    MEAN,
    METHODS,
    STD,
    Options,
    print_header,
    print_table,
    progress,
    seconds,
    smooth_images,
)
from lightly_examples import lightly_transform
from omegaconf import OmegaConf
from PIL import Image
from torch import stack
from torchvision.transforms.functional import to_pil_image

from ssl_samix.data.images import FileImages
from ssl_samix.data.sources import PathSource
from ssl_samix.data.views import BatchedViews, Views, WorkerCrops, WorkerViews

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "views"
SIZES = ("32", "64", "96", "224")
WAYS = ("PIL (lightly)", "workers", "batched", "in two parts")
COLUMNS = ("method", "px", "from", *(f"{way} us" for way in WAYS), "fastest", "PIL / fastest")
PHOTOGRAPH = 400  # px, side of the files for views of 224 px; about ImageNet's mean
VIEWS = 2  # per picture


class Pictures:
    """The same pictures in memory and on disk.

    Args:
        folder: Folder for the JPEG files.
        size: Side of the views in px.
        args: The options.
    """

    def __init__(self, folder: Path, size: int, args: argparse.Namespace) -> None:
        self.pixels = smooth_images(args.batch, size)  # pictures in memory are fitted
        self.pil = [to_pil_image(image) for image in self.pixels[: args.pictures]]
        side = PHOTOGRAPH if size >= 224 else size
        self.paths = [str(folder / f"{size}-{i}.jpg") for i in range(args.pictures)]
        for path, image in zip(self.paths, smooth_images(args.pictures, side), strict=True):
            to_pil_image(image).save(path, quality=90)
        labels = torch.zeros(args.pictures, dtype=torch.int64)
        self.files = FileImages(PathSource(self.paths), labels, size)


def decoded(path: str) -> Image.Image:
    """Return a decoded file, as by torchvision's data sets in lightly's examples."""
    with open(path, "rb") as file:
        return Image.open(io.BytesIO(file.read())).convert("RGB")


def from_memory(pictures: Pictures, method: str, device: str) -> list[tuple[Callable, int]]:
    """Return per way the function of a round and its number of pictures."""
    size = pictures.pixels.shape[-1]
    theirs, single, batched, crops = transforms(method, size, device)
    pixels, few = pictures.pixels.to(device), pictures.pixels[: len(pictures.pil)]
    return [
        (lambda: [theirs(picture) for picture in pictures.pil], len(few)),
        (lambda: [single(image) for image in few], len(few)),
        (lambda: batched(pixels), len(pixels)),
        (lambda: batched.finish(stack([crops(image) for image in few]).to(device)), len(few)),
    ]


def from_files(pictures: Pictures, method: str, device: str) -> list[tuple[Callable, int]]:
    """Return the same, including decoding."""
    size, files = pictures.pixels.shape[-1], pictures.files
    theirs, single, batched, crops = transforms(method, size, device)
    every = range(len(files))
    return [
        (lambda: [theirs(decoded(path)) for path in pictures.paths], len(files)),
        (lambda: [single(files.picture(i)) for i in every], len(files)),
        (lambda: batched(files.load(every).to(device)), len(files)),
        (
            lambda: batched.finish(stack([crops(files.picture(i)) for i in every]).to(device)),
            len(files),
        ),
    ]


def transforms(
    method: str, size: int, device: str
) -> tuple[Callable[..., object], WorkerViews, BatchedViews, WorkerCrops]:
    """Return the transform of a method for each way; the last one only cuts the crops."""
    config = OmegaConf.load(CONFIGS / f"{method}.yaml")
    specs = Views(config.a, config.b).specs(size, flip=True)
    batched = BatchedViews(specs, size, MEAN, STD).to(device)
    crops = WorkerCrops(specs, size)
    return lightly_transform(method, size), WorkerViews(specs, size), batched, crops


def measured(ways: Sequence[tuple[Callable, int]], args: argparse.Namespace) -> list[float]:
    """Return microseconds per view of each way, the median over alternating rounds."""
    rounds = [
        [seconds(work, args.device) / count / VIEWS * 1e6 for work, count in ways]
        for _ in range(args.rounds + 1)  # the first round is the warm-up
    ]
    return [median(times) for times in zip(*rounds[1:], strict=True)]


def row(times: Sequence[float]) -> list[str]:
    best = min(times)
    name = WAYS[list(times).index(best)]
    return [*(f"{time:.1f}" for time in times), name, f"{times[0] / best:.1f}"]


def rows(folder: Path, args: argparse.Namespace) -> Iterator[list[str]]:
    """Yield a row per size, method and source, as soon as it is measured."""
    for size in args.sizes:
        pictures = Pictures(folder, size, args)
        for method in args.methods:
            progress(f"{method}, {size} px")
            for name, ways in (("memory", from_memory), ("JPEG", from_files)):
                times = measured(ways(pictures, method, args.device), args)
                yield [method, str(size), name, *row(times)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Options(
        __doc__,
        cpu={"batch": 64, "pictures": 8, "rounds": 3},
        cuda={"batch": 256, "pictures": 32, "rounds": 7},
        about={
            "batch": "images of a batch from memory",
            "pictures": "of a round, one by one or out of files",
            "rounds": "rounds that count",
        },
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--sizes", default="32,96,224", help="of the views in px, likewise")
    args = parser.read(arguments)
    args.methods = parser.names("methods", args.methods, METHODS)
    args.sizes = [int(size) for size in parser.names("sizes", args.sizes, SIZES)]
    args.batch = max(args.batch, args.pictures)
    torch.set_num_threads(1)
    # After freeing a large block once, malloc keeps large blocks, as after a first training step.
    torch.empty(30 * 2**20, dtype=torch.uint8).zero_()
    print_header("Views", args)
    with tempfile.TemporaryDirectory() as folder:
        print_table(COLUMNS, rows(Path(folder), args))


if __name__ == "__main__":
    main()
