"""One training step: lightly's PyTorch examples as shipped against ours, the same network.

A step is forward, loss, backward, optimizer, moving average and queue, of ResNet-18 with the stem
for small images. lightly's side has float32, the default memory layout and plain SGD; ours has the
precision, layout and optimizer that a run of `samix pretrain` would choose. The two take turns in
one process and every round gives a ratio, so that a busy machine slows both alike. Left out are
what Lightning's loop adds around our step and what a plain loop adds around lightly's.

    python benchmarks/step_time.py [--device cuda] [--rounds 20]

`wait %` and `views %` are shares of our load + views + step: waiting for the loader and for the
copy to the device, and drawing and computing the views on the device, in this same process.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightning_fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from pytorch_lightning.plugins import MixedPrecision, Precision
from torch import Tensor, nn

from ssl_samix.backbones.resnet import ResNetTrunk
from ssl_samix.config import build, compose
from ssl_samix.data.datamodule import DataModule
from ssl_samix.data.datasets import Splits
from ssl_samix.data.images import MemoryImages
from ssl_samix.engine import choose_precision, memory_format, quieten
from ssl_samix.types import Batch

TARGET = 2.2  # lightly's time over ours
IMAGES = 50_000  # as many as CIFAR-10 has: a small set would sit in the processor's caches
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as lightly's default
# The sizes of lightly's examples; a projector's hidden width is the features', as is our default.
SIZES = {
    "moco": ["method.hidden_dim=null", "method.output_dim=128", "method.queue_size=4096"],
    "simclr": ["method.hidden_dim=null", "method.output_dim=128"],
    "byol": ["method.hidden_dim=1024", "method.output_dim=256"],
}
COLUMNS = (
    "method", "lightly ms", "ours ms", "lightly images/s", "ours images/s", "target", "measured",
    "met", "wait %", "views %", "lightly peak MiB", "ours peak MiB",
)  # fmt: skip


def plain_resnet(width: int) -> nn.Module:
    """Return torchvision's ResNet-18 with the small stem; only narrower ones need our trunk."""
    if width != 64:
        return ResNetTrunk("resnet18", width, small_stem=True)
    resnet = torchvision.models.resnet18()
    resnet.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    resnet.maxpool = nn.Identity()
    resnet.fc = nn.Identity()
    return resnet


