"""Time a training step of ours, with and without mixing, and of lightly's examples.

    python benchmarks/step_time.py [--device cuda] [--policies none,samix] [--backbone resnet50
        --size 224] [--precision auto,32-true] [--set method.bn_groups=1]

A step is forward, loss, backward, optimizer, moving average and queue. Sides alternate in one
process, a period of steps each (the Mixer is trained in every fourth), and every round gives a
ratio, so that other work on the machine slows all sides equally; ratios are medians over the
rounds. FLOPs are counted in the warm-up round; passes are those of `flop_model.py`. Peak memory is
that of the CUDA allocator for this side; on a CPU (`--memory`) the peak resident size of a separate
process, including libraries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from common import (
    METHODS,
    MIB,
    Options,
    exit_on_error,
    print_header,
    print_table,
    progress,
    warm_cublas,
)
from flop_model import POLICIES
from goals import print_goals
from lightly_examples import LightlySide
from meter import Meter, Views, largest_resident, resident
from our_step import OurSide, configuration

from ssl_samix.data.view_spec import SmallViews
from ssl_samix.trainer import PRECISIONS, choose_precision, silence_lightning

COLUMNS = (
    "method", "side", "precision", "ms", "images/s", "lightly / ours", "step / plain",
    "FLOPs / plain", "passes / plain", "peak MiB",
)  # fmt: skip
LIGHTLY = "lightly"


class Comparison:
    """Runs all sides of one method.

    Args:
        method: Name of the method.
        args: The options.
    """

    def __init__(self, method: str, args: argparse.Namespace) -> None:
        self.method, self.args = method, args
        self.meters = {
            key: Meter(lambda k=key: side(method, *k, args), args.device, args.period, args.compile)
            for key in keys(args)
        }

    def round(self, warm: bool) -> None:
        """Run a period of steps of every side on the same views."""
        views = random_views(self.args)
        plain = tuple(view.contiguous() for view in views[:2])
        for (name, _), meter in self.meters.items():
            (meter.run if warm else meter.warm_up)(plain if name == LIGHTLY else views)

    def over(self, key: tuple[str, str], other: tuple[str, str]) -> float | None:
        """Return the time of one side divided by another's; None if one was left out."""
        if key not in self.meters or other not in self.meters:
            return None
        pairs = zip(self.meters[key].seconds, self.meters[other].seconds, strict=True)
        return median(one / two for one, two in pairs)

    def flops_over_plain(self, key: tuple[str, str]) -> float | None:
        """Return the FLOPs of one side divided by those of the plain method."""
        plain = self.meters.get(("none", key[1]))
        return None if plain is None else self.meters[key].flops / plain.flops

    def rows(self, memory: dict[tuple[str, str, str], float]) -> Iterator[list[str]]:
        """Yield a row of the table per side."""
        for (name, precision), meter in self.meters.items():
            key, step = (name, precision), median(meter.seconds)
            is_ours = name != LIGHTLY
            against = self.over((LIGHTLY, "32-true"), key) if name == "none" else None
            plain = POLICIES["none"].passes(self.method)
            peak = memory.get((self.method, *key), meter.peak / MIB)
            yield [
                self.method,
                name if is_ours else "lightly as shipped",
                precision,
                f"{1e3 * step:.1f}",
                f"{self.args.batch / step:.0f}",
                cell(against),
                cell(self.over(key, ("none", precision))) if is_ours else "",
                cell(self.flops_over_plain(key)) if is_ours else "",
                # The model knows passes of large views only.
                cell(self._passes(name) / plain) if is_ours and not self.args.small else "",
                f"{peak:.0f}" if peak else "",
            ]

    def _passes(self, name: str) -> float:
        return POLICIES[name].passes(self.method, mixture_size(self.method, name, self.args))

    def goals(self) -> dict[str, float]:
        """Return the values of the targets, for the first precision."""
        first = self.args.precision[0]
        samix, plain = ("samix", first), ("none", first)
        against, ratio = self.over((LIGHTLY, "32-true"), plain), self.over(samix, plain)
        found = {} if against is None else {f"step {self.method}": against}
        if ratio is not None:
            flops = self.flops_over_plain(samix)
            assert flops is not None
            found |= {f"samix {self.method}": ratio, f"flops {self.method}": ratio / flops}
        return found


