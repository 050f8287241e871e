"""Mixing on two real gloo processes: what one process computes with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ssl_samix.artifacts.mixer import load_mixer
from ssl_samix.types import Batch, MixPlan
from tests.conftest import METHODS, mixed_method
from tests.test_ddp import free_port

BATCH, SHARE = 8, 4
# Partners within each half: mixing never leaves a rank.
PARTNER = torch.tensor([1, 2, 3, 0, 6, 7, 5, 4])
LAM = torch.linspace(0.1, 0.9, BATCH)


def build(name, mixing, placement, targets):
    torch.manual_seed(0)
    method = mixed_method(name, mixing, placement=placement, targets=targets)
    return method.eval()  # fixed statistics: each process would have its own otherwise


def whole_batch():
    generator = torch.Generator().manual_seed(7)
    views = tuple(torch.randn(BATCH, 3, 16, 16, generator=generator) for _ in range(2))
    return Batch(views, torch.full((BATCH,), -1), torch.arange(BATCH))


def whole_plan():
    return MixPlan(LAM, PARTNER, torch.arange(BATCH))


def part_of(rank):
    rows, batch = slice(rank * SHARE, (rank + 1) * SHARE), whole_batch()
    part = Batch(tuple(v[rows] for v in batch.views), batch.label[rows], batch.index[rows])
    return part, MixPlan(LAM[rows], PARTNER[rows] - rank * SHARE, torch.arange(SHARE))


def run(method, batch, plan):
    """Losses, gradients of the weights, and of the images that the queries were made of."""
    method.mixing.draw = lambda images: plan
    seen, query = [], method.query

    def watched(images):
        # A plain view is told apart by identity: only mixtures are watched.
        if not any(images is view for view in batch.views):
            images = images.detach().requires_grad_()
            seen.append(images)
        return query(images)

    method.query = watched
    with method.memory.step():
        losses = method.mixing(method, batch, 0, 10).losses
    sum(losses.values()).backward()
    weights = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in losses.items()}, weights, [images.grad for images in seen]


CASES = [
    (name, *case)
    for name in sorted(METHODS)
    for case in (
        ("mixup", "replace", "shared"),
        ("samix", "add", "shared"),
        ("samix_c", "replace", "shared"),
        ("samix", "add", "sibling"),
    )
    # Its criterion standardises embeddings over each rank's own batch, like lightly's.
    if name != "barlow_twins"
]


def worker(rank, port, folder):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for case in CASES:
        losses, weights, images = run(build(*case), *part_of(rank))
        for values in (losses, weights):
            for value in values.values():
                dist.all_reduce(value)
                value.div_(2)  # as DDP averages
        torch.save((losses, weights, images), f"{folder}/{'-'.join(case)}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(once):
    return once("mixing ranks", lambda home: mp.spawn(worker, (free_port(), str(home)), nprocs=2))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_mixture_learns_what_it_learns_on_one_rank(case, two_ranks):
    losses, weights, images = run(build(*case), whole_batch(), whole_plan())
    parts = [torch.load(two_ranks / f"{'-'.join(case)}-{rank}.pt") for rank in (0, 1)]
    for their_losses, their_weights, _ in parts:
        for term, loss in losses.items():
            torch.testing.assert_close(their_losses[term], loss, rtol=1e-4, atol=1e-5)
        assert their_weights.keys() == weights.keys()
        for key, gradient in weights.items():
            scale = gradient.abs().max().clamp_min(1e-5)
            assert (their_weights[key] - gradient).abs().max() <= 1e-3 * scale, key
    assert images
    for number, gradient in enumerate(images):
        assert gradient.flatten(1).abs().sum(dim=1).min() > 0, "a mixture that teaches nothing"
        # Each rank's loss is a mean over half as many images.
        both = torch.cat([part[2][number] for part in parts]) / 2
        scale = gradient.abs().max()
        assert (both - gradient).abs().max() <= 1e-3 * scale


@pytest.mark.parametrize(
    ("name", "mixing"),
    [("moco", "samix_c"), pytest.param("simclr", "samix", marks=pytest.mark.slow)],
)
def test_the_command_mixes_on_two_processes(name, mixing, tmp_path):
    words = [
        f"method={name}", f"mixup={mixing}", "mixup.update_every=2", "data.limit=128",
        "data.batch_size=32", "backbone.width=8", "trainer.max_epochs=2", "trainer.devices=2",
        "trainer.accelerator=cpu", "out=run",
    ]  # fmt: skip
    if mixing == "samix_c":
        words.append("mixup.clusters=10")
    done = subprocess.run(
        [sys.executable, "-m", "ssl_samix", "pretrain", *words],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    mixer = load_mixer(tmp_path / "run")
    for key, tensor in mixer.policy.state_dict().items():
        torch.testing.assert_close(tensor, checkpoint["state_dict"][f"mixing.policy.{key}"])