class LightlySide:
    """A method as lightly's example trains it.

    Args:
        name: Of the method.
        args: The command line.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        features = 8 * args.width
        heads: dict[str, Callable[[], nn.Module]] = {
            "moco": lambda: MoCoProjectionHead(features, features, 128),
            "simclr": lambda: SimCLRProjectionHead(features, features, 128),
            "byol": lambda: BYOLProjectionHead(features, 1024, 256),
        }
        online = nn.Sequential(plain_resnet(args.width), heads[name]())
        self.model = nn.ModuleDict({"online": online})
        if name != "simclr":
            self.model["twin"] = copy.deepcopy(online)
            deactivate_requires_grad(self.model["twin"])
        if name == "byol":
            self.model["predictor"] = BYOLPredictionHead(256, 1024, 256)
        self.model.to(args.device)
        # The examples leave the criterion where it was made, so a memory bank stays on the CPU.
        self.criterion: nn.Module = {
            "moco": lambda: NTXentLoss(memory_bank_size=(4096, 128)),
            "simclr": NTXentLoss,
            "byol": NegativeCosineSimilarity,
        }[name]()
        self.loss = {"moco": self._moco, "simclr": self._simclr, "byol": self._byol}[name]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.06)

    def step(self, views: tuple[Tensor, ...]) -> None:
        """Train on one batch; the twin moves first, as in the examples."""
        if "twin" in self.model:
            for online, twin in zip(self.model["online"], self.model["twin"], strict=True):
                update_momentum(online, twin, m=0.996)
        self.loss(*views).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _moco(self, first: Tensor, second: Tensor) -> Tensor:
        return self.criterion(self.model["online"](first), self.model["twin"](second))

    def _simclr(self, first: Tensor, second: Tensor) -> Tensor:
        return self.criterion(self.model["online"](first), self.model["online"](second))

    def _byol(self, first: Tensor, second: Tensor) -> Tensor:
        total = torch.zeros((), device=first.device)
        for view, other in ((first, second), (second, first)):
            prediction = self.model["predictor"](self.model["online"](view))
            total = total + self.criterion(prediction, self.model["twin"](other))
        return total / 2


class OurSide:
    """A method as `samix pretrain` trains it, in the order of Lightning's automatic optimization.

    Args:
        config: Of the run.
        data: Whose batch size the learning rate follows.
        args: The command line.
    """

    def __init__(self, config: DictConfig, data: DataModule, args: argparse.Namespace) -> None:
        backbone = build(config.backbone, image_size=args.size)
        self.model = build(config.method, backbone=backbone, optimizer=build(config.optimizer))
        self.model.to(args.device, memory_format=memory_format(self.model))
        # What methods ask of a trainer; a real one would not let the two sides take turns.
        self.model.trainer = SimpleNamespace(
            global_step=0,
            estimated_stepping_batches=1000,
            max_epochs=10,
            accumulate_grad_batches=1,
            datamodule=data,
        )
        optimization = self.model.configure_optimizers()
        self.optimizer = optimization["optimizer"]
        self.schedule = optimization["lr_scheduler"]["scheduler"]
        mixed = args.precision.endswith("-mixed")
        self.precision = MixedPrecision(args.precision, args.device) if mixed else Precision()
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "16-mixed")

    def step(self, views: tuple[Tensor, ...]) -> None:
        """Train on one batch."""
        with self.precision.train_step_context():
            loss = self.model.own_loss(views).mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.after_step()
        self.model.after_batch()
        self.schedule.step()


class Meter:
    """Runs the steps of one side and keeps what each of them took.

    Args:
        make: Makes the side, so that what it allocates is known.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, make: Callable[[], LightlySide | OurSide], device: str) -> None:
        self.device = device
        before = self._allocated()
        self.side = make()
        self.held = self._allocated() - before  # bytes; the other sides' are not this one's peak
        self.seconds: list[float] = []
        self.peaks: list[int] = []  # bytes, without the views

    def run(self, views: tuple[Tensor, ...]) -> None:
        """Make one step."""
        before = self._allocated()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.seconds.append(seconds(lambda: self.side.step(views), self.device))
        if self.device == "cuda":
            self.peaks.append(torch.cuda.max_memory_allocated() - before + self.held)
        self.held += self._allocated() - before

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    @property
    def peak(self) -> str:
        """Peak memory in MiB; a CPU's allocator does not tell whose memory is whose."""
        return f"{max(self.peaks[1:]) / 2**20:.0f}" if self.peaks else "n/a"


