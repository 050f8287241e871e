"""Every method with every mixing policy, as their YAML files build them."""

from __future__ import annotations

import pytest
import torch

from ssl_samix.config.compose import build, compose, groups
from ssl_samix.models.backbone import Backbone
from ssl_samix.types import Batch
from tests.conftest import frozen_mixer, recipe
from tests.test_invariants import terms_of

POLICIES = sorted(set(groups()["mixup"]) - {"none", "samix_p"})  # samix_p needs a trained Mixer
SMALL = {"hidden_dim": 32, "output_dim": 16}


@pytest.fixture(scope="module")
def methods():
    queue = {name: ["method.queue_size=64"] for name in ("moco", "nnclr")}
    return {
        name: compose("pretrain", [f"method={name}", *queue.get(name, [])])[0].method
        for name in groups()["method"]
    }


@pytest.fixture(scope="module")
def policies():
    return {name: compose("pretrain", [f"mixup={name}"])[0].mixup for name in POLICIES}


def vit(size=16):
    options = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    return Backbone("vit_tiny_patch16_224", image_size=size, options=options)


def one_step(methods, policies, name, policy, backbone):
    torch.manual_seed(0)
    extra = {"embedding_dim": 16, "clusters": 2} if policy == "samix_c" else {}
    mixing = build(policies[policy], backbone=backbone, **extra)
    if policy == "samix_c":
        mixing.assign(torch.arange(8) % 2, torch.randn(2, 4))
    method = build(methods[name], backbone=backbone, optimizer=recipe(), mixing=mixing, **SMALL)
    size = backbone.image_size
    views = tuple(torch.randn(8, 3, size, size) for _ in range(2))
    losses = terms_of(method, images=Batch(views, torch.zeros(8), torch.arange(8))).losses
    sum(losses.values()).backward()
    return method, losses


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", sorted(groups()["method"]))
def test_every_pair_makes_a_step(name, policy, methods, policies):
    backbone = Backbone("resnet18", image_size=16, width=4)
    method, losses = one_step(methods, policies, name, policy, backbone)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert {"own", "mix"} <= losses.keys()
    assert ("mixer" in losses) == policy.startswith("samix")
    slope = method.backbone.trunk.conv1.weight.grad
    assert torch.isfinite(slope).all()
    assert slope.abs().max() > 0


@pytest.mark.parametrize("policy", ["samix", "samix_c", "attentivemix"])
@pytest.mark.parametrize("name", ["mocov3", "byol"])
def test_a_transformers_maps_reach_the_mixer(name, policy, methods, policies):
    method, losses = one_step(methods, policies, name, policy, vit())
    assert all(torch.isfinite(loss) for loss in losses.values())
    trained = {n for n, p in method.backbone.named_parameters() if p.grad is not None}
    patches = {n for n in dict(method.backbone.named_parameters()) if "patch_embed" in n}
    assert patches
    assert (patches <= trained) == (name != "mocov3"), "MoCo v3 leaves the patches as drawn"


@pytest.mark.parametrize(("name", "size"), [("vit_tiny", 32), ("vit_small", 32)])
def test_vit_configurations_build(name, size):
    config = compose("pretrain", [f"backbone={name}", "backbone.options.patch_size=4"])[0].backbone
    backbone = build(config, image_size=size)
    assert backbone.map_spec(3).stride == 4
    weights = sum(p.numel() for p in backbone.parameters()) / 1e6
    assert weights == pytest.approx({"vit_tiny": 5.4, "vit_small": 21.3}[name], abs=0.2)


def test_the_part_of_a_transformer_that_the_mixer_reads():
    backbone = vit()
    names = backbone.state_names_for_stage(2)
    blocks = {name.split(".")[3] for name in names if ".blocks." in name}
    assert blocks == {"0", "1"}
    assert any("pos_embed" in name for name in names)
    assert not any(name.endswith("norm.weight") and ".blocks." not in name for name in names)


def test_a_frozen_mixer_takes_any_method(methods):
    for name in sorted(methods):
        backbone = Backbone("resnet18", image_size=16, width=4)
        mixer = frozen_mixer()
        method = build(methods[name], backbone=backbone, optimizer=recipe(), **SMALL)
        views = torch.randn(2, 8, 3, 16, 16).unbind()
        mixed = mixer(views[0])
        assert method.query(mixed.images).shape == (8, 16)
