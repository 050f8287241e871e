"""Time and memory of the Mixer, by channels and positions, and by form of attention.

    python benchmarks/mixer.py [--device cuda] [--channels 256,1024] [--sides 8,14]

A pass is forward and backward of a `MixBlock` on maps of some images. Its attention is the explicit
matrix of all positions, our `attend` (the same in chunks of queries from 28 x 28 positions on), or
torch's `scaled_dot_product_attention`, on a GPU with the value padded to 8 channels, the minimum of
its fused kernels. The three alternate, and the median round counts. Memory is that of a pass
without its maps and the network: of CUDA's allocator, or the growth of the resident size (Linux
only). The last table compares the Mixer's forward pass for one mixture with the backbone's for one
image.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import MIB, Options, print_header, print_table, progress, seconds, warm_cublas
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_samix.mixup import mixer
from ssl_samix.mixup.mixer import MixBlock
from ssl_samix.models.backbone import Backbone
from ssl_samix.trainer import PRECISIONS, choose_precision

CHANNELS = ("64", "128", "256", "512", "1024")
SIDES = ("4", "8", "14", "28", "56")
SCALE = 8  # pixels per position of the up-sampled mask, as for a small stem's third stage
PADDED = 8  # channels
NETWORKS = (("resnet18", 32), ("resnet18", 224), ("resnet50", 32), ("resnet50", 224))
KINDS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention by the whole matrix at once."""
    with patch.object(mixer, "MOST_POSITIONS", query.shape[2]):
        return chunked(query, key, value)


chunked = mixer.attend


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention by torch's function, (K, N) as ``attend``."""
    q, k, v = (part.transpose(1, 2).unsqueeze(1) for part in (query, key, value))  # (K, 1, N, d)
    if v.is_cuda:
        v = F.pad(v, (0, PADDED - v.shape[-1]))
    return F.scaled_dot_product_attention(q, k, v)[:, 0, :, 0].float()


ATTENTIONS: dict[str, Attention] = {"explicit": explicit, "chunked": chunked, "fused": fused}
TIMES, MEMORY = ([f"{name} {unit}" for name in ATTENTIONS] for unit in ("ms", "MiB"))
COLUMNS = ("channels", "positions", *TIMES, "fastest", *MEMORY)


class Passes:
    """Runs passes of one Mixer on maps of one shape.

    Args:
        channels: C of the maps.
        side: Positions along one side.
        args: The options.
    """

    def __init__(self, channels: int, side: int, args: argparse.Namespace) -> None:
        self.device, self.size = args.device, SCALE * side
        self.block = MixBlock(channels).to(args.device)
        shape = (args.batch, channels, side, side)
        kind = KINDS.get(args.precision, torch.float32)
        self.maps = [torch.randn(shape, device=args.device, dtype=kind) for _ in range(2)]
        self.lam = torch.rand(args.batch, device=args.device)
        self.mixed = args.precision in KINDS

    def run(self, attention: Attention) -> None:
        """Run a pass."""
        kind = KINDS["bf16-mixed"] if not self.mixed else self.maps[0].dtype
        with (
            patch.object(mixer, "attend", attention),
            torch.autocast(self.device, kind, enabled=self.mixed),
        ):
            mask = self.block(*self.maps, self.lam, self.size)
        mask.float().mean().backward()
        self.block.zero_grad()

    def memory(self, attention: Attention) -> float:
        """Return the MiB of a pass; NaN if unknown."""
        with peak_of(self.device) as found:
            self.run(attention)
        return found[0]


@contextlib.contextmanager
def peak_of(device: str) -> Iterator[list[float]]:
    """Measure the peak growth of memory in MiB; yields a list that is filled at the end."""
    found: list[float] = []
    before = start_peak(device)
    yield found
    found.append(peak(device) - before)


def start_peak(device: str) -> float:
    """Reset the peak; return the memory in use."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # count memory freed before when it is reused
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> float:
    """Return the peak memory since ``start_peak``."""
    return torch.cuda.max_memory_allocated() / MIB if device == "cuda" else status("VmHWM")


def status(key: str) -> float:
    """Return a memory size of this process from /proc, in MiB."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(x.split()[1]) / 2**10 for x in lines if x.startswith(key)), float("nan"))


def shares() -> list[list[str]]:
    """Return per network the FLOPs of its forward pass, and of the Mixer on its third stage."""
    rows = []
    for name, size in NETWORKS:
        backbone = Backbone(name, size).eval()
        image = torch.zeros(1, 3, size, size)
        maps = backbone.stage_map(image, 3).detach()
        block = MixBlock(maps.shape[1]).eval()
        own = flops(lambda b=backbone, x=image: b(x))
        mixing = flops(lambda b=block, m=maps, s=size: b(m, m, torch.ones(1), s))
        where = f"{maps.shape[1]} x {maps.shape[2]} x {maps.shape[3]}"
        cells = [f"{own / 2e9:.3f}", f"{mixing / 2e9:.4f}", f"{100 * mixing / own:.1f}"]
        rows.append([name, str(size), where, *cells])
    return rows


@torch.no_grad()
def flops(work: Callable[[], nn.Module | Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def row(channels: int, side: int, args: argparse.Namespace) -> list[str]:
    """Measure one shape of maps."""
    progress(f"{channels} channels, {side} x {side}")
    passes = Passes(channels, side, args)
    memory = []
    for attention in ATTENTIONS.values():  # also the warm-up
        passes.run(attention)
        memory.append(passes.memory(attention))
    rounds = [
        [seconds(lambda a=a: passes.run(a), args.device) for a in ATTENTIONS.values()]
        for _ in range(args.rounds)
    ]
    times = [1e3 * median(column) for column in zip(*rounds, strict=True)]
    best = list(ATTENTIONS)[times.index(min(times))]
    cells = [*(f"{time:.2f}" for time in times), best, *(f"{held:.0f}" for held in memory)]
    return [str(channels), f"{side} x {side}", *cells]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Options(
        __doc__,
        cpu={"batch": 4, "rounds": 3},
        cuda={"batch": 64, "rounds": 10},
        about={"batch": "images", "rounds": "passes that count"},
    )
    parser.add_argument("--channels", default=",".join(CHANNELS), help="comma-separated")
    parser.add_argument("--sides", default=",".join(SIDES), help="of the maps, likewise")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    args = parser.read(arguments)
    args.channels = parser.names("channels", args.channels, CHANNELS)
    args.sides = parser.names("sides", args.sides, SIDES)
    if args.batch < 2:
        parser.error("--batch is at least 2")
    if args.precision == "auto":
        args.precision = choose_precision(args.device)
    warm_cublas(args.device)
    print_header("The Mixer, forward and backward", args)
    shapes = [(int(channels), int(side)) for side in args.sides for channels in args.channels]
    print_table(COLUMNS, (row(*shape, args) for shape in shapes))
    print()
    names = ("backbone", "px", "maps", "GMAC of an image", "GMAC of a mixture's mask", "share %")
    print_table(names, shares())


if __name__ == "__main__":
    main()