class Loading:
    """Our way from images in memory to views on the device, and what each batch took.

    Args:
        config: Of the run.
        splits: The images.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, config: DictConfig, splits: Splits, device: str) -> None:
        self.device = device
        with patch("ssl_samix.data.datamodule.load_splits", return_value=splits):
            self.data: DataModule = build(config.data, views=build(config.views), seed=0)
        self.data.trainer = SimpleNamespace(global_rank=0, world_size=1)
        self.batches = self._endless()
        self.waits: list[float] = []
        self.views: list[float] = []

    def _endless(self) -> Iterator[Any]:
        loader = self.data.train_dataloader()
        while True:
            yield from loader

    def next(self) -> tuple[Tensor, ...]:
        """Return the views of the next batch."""
        results: list[Any] = []

        def wait() -> None:
            results.append(move_data_to_device(next(self.batches), torch.device(self.device)))

        def draw() -> None:
            results.append(self.data.on_after_batch_transfer(results[0], 0))

        self.waits.append(seconds(wait, self.device))
        self.views.append(seconds(draw, self.device))
        batch: Batch = results[1]
        return batch.views


class Contest:
    """lightly's side of a method and ours, one or two of them, on the same views.

    Args:
        name: Of the method.
        splits: The images.
        args: The command line.
    """

    def __init__(self, name: str, splits: Splits, args: argparse.Namespace) -> None:
        self.batch = args.batch
        words = [
            f"method={name}", *SIZES[name], "data=cifar10", f"data.batch_size={args.batch}",
            "backbone=resnet18", "backbone.stem=small", f"backbone.width={args.width}",
        ]  # fmt: skip
        configs = {name: compose("pretrain", words)[0]}
        if name == "moco":  # with one group it computes what lightly's computes
            groups = {c.method.bn_groups: c for c in configs.values()}
            groups[1] = compose("pretrain", [*words, "method.bn_groups=1"])[0]
            configs = {f"moco, bn_groups={n}": groups[n] for n in sorted(groups)}
        self.loading = Loading(next(iter(configs.values())), splits, args.device)
        self.lightly = Meter(lambda: LightlySide(name, args), args.device)
        self.ours = {
            label: Meter(lambda c=config: OurSide(c, self.loading.data, args), args.device)
            for label, config in configs.items()
        }
        for meter in self.ours.values():
            assert parameters(meter.side.model) == parameters(self.lightly.side.model), (
                "not the same network"
            )

    def round(self) -> None:
        """Let every side make one step."""
        views = self.loading.next()
        self.lightly.run(tuple(view.contiguous() for view in views))
        for meter in self.ours.values():
            meter.run(views)

    def rows(self) -> Iterator[list[str]]:
        """Yield a row of the table per side of ours; the first round was the warm-up."""
        waits, draws = self.loading.waits[1:], self.loading.views[1:]
        theirs = self.lightly.seconds[1:]
        for label, meter in self.ours.items():
            ours = meter.seconds[1:]
            ratio = median(t / o for t, o in zip(theirs, ours, strict=True))
            whole = [w + d + o for w, d, o in zip(waits, draws, ours, strict=True)]
            slow, fast = median(theirs), median(ours)
            yield [
                label,
                f"{1e3 * slow:.1f}",
                f"{1e3 * fast:.1f}",
                f"{self.batch / slow:.0f}",
                f"{self.batch / fast:.0f}",
                f"{TARGET}",
                f"{ratio:.2f}",
                "yes" if ratio >= TARGET else "no",
                f"{100 * median(w / a for w, a in zip(waits, whole, strict=True)):.2f}",
                f"{100 * median(d / a for d, a in zip(draws, whole, strict=True)):.2f}",
                self.lightly.peak,
                meter.peak,
            ]


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def random_splits(image_size: int, batch: int) -> Splits:
    count = max(IMAGES, batch)
    pixels = torch.randint(256, (count, 3, image_size, image_size), dtype=torch.uint8)
    images = MemoryImages(pixels, torch.full((count,), -1), [""] * count)
    return Splits(
        train=images, bank=None, val=None, classes=(), mean=MEAN, std=STD, image_size=image_size
    )


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--size", type=int, default=32, help="side of the views in px")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count, after a warm-up")
    parser.add_argument("--threads", type=int, help="torch's, on both sides")
    parser.add_argument(
        "--precision",
        choices=("auto", "32-true", "bf16-mixed"),
        default="auto",
        help="ours; lightly's is float32",
    )
    parser.add_argument("--methods", default=",".join(SIZES), help="which, with commas between")
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    unknown = [name for name in args.methods if name not in SIZES]
    if unknown:
        parser.error(f"--methods: {unknown[0]!r} is not one of {', '.join(SIZES)}")
    if min(args.batch, args.rounds, args.width) < 1 or args.batch < 2:
        parser.error("--rounds and --width are at least 1, --batch at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return args


def print_header(args: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__} on {args.device} ({device_name(args.device)})")
    print(
        f"threads {threads}, precision {args.precision} (lightly 32-true), {datetime.date.today()}"
    )
    print(f"ResNet-18 of width {args.width}, {args.size} px, batch {args.batch}, ", end="")
    print(f"medians of {args.rounds} rounds\n")


def main() -> None:
    args = parsed()
    quieten()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.precision == "auto":
        args.precision = choose_precision(args.device)
    torch.manual_seed(0)
    if args.device == "cuda":
        # cuBLAS keeps a workspace from its first use on: it is no side's memory.
        nn.Linear(64, 64, device="cuda")(torch.ones(64, 64, device="cuda")).sum().backward()
    print_header(args)
    splits = random_splits(args.size, args.batch)
    contests = [Contest(name, splits, args) for name in args.methods]
    for number in range(args.rounds + 1):
        print(f"round {number} of {args.rounds}", file=sys.stderr)  # round 0 warms up
        for contest in contests:
            contest.round()
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(r for c in contests for r in c.rows())]
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
