"""Each method computes the loss of lightly's published example of it."""

from __future__ import annotations

import copy

import pytest
import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.models.modules import DINOProjectionHead, NNMemoryBankModule
from torch import nn

from ssl_samix.losses import vicreg
from ssl_samix.methods.barlow_twins import BarlowTwins
from ssl_samix.methods.byol import BYOL
from ssl_samix.methods.dino import DINO
from ssl_samix.methods.moco import MoCo
from ssl_samix.methods.mocov3 import MoCoV3
from ssl_samix.methods.nnclr import NNCLR
from ssl_samix.methods.simclr import SimCLR
from ssl_samix.methods.simsiam import SimSiam
from ssl_samix.methods.swav import SwAV
from ssl_samix.methods.vicreg import VICReg
from ssl_samix.models.backbone import Backbone
from tests.conftest import recipe


class Example(nn.Module):
    """The modules of examples/pytorch/{moco,simclr,byol}.py, around given weights."""

    def __init__(self, method):
        super().__init__()
        self.backbone = copy.deepcopy(method.backbone)
        self.projection_head = copy.deepcopy(method.projector)
        self.prediction_head = copy.deepcopy(method.predictor or nn.Identity())
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def both(self, x):
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z, self.prediction_head(z)

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(1)).detach()


@pytest.fixture
def backbone():
    return Backbone("resnet18", image_size=16, width=8)


@pytest.fixture
def views():
    return torch.randn(16, 3, 16, 16), torch.randn(16, 3, 16, 16)


def same_gradients(method, example):
    theirs = dict(example.backbone.named_parameters())
    for name, weight in method.backbone.named_parameters():
        scale = theirs[name].grad.abs().max()
        assert (weight.grad - theirs[name].grad).abs().max() <= 1e-4 * scale, name


def test_moco(backbone, views):
    method = MoCo(backbone, optimizer=recipe(), queue_size=64, temperature=0.1, bn_groups=1)
    example = Example(method)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(64, 128))
    criterion.memory_bank.bank.copy_(method.queue.keys)
    theirs = criterion(example(views[0]), example.forward_momentum(views[1]))
    ours = method.own_loss(views).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    same_gradients(method, example)
    method.after_batch()
    torch.testing.assert_close(method.queue.keys, criterion.memory_bank.bank)


def test_moco_symmetric_is_the_mean_of_both_directions(backbone, views):
    method = MoCo(backbone, optimizer=recipe(), queue_size=64, symmetric=True)
    method.eval()
    both = method.own_loss(views)
    method.directions = ((0, 1),)
    forward, backward = method.own_loss(views), method.own_loss(views[::-1])
    torch.testing.assert_close(both, (forward + backward) / 2)


def test_simclr(backbone, views):
    method = SimCLR(backbone, optimizer=recipe())
    example = Example(method)
    theirs = NTXentLoss()(example(views[0]), example(views[1]))
    ours = method.own_loss(views).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    same_gradients(method, example)


