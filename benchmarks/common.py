"""Code of all benchmarks: options, timing, headers and tables."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_samix.errors import UserError

METHODS = ("moco", "simclr", "byol")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as lightly's default
MIB = 2**20
HIDDEN = ("device", "threads")  # options that the header shows in another form


class Options(argparse.ArgumentParser):
    """Options of a benchmark: device, threads, and options with a default per device.

    Args:
        description: Description of the benchmark; its first line is shown.
        cpu: Option -> default on a CPU; the benchmark takes minutes on two cores.
        cuda: Option -> default on a GPU, likewise.
        about: Option -> its help text.
    """

    def __init__(
        self,
        description: str | None,
        cpu: Mapping[str, int],
        cuda: Mapping[str, int],
        about: Mapping[str, str],
    ) -> None:
        super().__init__(description=(description or "").splitlines()[0])
        self.defaults = {"cpu": cpu, "cuda": cuda}
        self.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        self.add_argument("--threads", type=int, help="torch's; 1 on a CPU")
        for name, text in about.items():
            values = f"{text}; {cpu[name]} on a CPU, {cuda[name]} on a GPU"
            self.add_argument(f"--{name}", type=int, help=values)

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Return the options with the device's defaults; set the threads; exit if invalid."""
        args = self.parse_args(arguments)
        for name, value in self.defaults[args.device].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
            if getattr(args, name) < 1:
                self.error(f"--{name} is at least 1")
        if args.device == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda: torch finds no CUDA device")
        if args.threads is not None and args.threads < 1:
            self.error("--threads is at least 1")
        if args.threads or args.device == "cpu":
            torch.set_num_threads(args.threads or 1)
        torch.manual_seed(0)
        return args

    def names(self, option: str, given: str, known: Iterable[str]) -> list[str]:
        """Return a comma-separated list; exit if it has unknown names."""
        known, names = list(known), given.split(",")
        for name in names:
            if name not in known:
                self.error(f"--{option}: {name!r} is not one of {', '.join(known)}")
        return names


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Decorate ``main``: a ``UserError`` is printed in one sentence, with exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def seconds(work: Callable[[], object], device: str, *, wall: bool = False) -> float:
    """Return the seconds that ``work`` takes.

    One thread of a CPU is timed in CPU seconds of the process, which depend less on other work on
    the machine; a GPU, several threads, and several processes, in wall-clock seconds.
    """
    clock = time.perf_counter
    if device == "cpu" and not wall and torch.get_num_threads() == 1:
        clock = time.process_time
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def smooth_images(count: int, size: int) -> Tensor:
    """Return random uint8 (count, 3, size, size) images, smooth with some noise on top."""
    coarse = torch.rand(count, 3, 4, 4)
    smooth = F.interpolate(coarse, size=size, mode="bicubic")
    noise = 0.05 * torch.randn(count, 3, size, size)
    return (255 * (smooth + noise).clamp(0, 1)).to(torch.uint8)


def warm_cublas(device: str) -> None:
    """Make cuBLAS allocate its permanent workspace, so that it is not counted for a side."""
    if device == "cuda":
        for kind in (torch.float32, torch.bfloat16):
            square = torch.ones(64, 64, device=device, dtype=kind)
            (square @ square).sum().item()


def progress(text: str) -> None:
    """Print progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_header(what: str, args: argparse.Namespace, **facts: object) -> None:
    """Print a header: benchmark, machine, date and settings."""
    print(f"## {what}\n")
    print(f"torch {torch.__version__} on {args.device} ({device_name(args.device)}), ", end="")
    print(f"threads {torch.get_num_threads()}, {datetime.date.today()}")
    given = {name: shown(value) for name, value in vars(args).items() if name not in HIDDEN}
    given |= {name: str(value) for name, value in facts.items()}
    print(", ".join(f"{name} {value}" for name, value in given.items() if value) + "\n", flush=True)


def shown(value: object) -> str:
    """Return the value of an option as text."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None or isinstance(value, bool) else str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, each row as soon as it is known."""
    for row in itertools.chain((columns, ["---"] * len(columns)), rows):
        assert len(row) == len(columns)
        print(f"| {' | '.join(row)} |", flush=True)


def device_name(device: str) -> str:
    """Return the name of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
