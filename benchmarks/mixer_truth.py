"""Do a Mixer's masks know the objects? Digits on photos, whose true masks are known.

python benchmarks/mixer_truth.py make data/digits48
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import truth_scenes
from common import Options, refusing

from ssl_samix.errors import check_range

FEWEST = 10  # images of a split: one per class


def make(args: argparse.Namespace) -> None:
    """Write the data set.

    Raises:
        UserError: For a number out of range, or a folder that cannot be filled.
    """
    for name, low in (("train", FEWEST), ("val", FEWEST), ("seed", 0)):
        check_range(f"--{name}", getattr(args, name), low)
    check_range("--size", args.size, truth_scenes.SMALLEST, 512)
    root = Path(args.root)
    truth_scenes.write(root, {"train": args.train, "val": args.val}, args.size, args.seed)
    print(f"{root}: {args.train} training and {args.val} validation images of {args.size} px")
    print(f"{truth_scenes.masks_folder(root)}: their objects")


@refusing()
def main(arguments: Sequence[str] | None = None) -> None:
    """Make the data set."""
    parser = Options(__doc__, cpu={}, cuda={}, about={})
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=argparse.ArgumentParser
    )
    making = commands.add_parser("make", help="write the data set")
    making.add_argument("root", help="folder for it; the objects go into <root>-masks")
    for name, default, about in (
        ("train", 8000, "training images"),
        ("val", 2000, "validation images"),
        ("size", 48, "side in px"),
        ("seed", 0, "of every draw"),
    ):
        making.add_argument(f"--{name}", type=int, default=default, help=f"{about}; {default}")
    making.set_defaults(work=make)
    args = parser.read(arguments)
    args.work(args)


if __name__ == "__main__":
    main(sys.argv[1:])
