"""Compare a Mixer's masks with objects: digits on photos, whose true masks are known.

    python benchmarks/mixer_truth.py make data/digits48
    samix pretrain method=simclr mixup=samix data=folder data.root=data/digits48 out=runs/digits48
    python benchmarks/mixer_truth.py measure data/digits48 runs/digits48 --picture masks.png

`measure` mixes pairs of validation images without augmentation, by ratios from Beta(2, 2) and by
0.5. A mask is the share of the partner in each pixel. The object contrast is its mean inside the
partner's object minus its mean inside the image's own: 0 for plain mixup, 1 for a mask that keeps
both objects complete. Pixels of both objects are ignored; a pair is skipped if an object has no
other pixels. ± is the standard error over pairs.

Reference masks follow below the Mixers. The perfect one gives each object its own pixels, and is
plain mixup elsewhere. The coarse one does the same for squares of 4 px, the positions of a Mixer in
the third stage of a ResNet with the small stem, and is up-sampled as a Mixer's masks. Smooth noise
and FMix's regions are independent of the images.

Legend: K pairs, R sets of ratios, S image side in px.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import truth_scenes
from common import Options, exit_on_error, print_header, print_table, progress
from torch import Tensor

from ssl_samix.artifacts.mixer import TrainedMixer, load_mixer
from ssl_samix.data.views import normalize
from ssl_samix.errors import ConfigError, check_range
from ssl_samix.mixup.plan import draw_plan, flat, share
from ssl_samix.mixup.policies import FMix
from ssl_samix.mixup.samix_objective import spread
from ssl_samix.pictures import colours, greys, paint, write_png
from ssl_samix.types import MixPlan

FEWEST = 10  # images of a split: one per class
RATIOS = ("Beta(2, 2)", "0.5")
CHUNK = 200  # pairs at a time
POSITION = 4  # px
NOISE = 0.25  # standard deviation of the smooth noise, before it is cut to 0..1
SHOWN_LAMS = (0.3, 0.5, 0.7)  # of the picture


@dataclass(frozen=True)
class Pairs:
    """K pairs of images with their objects."""

    own: Tensor  # (K, 3, S, S) uint8
    other: Tensor  # (K, 3, S, S) uint8, the partners
    own_object: Tensor  # (K, S, S) share of the object in each pixel
    other_object: Tensor  # (K, S, S)

    def regions(self) -> tuple[Tensor, Tensor]:
        """Return pixels of the image's own object only, of the partner's only, (K, S, S) bool."""
        own, other = self.own_object >= 0.5, self.other_object >= 0.5
        return own & ~other, other & ~own


@dataclass(frozen=True)
class Seen:
    """Measurements of masks, for each of K pairs by one set of ratios."""

    lam: Tensor  # (K,) the requested ratio
    left: Tensor  # (K,) share that the mask gives the image
    spread: Tensor  # (K,) spatial standard deviation of the mask
    in_other: Tensor  # (K,) mean of the mask inside the partner's object
    in_own: Tensor  # (K,) mean inside the image's own object
    counted: Tensor  # (K,) bool, whether both objects have pixels of their own

    def contrast(self) -> Tensor:
        """Return the object contrast of each pair that counts."""
        return (self.in_other - self.in_own)[self.counted]


Masks = Callable[[Pairs, Tensor], Tensor]  # pairs, ratios (R, K) -> masks (R, K, 1, S, S)


def slope(seen: Seen) -> str:
    """Return the slope of the masks' share on the ratio as text; empty for a single ratio."""
    off = seen.lam - seen.lam.mean()
    if not off.abs().max() > 1e-6:
        return "-"
    return f"{float((off * seen.left).sum() / off.square().sum()):.3f}"


def with_error(values: Tensor) -> str:
    """Return a mean and its standard error as text."""
    if not len(values):
        return "-"
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{float(values.mean()):.4f} ± {error:.4f}"


def mean_inside(values: Tensor, counted: Tensor) -> str:
    """Return the mean over the pairs that count as text."""
    return f"{float(values[counted].mean()):.3f}" if counted.any() else "-"


# Add an entry for another number of the same masks.
NUMBERS: Mapping[str, Callable[[Seen], str]] = {
    "slope": slope,
    "mask_std": lambda seen: f"{float(seen.spread.mean()):.3f}",
    "mask_mean_error": lambda seen: f"{float((seen.left - seen.lam).abs().mean()):.3f}",
    "object contrast": lambda seen: with_error(seen.contrast()),
    "in partner's object": lambda seen: mean_inside(seen.in_other, seen.counted),
    "in own object": lambda seen: mean_inside(seen.in_own, seen.counted),
    "pairs": lambda seen: str(int(seen.counted.sum())),
    "skipped": lambda seen: str(int((~seen.counted).sum())),
}


