"""Microseconds per view: lightly's PIL transforms against our batched views, one CPU thread.

Both sides make the same views of the same images; below 64 px neither blurs. The two take turns
in one process, and the median round counts, so that a busy machine slows both alike.

    python benchmarks/views.py [--device cuda] [--batch 256] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightly.transforms import BYOLTransform, MoCoV2Transform, SimCLRTransform
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from omegaconf import OmegaConf
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ssl_samix.data.views import BatchedViews, Views

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "views"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as lightly's default
PIL_IMAGES = 32  # per round: one at a time, so more would only take longer


def lightly_transform(method: str, size: int) -> Callable[..., object]:
    blur = {} if size >= 64 else {"gaussian_blur": 0.0}
    if method == "moco":
        return MoCoV2Transform(input_size=size, **blur)
    if method == "simclr":
        return SimCLRTransform(input_size=size, **blur)
    return BYOLTransform(
        BYOLView1Transform(input_size=size, **blur), BYOLView2Transform(input_size=size, **blur)
    )


def our_transform(method: str, size: int, device: str) -> BatchedViews:
    config = OmegaConf.load(CONFIGS / f"{method}.yaml")
    specs = Views(config.a, config.b).specs(size, flip=True)
    return BatchedViews(specs, size, MEAN, STD).to(device)


def smooth_images(count: int, size: int) -> Tensor:
    """Return random uint8 (count, 3, size, size) images, smooth with some noise on top."""
    coarse = torch.rand(count, 3, 4, 4)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    noise = 0.05 * torch.randn(count, 3, size, size)
    return (255 * (smooth + noise).clamp(0, 1)).to(torch.uint8)


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(method: str, size: int, args: argparse.Namespace) -> tuple[float, float]:
    """Return microseconds per view of lightly's transform and of ours."""
    images = smooth_images(args.batch, size)
    pictures = [to_pil_image(image) for image in images[:PIL_IMAGES]]
    pixels = images.to(args.device)
    theirs, ours = lightly_transform(method, size), our_transform(method, size, args.device)
    rounds: list[tuple[float, float]] = []
    for _ in range(args.rounds + 1):  # the first one warms up
        slow = seconds(lambda: [theirs(picture) for picture in pictures], "cpu")
        fast = seconds(lambda: ours(pixels), args.device)
        rounds.append((slow / len(pictures) / 2 * 1e6, fast / args.batch / 2 * 1e6))
    slow_rounds, fast_rounds = zip(*rounds[1:], strict=True)
    return statistics.median(slow_rounds), statistics.median(fast_rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=256, help="images per batch of ours")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Freeing a large block once lets malloc keep large blocks, as after a first training step.
    torch.empty(30 * 2**20, dtype=torch.uint8).zero_()
    print(f"us per view, batch {args.batch}; lightly: one CPU core; ours: {args.device}, 1 thread")
    print(f"{'method':8s}{'px':>5s}{'lightly':>10s}{'ours':>10s}{'ratio':>8s}")
    for method in ("moco", "simclr", "byol"):
        for size in (32, 64, 96):
            slow, fast = measure(method, size, args)
            print(f"{method:8s}{size:5d}{slow:10.0f}{fast:10.1f}{slow / fast:7.1f}x")


if __name__ == "__main__":
    main()