def cell(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def keys(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the sides: lightly or a policy, and the precision."""
    ours = [(policy, precision) for precision in args.precision for policy in args.policies]
    return ([(LIGHTLY, "32-true")] if args.lightly else []) + ours


def side(method: str, name: str, precision: str, args: argparse.Namespace) -> LightlySide | OurSide:
    if name == LIGHTLY:
        return LightlySide(method, args.backbone, args.size, args.width, args.device)
    return OurSide(ours(method, name, args), args.size, args.batch, precision, args.device)


def ours(method: str, name: str, args: argparse.Namespace) -> Any:
    """Return the configuration of a policy."""
    words = [*POLICIES[name].words, f"data.image_size={args.size}", *args.set]
    return configuration(method, args.backbone, args.width, words)


def mixture_size(method: str, name: str, args: argparse.Namespace) -> float:
    """Return the side of a policy's mixtures, as a share of the views'."""
    config = ours(method, name, args)
    return round(args.size * config.mixup.size) / args.size if config.mixup else 1.0


def random_views(args: argparse.Namespace) -> Views:
    """Return two random views, and small ones, in the memory layout of ours."""
    shape = (args.batch, 3, args.size, args.size)
    small = (*shape[:2], *(SmallViews().side(args.size),) * 2)
    views = (torch.randn(s, device=args.device) for s in [shape] * 2 + [small] * args.small)
    return tuple(view.to(memory_format=torch.channels_last) for view in views)


def print_resident(method: str, name: str, precision: str, args: argparse.Namespace) -> None:
    """Print the largest resident size of this process after two periods of steps, in MiB."""
    meter = Meter(lambda: side(method, name, precision, args), args.device, args.period)
    for _ in range(2):
        meter.run(random_views(args))
    print(largest_resident())


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Options(
        __doc__,
        cpu={"batch": 32, "size": 32, "width": 16, "rounds": 2, "period": 4},
        cuda={"batch": 256, "size": 32, "width": 64, "rounds": 10, "period": 4},
        about={
            "batch": "images per step",
            "size": "side of the views in px",
            "width": "channels of the first stage",
            "rounds": "rounds that count",
            "period": "steps of a round; SAMix needs 4",
        },
    )
    parser.add_argument("--backbone", choices=("resnet18", "resnet50"), default="resnet18")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--policies", default="none,samix", help="likewise")
    parser.add_argument("--small", type=int, default=0, help="small views per image, of ours")
    parser.add_argument("--precision", default="auto", help="ours, likewise; lightly's is float32")
    parser.add_argument("--compile", choices=("no", "default", "reduce-overhead"), default="no")
    parser.add_argument("--lightly", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--goals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory", action="store_true", help="on a CPU, measure it as well")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of ours")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.read(arguments)
    args.methods = parser.names("methods", args.methods, METHODS)
    args.policies = parser.names("policies", args.policies, POLICIES)
    names = parser.names("precision", args.precision, PRECISIONS)
    full = {"auto": choose_precision(args.device), "32": "32-true"}
    args.precision = list(dict.fromkeys(full.get(name, name) for name in names))
    if args.batch < 8:
        parser.error("--batch is at least 8: MoCo normalises in groups of a fourth of it")
    return args


def rows(
    args: argparse.Namespace, memory: dict[tuple[str, str, str], float], found: dict[str, float]
) -> Iterator[list[str]]:
    """Yield the rows of each method as soon as it is measured; add the values of the targets."""
    for method in args.methods:
        comparison = Comparison(method, args)
        for number in range(args.rounds + 1):
            progress(f"{method}: round {number} of {args.rounds}")  # round 0 warms up
            comparison.round(warm=number > 0)
        found.update(comparison.goals())
        yield from comparison.rows(memory)


@exit_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    silence_lightning()
    warm_cublas(args.device)
    if args.memory_of:
        print_resident(*args.memory_of, args)
        return
    print_header("A training step", args)
    memory = {}
    if args.memory and args.device == "cpu":
        # Before this process grows: a child starts with its parent's peak size.
        words = sys.argv[1:] if arguments is None else arguments
        every = [(method, key) for method in args.methods for key in keys(args)]
        of = ["--memory-of"]
        memory = {(m, *key): resident(__file__, [*words, *of, m, *key]) for m, key in every}
    found: dict[str, float] = {}
    try:  # print now: the next method may fail
        print_table(COLUMNS, rows(args, memory, found))
    finally:
        if args.goals:
            print_goals(found)


if __name__ == "__main__":
    main()