def test_byol(backbone, views):
    method = BYOL(backbone, optimizer=recipe(), hidden_dim=64, output_dim=32)
    example = Example(method)
    criterion = NegativeCosineSimilarity()
    p0, z0 = example(views[0]), example.forward_momentum(views[0])
    p1, z1 = example(views[1]), example.forward_momentum(views[1])
    theirs = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
    ours = method.own_loss(views).mean()
    # Theirs is -cos, ours the paper's 2 - 2 cos.
    torch.testing.assert_close(ours, 2 + 2 * theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    (2 * theirs).backward()
    same_gradients(method, example)


def test_simsiam(backbone, views):
    method = SimSiam(backbone, optimizer=recipe(), hidden_dim=64, output_dim=32, bottleneck_dim=16)
    example = Example(method)
    criterion = NegativeCosineSimilarity()
    (z0, p0), (z1, p1) = (example.both(view) for view in views)
    theirs = 0.5 * (criterion(z0.detach(), p1) + criterion(z1.detach(), p0))
    with method.memory.step():
        ours = method.own_loss(views).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    same_gradients(method, example)


def test_barlow_twins(backbone, views):
    method = BarlowTwins(backbone, optimizer=recipe(), hidden_dim=64, output_dim=32)
    example = Example(method)
    theirs = BarlowTwinsLoss()(example(views[0]), example(views[1]))
    ours = method.own_loss(views).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    same_gradients(method, example)


def test_barlow_twins_loss_is_in_full_precision_under_autocast(backbone):
    method = BarlowTwins(backbone, optimizer=recipe(), hidden_dim=64, output_dim=32)
    first, second = torch.randn(2, 16, 32)
    losses = []
    for mixed in (False, True):
        given = iter([first, second])
        method.query = lambda _, given=given: next(given)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses.append(method.own_loss((first, second)))
    assert torch.equal(*losses)


def test_barlow_twins_sample_by_sample(backbone, views):
    """The mean of what each sample adds has the loss's value and gradient."""
    method = BarlowTwins(backbone, optimizer=recipe(), hidden_dim=64, output_dim=32)
    example = Example(method)
    theirs = BarlowTwinsLoss()(example(views[0]), example(views[1]))
    own = torch.arange(16)[:, None]
    parts = method.pair_loss(method.query(views[0]), method.keys(views[1]), own)
    torch.testing.assert_close(parts.mean(), theirs, rtol=1e-5, atol=1e-5)
    parts.mean().backward()
    theirs.backward()
    same_gradients(method, example)


def test_vicreg(backbone, views):
    weights = {"invariance": 20.0, "variance": 15.0, "covariance": 2.0}
    method = VICReg(backbone, optimizer=recipe(), hidden_dim=64, output_dim=32, **weights)
    example = Example(method)
    theirs = VICRegLoss(20.0, 15.0, 2.0)(example(views[0]), example(views[1]))
    ours = method.own_loss(views).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    same_gradients(method, example)


def test_vicreg_of_a_constant_column_is_the_papers():
    """Two samples of two columns, by hand: only the first column varies, by a variance of 2."""
    query, target = torch.tensor([[1.0, 3.0], [-1.0, 3.0]]), torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    own = torch.arange(2)[:, None]
    distance = vicreg(query, target, own, 1.0, 0.0, 0.0)
    torch.testing.assert_close(distance, torch.tensor([[2.5], [6.5]]))  # (1 + 4) / 2, (9 + 4) / 2
    hinge = vicreg(query, target, own, 0.0, 1.0, 0.0).mean()  # half of each: one column of 2, both
    assert hinge.item() == pytest.approx((0.99 / 2 + 0.99) / 2)
    together = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # covariance 2, twice off the diagonal
    assert vicreg(together, target, own, 0.0, 0.0, 1.0).mean().item() == pytest.approx(4.0)


def test_nnclr(backbone, views):
    heads = {"hidden_dim": 64, "output_dim": 32, "predictor_dim": 64}
    method = NNCLR(backbone, optimizer=recipe(), queue_size=64, **heads)
    example = Example(method)
    criterion, bank = NTXentLoss(temperature=0.1), NNMemoryBankModule((64, 32))
    bank.bank.copy_(method.queue.keys)
    (z0, p0), (z1, p1) = (example.both(view) for view in views)
    n0, n1 = bank(z0.detach(), update=False), bank(z1.detach(), update=True)
    theirs = 0.5 * (criterion(n0, p1) + criterion(n1, p0))
    with method.memory.step():
        ours = method.own_loss(views).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    same_gradients(method, example)
    method.after_batch()
    # Ours holds unit vectors, of one view as theirs.
    pushed = nn.functional.normalize(bank.bank[:16], dim=1)
    torch.testing.assert_close(method.queue.keys[:16], pushed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.queue.keys[16:], bank.bank[16:])


@pytest.mark.parametrize("count", [0, 3])
def test_swav(backbone, views, count):
    heads = {"hidden_dim": 64, "output_dim": 32, "prototypes": 24}
    method = SwAV(backbone, optimizer=recipe(), **heads).eval()  # small views in one pass or each
    example, prototypes = Example(method), copy.deepcopy(method.prototypes)
    small = [torch.randn(16, 3, 8, 8) for _ in range(count)]
    high, low = (
        [prototypes(nn.functional.normalize(example(view), dim=1)) for view in of]
        for of in (views, small)
    )
    theirs = SwaVLoss()(high, low).squeeze()
    with method.memory.step():
        ours = method.own_loss((*views, *small)).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    same_gradients(method, example)
    torch.testing.assert_close(method.prototypes.weight.grad, prototypes.weight.grad)


def test_swav_keeps_its_prototypes_in_the_first_epochs_and_on_the_sphere(backbone, views):
    method = SwAV(backbone, optimizer=recipe(), hidden_dim=64, output_dim=32, prototypes=24)
    weight = method.prototypes.weight
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for method.freeze_epochs in (1, 0):  # in epoch 0
        before = weight.detach().clone()
        optimizer.zero_grad()
        method.own_loss(views).mean().backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.after_step()
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(24))
        assert torch.allclose(weight, before, atol=1e-6) == (method.freeze_epochs == 1)


