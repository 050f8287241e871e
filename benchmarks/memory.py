"""Count the memory of a training step, without a GPU.

Every tensor that autograd saves for the backward pass is counted once, in its precision, by tracing
one step on meta tensors; weights, gradients, SGD's momentum and the momentum encoder are added.
Workspaces of the libraries, fragmentation, and views are left out.

    python benchmarks/memory.py [--batch 256] [--checkpointing] [--precision bf16|32]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_samix.config.compose import build, compose
from ssl_samix.training.defaults import resolve_auto
from ssl_samix.types import Batch

NETWORKS = {  # name -> arguments, side of the images in px
    "ResNet-18, 32 px": (["backbone=resnet18", "backbone.stem=small"], 32),
    "ResNet-50, 224 px": (["backbone=resnet50"], 224),
    "ViT-S/16, 224 px": (["backbone=vit_small"], 224),
}
POLICIES = {
    "none": ["mixup=none"],
    "mixup": ["mixup=mixup"],
    "samix": ["mixup=samix", "mixup.update_every=1"],  # a step in which the Mixer is trained
    "samix, replace": ["mixup=samix", "mixup.update_every=1", "mixup.placement=replace"],
}
METHODS = ("moco", "simclr", "byol")


@contextmanager
def counted(own: nn.Module) -> Iterator[dict[int, int]]:
    """Count the bytes that autograd saves, by storage, without the weights."""
    weights = {tensor.untyped_storage()._cdata for tensor in own.state_dict().values()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # the id of a freed storage could be used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def bytes_of(words: list[str], size: int, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes that a step saves for its backward pass, and those held permanently."""
    config, choices = compose("pretrain", words)
    resolve_auto(config, choices, 50_000, {"data.batch_size": batch})
    backbone = build(config.backbone, image_size=size)
    mixing = build(config.mixup, backbone=backbone) if config.mixup else None
    method = build(
        config.method, backbone=backbone, optimizer=build(config.optimizer), mixing=mixing
    )
    fixed = sum(t.numel() * t.element_size() for t in method.state_dict().values())
    trained = sum(p.numel() * 4 for p in method.parameters() if p.requires_grad)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        method._apply(mode.from_tensor)
        views = tuple(torch.empty(batch, 3, size, size) for _ in range(2))
        rows = torch.arange(batch)
        with (
            counted(method) as kept,
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            method.memory.step(),
        ):
            if method.mixing is None:
                method.own_loss(views)
            else:
                method.mixing(method, Batch(views, rows, rows), 0, 1000)
    return sum(kept.values()), fixed + 2 * trained  # gradients and momentum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="images per GPU")
    parser.add_argument("--precision", choices=("bf16", "32"), default="bf16")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--networks", type=int, default=len(NETWORKS), help="number of networks")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    print(f"GiB at {args.batch} images per GPU, {args.precision}, ", end="")
    print(f"checkpointing {'on' if args.checkpointing else 'off'}\n")
    print("| network | policy | " + " | ".join(METHODS) + " |")
    print("|---|---|" + "---|" * len(METHODS), flush=True)
    for network, (words, size) in list(NETWORKS.items())[: args.networks]:
        more = ["backbone.checkpointing=true"] if args.checkpointing else []
        for policy, mixing in POLICIES.items():
            cells = []
            for method in METHODS:
                given = [f"method={method}", *words, *mixing, *more]
                kept, fixed = bytes_of(given, size, args.batch, dtype)
                cells.append(f"{(kept + fixed) / 2**30:.2f}")
            print(f"| {network} | {policy} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