def observe(pairs: Pairs, lam: Tensor, masks: Tensor) -> Seen:
    """Return the measurements of the masks of one set of ratios.

    Args:
        pairs: K pairs.
        lam: (K,).
        masks: (K, 1, S, S), the share of the partner.
    """
    own, other = pairs.regions()
    # In single precision the means of a flat mask over two regions differ in the seventh digit.
    precise = masks.double()

    def inside(region: Tensor) -> Tensor:
        count = region.sum(dim=(1, 2))
        return (precise[:, 0] * region).sum(dim=(1, 2)) / count.clamp(min=1)

    return Seen(
        lam=lam.double(),
        left=share(precise),
        spread=spread(precise),
        in_other=inside(other),
        in_own=inside(own),
        counted=own.any(dim=2).any(dim=1) & other.any(dim=2).any(dim=1),
    )


def plain(pairs: Pairs, lam: Tensor) -> Tensor:
    """Return the masks of plain mixup."""
    return torch.stack([flat(each, pairs.own.shape[-1]) for each in lam])


def perfect(pairs: Pairs, lam: Tensor) -> Tensor:
    """Return masks that give each object its own pixels and are flat elsewhere."""
    own, other = (region[:, None].float() for region in pairs.regions())
    free = 1 - own - other
    return other + free * plain(pairs, lam)


def coarse(pairs: Pairs, lam: Tensor) -> Tensor:
    """Return masks that give each position to the object that covers more of it."""
    own, other = (F.avg_pool2d(region[:, None].float(), POSITION) for region in pairs.regions())
    side = pairs.own.shape[-1]
    sets = []
    for each in lam:
        undecided = flat(each, own.shape[-1])
        cells = torch.where(other > own, 1.0, torch.where(own > other, 0.0, undecided))
        sets.append(F.interpolate(cells, size=(side, side), mode="bilinear"))
    return torch.stack(sets)


def smooth_noise(pairs: Pairs, lam: Tensor) -> Tensor:
    """Return masks of smooth noise around the ratio."""
    noise = FMix().noise(len(pairs.own), pairs.own.shape[-1], lam.device)
    noise = noise / noise.std(dim=(1, 2), keepdim=True)
    return (plain(pairs, lam) + NOISE * noise[:, None]).clamp(0, 1)


def regions_of_fmix(pairs: Pairs, lam: Tensor) -> Tensor:
    """Return FMix's masks."""
    every = torch.arange(len(pairs.own), device=lam.device)
    policy = FMix()
    return torch.stack([policy.mask(pairs.other, MixPlan(r, every, every), None) for r in lam])


REFERENCES: Mapping[str, Masks] = {
    "plain mixup": plain,
    "perfect": perfect,
    "coarse": coarse,
    "smooth noise": smooth_noise,
    "FMix": regions_of_fmix,
}


def learned(mixer: TrainedMixer, pairs: Pairs, lam: Tensor) -> Tensor:
    """Return the masks of a trained Mixer."""
    mean, std = (lam.new_tensor(values) for values in (mixer.mean, mixer.std))
    own, other = (normalize(images, mean, std) for images in (pairs.own, pairs.other))
    every = torch.arange(len(own), device=lam.device)
    with torch.no_grad():
        maps = mixer.maps(own), mixer.maps(other)
        plans = [MixPlan(each, every, every) for each in lam]
        return torch.stack([mixer.policy(own, other, plan, maps).mask for plan in plans])