def vit():
    options = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    options["dynamic_img_size"] = True
    return Backbone("vit_tiny_patch16_224", image_size=16, options=options)


@pytest.mark.parametrize("network", ["resnet", "vit"])
@pytest.mark.parametrize("count", [0, 3])
def test_dino(backbone, views, network, count):
    """Two steps, of which the second sees the centre of the first."""
    sizes = {"hidden_dim": 64, "output_dim": 32}
    if network == "vit":
        backbone = vit()
    norm = network == "resnet"
    method = DINO(backbone, optimizer=recipe(), prototypes=24, batch_norm=norm, **sizes).eval()
    example = Example(method)
    for name, parent in (
        ("projection_head", method.prototypes),
        ("projection_head_momentum", method.teacher_prototypes.module),
    ):
        head = DINOProjectionHead(method.backbone.feature_dim, 64, 32, 24, norm)
        head.layers.load_state_dict(method.projector.layers.state_dict())
        head.last_layer.weight_v.data.copy_(parent.weight)
        setattr(example, name, head.eval())
    small = [torch.randn(16, 3, 8, 8) for _ in range(count)]
    criterion = DINOLoss(24, warmup_teacher_temp_epochs=0)
    for _ in range(2):
        example.zero_grad()
        method.zero_grad()
        teacher = [example.forward_momentum(view) for view in views]
        theirs = criterion(teacher, [example(view) for view in (*views, *small)])
        with method.memory.step():
            ours = method.own_loss((*views, *small)).mean()
        method.after_batch()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(method.center.value, criterion.center[0])
        ours.backward()
        theirs.backward()
        same_gradients(method, example)
        their_last = example.projection_head.last_layer.weight_v.grad
        torch.testing.assert_close(method.prototypes.weight.grad, their_last)
    assert method.center.value.abs().max() > 0


def test_dinos_teacher_follows_with_its_last_layer(backbone, views, monkeypatch):
    method = DINO(backbone, optimizer=recipe(), prototypes=24, momentum=0.9)
    monkeypatch.setattr(type(method), "total_steps", 100)
    method.own_loss(views).mean().backward()
    teachers = [*method.twin.parameters(), *method.teacher_prototypes.parameters()]
    assert all(weight.grad is None and not weight.requires_grad for weight in teachers)
    assert method.prototypes.weight.grad.abs().max() > 0
    method.on_before_optimizer_step(None)
    assert method.prototypes.weight.grad.abs().max() == 0, "frozen in epoch 0"
    old = method.prototypes.weight.detach().clone()
    with torch.no_grad():
        method.prototypes.weight.add_(1.0)
    method.after_step()
    torch.testing.assert_close(method.teacher_prototypes.module.weight, old + 0.1)


def test_mocov3_is_the_papers_algorithm(backbone, views):
    method = MoCoV3(backbone, optimizer=recipe(), hidden_dim=64, output_dim=32, temperature=0.3)
    example = Example(method)

    def contrastive(query, key):  # arXiv 2104.02057, algorithm 1
        query, key = (torch.nn.functional.normalize(x, dim=1) for x in (query, key))
        logits = query @ key.T / 0.3
        return 2 * 0.3 * torch.nn.functional.cross_entropy(logits, torch.arange(16))

    q0, q1 = example(views[0]), example(views[1])
    k0, k1 = example.forward_momentum(views[0]), example.forward_momentum(views[1])
    theirs = contrastive(q0, k1) + contrastive(q1, k0)
    ours = method.own_loss(views).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    same_gradients(method, example)


@pytest.mark.parametrize("make", [MoCo, SimCLR, BYOL])
def test_heads_have_the_published_shape(make, backbone):
    method = make(backbone, optimizer=recipe())
    kinds = [type(layer).__name__ for layer in method.projector.layers]
    expected = {
        MoCo: ["Linear", "ReLU", "Linear"],
        SimCLR: ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"],
        BYOL: ["Linear", "BatchNorm1d", "ReLU", "Linear"],
    }
    assert kinds == expected[make]
