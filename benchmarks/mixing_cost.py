"""What mixing costs: step time and peak memory of each policy and knob, against the plain method.

python benchmarks/mixing_cost.py [--methods moco simclr byol] [--batch 128] [--size 32] [--width 16]

Steps of all settings are interleaved in one process of one thread and timed in process CPU seconds,
so that other work on the machine weighs on all alike; the ratio is the median over the rounds.
Peak memory is the largest resident size of a process of its own, libraries included.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

from ssl_samix.config import build, compose
from ssl_samix.engine import memory_format
from ssl_samix.types import Batch

# setting -> words of the command line, and passes of one view in units of a forward pass (F) that
# MoCo, SimCLR and BYOL need; a stage-3 pass of a ResNet-18 counts 0.7
SETTINGS = {
    "none": (["mixup=none"], (4, 6, 8)),
    "mixup": (["mixup=mixup"], (7, 9, 11)),
    "mixup, replace": (["mixup=mixup", "mixup.placement=replace"], (4, 6, 8)),
    "samix as published": (
        ["mixup=samix", "mixup.features=teacher", "mixup.update_every=1"],
        (9.7, 12.4, 13),
    ),
    "samix, online maps": (["mixup=samix", "mixup.update_every=1"], (9, 11, 13)),
    "samix": (["mixup=samix"], (7.5, 9.5, 11.5)),
    "samix, replace": (["mixup=samix", "mixup.placement=replace"], (5.2, 7.2, 9.2)),
}
METHODS = ("moco", "simclr", "byol")
STEPS = 4  # a period of update_every=4


class Trainee:
    """One method with one setting, stepping on random images."""

    def __init__(self, method: str, words: list[str], options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config, _ = compose("pretrain", [f"method={method}", *words])
        backbone = build(config.backbone, image_size=options.size, width=options.width)
        mixing = build(config.mixup, backbone=backbone) if config.mixup else None
        recipe = build(config.optimizer)
        self.method = build(config.method, backbone=backbone, optimizer=recipe, mixing=mixing)
        self.method.to(memory_format=memory_format(self.method))
        self.optimizer = recipe.build(self.method, options.batch, 1000, 100)["optimizer"]
        views = tuple(torch.randn(options.batch, 3, options.size, options.size) for _ in range(2))
        self.batch = Batch(views, torch.zeros(options.batch), torch.arange(options.batch))
        self.steps = 0

    def step(self) -> None:
        """Make one training step as ``BaseMethod`` does."""
        method = self.method
        with method.memory.step():
            if method.mixing is None:
                loss = method.own_loss(self.batch.views).mean()
            else:
                terms = method.mixing(method, self.batch, self.steps, 1000)
                loss = torch.stack(list(terms.losses.values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        if method.mixing is not None:
            method.mixing.before_step(self.steps)
        self.optimizer.step()
        if method.twin is not None:
            method.twin.update(method.embedder, 0.99)
        method.after_batch()
        self.steps += 1


def seconds(trainee: Trainee) -> float:
    """Return the CPU seconds of a period of steps."""
    start = time.process_time()
    for _ in range(STEPS):
        trainee.step()
    return time.process_time() - start


def peak(method: str, setting: str, arguments: list[str]) -> float:
    """Return the peak memory of a setting in MiB, measured in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--memory-of", method, setting]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_of(method: str, setting: str, options: argparse.Namespace) -> None:
    """Print the largest resident size of this process after two periods of steps, in MiB."""
    trainee = Trainee(method, SETTINGS[setting][0], options)
    for _ in range(2):
        seconds(trainee)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        memory_of(*options.memory_of, options)
        return
    sizes = [f"--{key}={getattr(options, key)}" for key in ("batch", "size", "width")]
    # Before this process grows: another begins with the largest size of the one that starts it.
    every = [(m, s) for m in options.methods for s in SETTINGS] if options.memory else []
    memory = {key: f"{peak(*key, sizes):.0f}" for key in every}
    print("| method | setting | step / plain step | passes / plain passes | peak MiB |")
    print("|---|---|---|---|---|", flush=True)
    for method in options.methods:
        trainees = {name: Trainee(method, words, options) for name, (words, _) in SETTINGS.items()}
        for trainee in trainees.values():
            trainee.step()  # the first one allocates
            trainee.steps = 0
        rounds = [
            {name: seconds(trainee) for name, trainee in trainees.items()}
            for _ in range(options.rounds)
        ]
        column = METHODS.index(method)
        for name, (_, passes) in SETTINGS.items():
            ratio = statistics.median(r[name] / r["none"] for r in rounds)
            expected = passes[column] / SETTINGS["none"][1][column]
            held = memory.get((method, name), "")
            print(f"| {method} | {name} | {ratio:.2f} | {expected:.2f} | {held} |", flush=True)


if __name__ == "__main__":
    main()