class Validation:
    """The validation images of a set, and the pairs to mix.

    Args:
        root: Folder of the data set.
        pairs: K, the number of pairs: every image is drawn once before one is drawn again.
        device: Device that computes the masks.

    Raises:
        DataError: If there is no such set.
    """

    def __init__(self, root: Path, pairs: int, device: str) -> None:
        self.root, self.device = root, device
        self.sets: dict[int | None, tuple[Tensor, Tensor]] = {}  # by requested size
        total = len(self.images(None)[0])
        torch.manual_seed(0)
        plans = [draw_plan(total, 2.0, torch.device("cpu")) for _ in range(-(-pairs // total))]
        self.rows = torch.cat([plan.rows for plan in plans])[:pairs]
        self.partners = torch.cat([plan.partner for plan in plans])[:pairs]
        drawn = torch.cat([plan.lam for plan in plans])[:pairs]
        self.lam = torch.stack([drawn, torch.full_like(drawn, 0.5)])  # (R, K), as RATIOS

    def images(self, size: int | None) -> tuple[Tensor, Tensor]:
        """Return images and objects, of the requested size or their own."""
        if size not in self.sets:
            self.sets[size] = truth_scenes.read_val(self.root, size)
        return self.sets[size]

    def pairs(self, first: int, last: int, size: int | None) -> Pairs:
        """Return the pairs from ``first`` to before ``last``."""
        images, objects = self.images(size)
        rows, partners = self.rows[first:last], self.partners[first:last]
        parts = (images[rows], images[partners], objects[rows], objects[partners])
        return Pairs(*(part.to(self.device) for part in parts))

    def measure(self, masks: Masks, size: int | None) -> list[Seen]:
        """Return the measurements of masks, for each set of ratios."""
        found: list[list[Seen]] = [[] for _ in RATIOS]
        torch.manual_seed(0)
        for first in range(0, len(self.rows), CHUNK):
            pairs = self.pairs(first, first + CHUNK, size)
            lam = self.lam[:, first : first + CHUNK].to(self.device)
            for parts, ratios, made in zip(found, lam, masks(pairs, lam), strict=True):
                parts.append(observe(pairs, ratios, made))
        return [_joined(parts) for parts in found]


def _joined(parts: Sequence[Seen]) -> Seen:
    names = [field.name for field in fields(Seen)]
    return Seen(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def paint_masks(
    validation: Validation, mixers: Mapping[str, TrainedMixer], rows: int, path: Path
) -> None:
    """Write a picture of each Mixer's masks of the first pairs, with the true objects.

    Raises:
        UserError: If the picture cannot be written.
    """
    header = ["image", "partner", "objects"]
    header += [f"lam {lam:g}\n{what}" for lam in SHOWN_LAMS for what in ("mask", "mixture")]
    painted, captions = [], []
    for name, mixer in mixers.items():
        pairs = validation.pairs(0, rows, mixer.image_size)
        own, other = (images.cpu() for images in (pairs.own, pairs.other))
        ratios = torch.tensor(SHOWN_LAMS, device=validation.device)
        lam = ratios[:, None].expand(-1, len(own))
        true = 0.5 + (pairs.other_object - pairs.own_object) / 2
        columns = [own, other, greys(true[:, None])]
        for masks in learned(mixer, pairs, lam).cpu():
            mixed = torch.lerp(own.float() / 255, other.float() / 255, masks.float())
            columns += [greys(masks), colours(mixed, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))]
        painted += list(zip(*columns, strict=True))
        captions += ["/".join(Path(name).parts[-2:])] * len(own)
    write_png(path, paint(header, painted, captions if len(mixers) > 1 else ()))


def make(args: argparse.Namespace) -> None:
    """Write the data set.

    Raises:
        UserError: For a number out of range, or a folder that cannot be filled.
    """
    for name, low in (("train", FEWEST), ("val", FEWEST), ("seed", 0)):
        check_range(f"--{name}", getattr(args, name), low)
    check_range("--size", args.size, truth_scenes.SMALLEST, 512)
    if args.size % POSITION:
        raise ConfigError(f"--size must be a multiple of {POSITION}, got {args.size}")
    root = Path(args.root).resolve()
    truth_scenes.write(root, {"train": args.train, "val": args.val}, args.size, args.seed)
    print(f"{root}: {args.train} training and {args.val} validation images of {args.size} px")
    print(f"{truth_scenes.masks_folder(root)}: their objects")


def measure(args: argparse.Namespace) -> None:
    """Print the table, and write the picture.

    Raises:
        UserError: For a missing set or Mixer, or a number out of range.
    """
    check_range("--pairs", args.pairs, 2)
    check_range("--rows", args.rows, 1, 64)
    picture = None if args.picture is None else Path(args.picture)
    if picture is not None and picture.suffix.lower() != ".png":
        raise ConfigError(
            f"--picture {picture}: the picture is a PNG: give a name that ends in .png"
        )
    if len(set(args.runs)) < len(args.runs):
        raise ConfigError("a run is given twice: give each once")
    mixers = {name: load_mixer(name).to(args.device) for name in args.runs}
    validation = Validation(Path(args.root).resolve(), args.pairs, args.device)
    print_header("Masks and true objects", args)

    def rows() -> Iterator[list[str]]:
        sides: list[tuple[str, Masks, int | None]] = [
            (name, partial(learned, mixer), mixer.image_size) for name, mixer in mixers.items()
        ]
        sides += [(name, masks, None) for name, masks in REFERENCES.items()]
        for name, masks, size in sides:
            progress(f"{name} ...")
            for ratios, seen in zip(RATIOS, validation.measure(masks, size), strict=True):
                yield [name, ratios, *(number(seen) for number in NUMBERS.values())]

    print_table(("masks", "ratios", *NUMBERS), rows())
    if picture is not None:
        paint_masks(validation, mixers, args.rows, picture)


COMMANDS = {"make": make, "measure": measure}


def options() -> Options:
    """Return the options of both commands."""
    parser = Options(__doc__, cpu={}, cuda={}, about={})
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=argparse.ArgumentParser
    )
    making = commands.add_parser("make", help="write the data set")
    making.add_argument("root", help="folder for it; the objects go into <root>-masks")
    _add_numbers(
        making,
        ("train", 8000, "training images"),
        ("val", 2000, "validation images"),
        ("size", 48, "side in px"),
        ("seed", 0, "of every draw"),
    )
    measuring = commands.add_parser("measure", help="compare a Mixer's masks with the true objects")
    measuring.add_argument("root", help="the data set")
    measuring.add_argument("runs", nargs="+", help="run folders, or files with a Mixer")
    measuring.add_argument("--picture", help="PNG of masks and mixtures")
    _add_numbers(
        measuring,
        ("pairs", 4000, "pairs that are mixed"),
        ("rows", 8, "pairs of the picture, per Mixer"),
    )
    return parser


def _add_numbers(parser: argparse.ArgumentParser, *options: tuple[str, int, str]) -> None:
    for name, default, about in options:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about}; {default}")


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    """Make the data set, or measure Mixers on it."""
    args = options().read(arguments)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main(sys.argv[1:])
