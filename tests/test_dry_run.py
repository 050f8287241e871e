"""Whole steps on a pretended GPU: tensors that have a device, and no contents.

An operation on tensors of two devices, a value that the host reads, and any copy between host and
device fail here, where there is no GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_samix.config.compose import build, compose, groups
from ssl_samix.models.backbone import Backbone
from ssl_samix.types import Batch
from tests.conftest import METHODS

POLICIES = sorted(set(groups()["mixup"]) - {"samix_p", "samix_c"})  # those need a run, clusters
PRECISIONS = {"32": None, "16": torch.float16, "bf16": torch.bfloat16}


class NoCopies(TorchDispatchMode):
    """Refuses copies between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor) and a.ndim]
        if isinstance(result, torch.Tensor) and function.overloadpacket in (
            torch.ops.aten._to_copy, torch.ops.aten.copy_,
        ):  # fmt: skip
            devices = {tensor.device.type for tensor in (*given, result)}
            assert len(devices) == 1, f"{function} copies between {' and '.join(sorted(devices))}"
        return result


@pytest.fixture(autouse=True)
def _beta():
    """The one operation of a step that torch cannot pretend: ratios."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_sample_dirichlet", lambda x, generator=None: torch.empty_like(x), "Meta")
    yield
    library._destroy()


def dry_step(name, policy, precision="32", placement="auto", change=None):
    """A step of a method: losses, optimizer, moving averages, queue."""
    words = [f"mixup={policy}"]
    words += [] if policy == "none" else [f"mixup.placement={placement}"]
    config, _ = compose("pretrain", words)
    backbone = Backbone("resnet18", image_size=16, width=8)
    mixing = build(config.mixup, backbone=backbone) if config.mixup else None
    method = METHODS[name](backbone, mixing=mixing)
    method.momentum_now = lambda: 0.9
    if change is not None:
        change(method)
    dtype = PRECISIONS[precision]
    with FakeTensorMode() as mode:
        method._apply(lambda tensor: mode.from_tensor(tensor).to("cuda"))
        views = tuple(torch.empty(8, 3, 16, 16, device="cuda") for _ in range(2))
        rows = torch.arange(8, device="cuda")
        batch = Batch(views, rows, rows)
        optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
        with NoCopies():
            with torch.autocast("cuda", dtype, enabled=dtype is not None), method.memory.step():
                if mixing is None:
                    losses = {"own": method.own_loss(batch.views).mean()}
                else:
                    losses = mixing(method, batch, 0, 10).losses
            for weight in method.parameters():  # backward needs a driver: see test_no_waiting
                if weight.requires_grad:
                    weight.grad = torch.empty_like(weight)
            optimizer.step()
            method.after_step()
            method.after_batch()
    assert all(loss.device.type == "cuda" for loss in losses.values())
    unmoved = [n for n, tensor in method.state_dict().items() if tensor.device.type != "cuda"]
    assert not unmoved
    return losses


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods(name, precision):
    assert dry_step(name, "samix", precision)["mixer"].dtype == torch.float32


@pytest.mark.parametrize("placement", ["add", "replace"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_placements(name, placement):
    dry_step(name, "mixup", "bf16", placement)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy):
    dry_step("simclr", policy, "bf16")


def to_the_host(method):
    plain = method.pair_loss
    method.pair_loss = lambda query, target, parents: plain(query.cpu().cuda(), target, parents)


def index_of_the_host(method):
    plain = method.pair_loss
    method.pair_loss = lambda query, target, parents: plain(
        query, target[torch.arange(len(target)).to(target.device)], parents
    )


def read_by_the_host(method):
    plain = method.pair_loss

    def reading(query, target, parents):
        return plain(query, target, parents) * (1 if query.sum().item() > 0 else 2)

    method.pair_loss = reading


def two_devices(method):
    plain = method.pair_loss
    method.pair_loss = lambda query, target, parents: plain(query, target, parents.cpu() * 1)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (to_the_host, AssertionError),
        (index_of_the_host, AssertionError),
        (read_by_the_host, DataDependentOutputException),
        (two_devices, (AssertionError, RuntimeError)),
    ],
)
def test_each_mistake_would_be_seen(change, error):
    with pytest.raises(error):
        dry_step("simclr", "mixup", change=change)
