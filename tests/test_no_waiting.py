"""A step asks the device for no number: it would wait until all that was sent there is done."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ssl_samix.config.compose import build, compose, groups
from ssl_samix.data.views import BatchedViews
from ssl_samix.models.backbone import Backbone
from ssl_samix.types import Batch
from tests.conftest import METHODS

POLICIES = sorted(set(groups()["mixup"]) - {"none", "samix_p", "samix_c"})


def traced_step(name, policy):
    """One step on tensors without contents, which cannot answer."""
    config, _ = compose("pretrain", [f"mixup={policy}"])
    backbone = Backbone("resnet18", image_size=16, width=8)
    method = METHODS[name](backbone, mixing=build(config.mixup, backbone=backbone))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        method._apply(mode.from_tensor)
        views = tuple(torch.empty(8, 3, 16, 16) for _ in range(2))
        with method.memory.step():
            batch = Batch(views, torch.zeros(8), torch.arange(8))
            losses = method.mixing(method, batch, 0, 10).losses
        sum(losses.values()).backward()
        if method.twin is not None:
            method.twin.update(method.embedder, 0.9)
        method.after_batch()
    return method


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_waits(policy):
    traced_step("simclr", policy)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_method_waits(name):
    traced_step(name, "samix")


def test_views_are_drawn_without_a_look_at_the_images(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # unknown there
    config, _ = compose("pretrain", ["method=byol"])
    specs = build(config.views).specs(64)
    make = BatchedViews(specs, 64, (0.5,) * 3, (0.5,) * 3).to("meta")
    images = torch.zeros(40, 3, 64, 64, dtype=torch.uint8, device="meta")
    crops = torch.zeros(40, 2, 3, 64, 64, dtype=torch.uint8, device="meta")
    for views in (make(images), make.finish(crops)):
        assert [view.shape for view in views] == [(40, 3, 64, 64)] * 2
        assert all(view.is_meta for view in views), "a device that can be asked for nothing"


def test_waiting_would_be_seen(monkeypatch):
    draw = torch.distributions.Beta.sample
    monkeypatch.setattr(
        torch.distributions.Beta, "sample", lambda self, n: draw(self, n) * float(torch.ones(()))
    )
    with pytest.raises(DataDependentOutputException):
        traced_step("simclr", "mixup")
