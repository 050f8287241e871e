"""Two real processes on gloo compute what one process computes with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ssl_samix.artifacts.encoder import load_encoder
from ssl_samix.data.datamodule import StepSampler
from ssl_samix.data.images import MemoryImages
from ssl_samix.evaluation import features
from ssl_samix.models.backbone import Backbone
from ssl_samix.training.monitors import KNNMonitor
from tests.conftest import METHODS, samix_here

BATCH = 8


def build(name):
    torch.manual_seed(0)
    method = METHODS[name](Backbone("resnet18", image_size=16, width=4))
    # Normalised with fixed statistics: each process would have its own otherwise.
    return method.eval()


def batch():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(BATCH, 3, 16, 16, generator=generator) for _ in range(2)]


def losses_and_gradients(method, views):
    losses = method.own_loss(views)
    losses.mean().backward()
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    method.after_batch()
    kept = {n: b for n, b in method.named_buffers() if n in ("queue.keys", "center.center")}
    return losses.detach(), gradients, kept


# Barlow Twins standardises embeddings over each rank's own batch, like lightly's.
NAMES = sorted(set(METHODS) - {"barlow_twins"})


def worker(rank, port, folder):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    share = BATCH // 2
    views = tuple(v[rank * share : (rank + 1) * share] for v in batch())
    for name in NAMES:
        losses, gradients, kept = losses_and_gradients(build(name), views)
        for gradient in gradients.values():  # as DDP does
            dist.all_reduce(gradient)
            gradient.div_(2)
        torch.save((losses, gradients, kept), f"{folder}/{name}-{rank}.pt")
    torch.save((knn(), embedded(folder)), f"{folder}/knn-{rank}.pt")
    dist.destroy_process_group()


def knn():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(60) % 3
    bank = torch.randn(60, 8, generator=generator) + torch.eye(8)[labels]
    query = torch.randn(31, 8, generator=generator) + torch.eye(8)[labels[:31]]
    monitor = KNNMonitor(k=(5, 20))
    return monitor._accuracy(bank, labels, query, labels[:31], 3, torch.device("cpu"))


def embedded(folder):
    """More rows per rank than are gathered at once, of a number that two does not divide."""
    features.GATHERED = 3
    pixels = torch.arange(15, dtype=torch.uint8)[:, None, None, None].expand(15, 3, 2, 2)
    images = MemoryImages(pixels, torch.zeros(15).long(), [""] * 15)
    zeros, ones = (0.0,) * 3, (1.0,) * 3
    return features.extract(
        torch.nn.Flatten(), images, range(15), zeros, ones, device=torch.device("cpu"), chunk=4
    )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def two_ranks(once):
    return once("ranks", lambda home: mp.spawn(worker, (free_port(), str(home)), nprocs=2))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one_with_the_whole_batch(name, two_ranks):
    whole, whole_gradients, whole_kept = losses_and_gradients(build(name), tuple(batch()))
    parts = [torch.load(two_ranks / f"{name}-{rank}.pt") for rank in (0, 1)]
    losses = torch.cat([part[0] for part in parts])
    torch.testing.assert_close(losses, whole, rtol=1e-5, atol=1e-6)
    for _, gradients, kept in parts:
        assert gradients.keys() == whole_gradients.keys()
        for key, gradient in gradients.items():
            if name == "vicreg" and key == "projector.layers.6.bias":
                # Its loss does not depend on the last bias: what is left is rounding.
                assert max(gradient.abs().max(), whole_gradients[key].abs().max()) < 1e-5
                continue
            scale = whole_gradients[key].abs().max().clamp_min(1e-6)
            assert (gradient - whole_gradients[key]).abs().max() <= 1e-4 * scale, key
        # The same keys in the same order: queue and centre of every rank are the whole batch's.
        torch.testing.assert_close(kept, whole_kept, rtol=1e-5, atol=1e-6)


def test_two_processes_measure_what_one_measures(two_ranks, tmp_path):
    accuracy, rows = knn(), embedded(tmp_path)
    for rank in (0, 1):
        theirs, their_rows = torch.load(two_ranks / f"knn-{rank}.pt")
        assert their_rows.shape == (15, 12)
        torch.testing.assert_close(their_rows, rows)
        for k, values in accuracy.items():
            assert theirs[k] == pytest.approx(values, abs=1e-3)


def test_ranks_share_each_batch_without_overlap():
    whole = StepSampler(103, 20, seed=1, rank=0, ranks=1)
    parts = [StepSampler(103, 20, seed=1, rank=r, ranks=2) for r in (0, 1)]
    for sampler in (whole, *parts):
        sampler.set_epoch(3)
    seen = []
    for (step, all_), (_, first), (_, second) in zip(whole, *parts, strict=True):
        assert first + second == all_
        assert len(all_) == 20
        seen += all_
        assert step == 3 * 5 + len(seen) // 20 - 1
    assert len(set(seen)) == 100, "no image twice in an epoch"


def test_an_epoch_has_its_own_order_and_a_seed_repeats_it():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        sampler = StepSampler(50, 10, seed=seed, rank=0, ranks=1)
        sampler.set_epoch(epoch)
        orders.append([i for _, part in sampler for i in part])
    assert orders[0] == orders[3]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


@pytest.mark.parametrize(
    ("command", "monitor", "quality"),
    [
        ("pretrain", "knn", "kNN top-1"),
        pytest.param("supervised", "accuracy", "top-1", marks=pytest.mark.slow),
    ],
)
def test_the_command_trains_on_two_processes(command, monitor, quality, tmp_path):
    words = [
        "data.limit=96", "data.batch_size=32", "backbone.width=8", "trainer.max_epochs=2",
        "trainer.devices=2", "trainer.accelerator=cpu",
        f"callbacks.{monitor}.every_n_epochs=1", "out=run",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "ssl_samix", command, *words],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith(quality)]
    assert len(said) == 1, "one process speaks"
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 3
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    encoder = load_encoder(tmp_path / "run")
    for key, tensor in encoder.backbone.state_dict().items():
        torch.testing.assert_close(tensor, checkpoint["state_dict"][f"backbone.{key}"])
    # The order of images and the steps of an epoch depend on no number of processes.
    longer = ["resume=run", "trainer.devices=1", "trainer.max_epochs=3"]
    assert "1 x cpu" in samix_here(command, *longer, cwd=tmp_path)
    after = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert after[:3] == lines
    assert len(after) == 4
    prolonged = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert prolonged["global_step"] == 9
    assert all(torch.isfinite(t.float()).all() for t in prolonged["state_dict"].values())
