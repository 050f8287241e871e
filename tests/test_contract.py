"""The contract between method and mixer, for every method."""

from __future__ import annotations

import pytest
import torch

from ssl_samix.methods import moco
from ssl_samix.models.backbone import Backbone
from tests.conftest import METHODS

WHOLE_BATCH = ("BarlowTwins", "VICReg")


def gradients(module):
    return [p.grad for p in module.parameters() if p.grad is not None and p.grad.any()]


def test_embeddings_are_unit_rows_of_one_width(method, views):
    query, target = method.query(views[0]), method.targets(views[1])
    assert query.shape == target.shape == (6, query.shape[1])
    if type(method).__name__ not in WHOLE_BATCH:  # their criteria read lengths
        torch.testing.assert_close(query.norm(dim=1), torch.ones(6))
        torch.testing.assert_close(target.norm(dim=1), torch.ones(6))
    assert query.requires_grad
    assert not target.requires_grad


def test_own_loss_trains_every_weight_of_the_online_branch(method, views):
    loss = method.own_loss(views)
    assert loss.shape == (6,)
    loss.mean().backward()
    # A bias before BatchNorm has no effect, hence no gradient beyond rounding: grad is not None.
    missing = [n for n, p in method.online.named_parameters() if p.grad is None]
    assert missing == []


def test_the_twin_takes_no_gradient_and_starts_equal(method, views):
    if method.twin is None:
        pytest.skip("this method has no twin")
    assert not any(p.requires_grad for p in method.teacher.parameters())
    online = dict(method.online.named_parameters())
    for name, weight in method.teacher.named_parameters():
        torch.testing.assert_close(weight, online[name], rtol=0, atol=0)
    method.own_loss(views).mean().backward()
    assert all(p.grad is None for p in method.teacher.parameters())


def test_frozen_query_gives_gradient_to_images_alone_and_moves_no_statistics(method, views):
    images = views[0].clone().requires_grad_()
    before = {n: b.clone() for n, b in method.named_buffers()}
    modes = [m.training for m in method.modules()]
    method.frozen_query(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert gradients(method) == []
    for name, buffer in method.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert [m.training for m in method.modules()] == modes


def test_pair_loss_is_the_own_criterion_column_by_column(method, views):
    query, target = method.query(views[0]).detach(), method.targets(views[1])
    own = torch.arange(6)[:, None]
    partner = (torch.arange(6)[:, None] + 1) % 6
    both = method.pair_loss(query, target, torch.cat([own, partner], dim=1))
    swapped = method.pair_loss(query, target, torch.cat([partner, own], dim=1))
    assert both.shape == (6, 2)
    torch.testing.assert_close(both, swapped.flip(1))


def test_no_parent_is_a_negative(method, views):
    """Moving one parent's target must not change the loss towards the other."""
    if type(method).__name__ in (*WHOLE_BATCH, "SwAV"):
        pytest.skip("its loss has no negatives and is one of the whole batch")
    query, target = method.query(views[0]).detach(), method.targets(views[1]).clone()
    parents = torch.tensor([[i, (i + 1) % 6] for i in range(6)])
    before = method.pair_loss(query, target, parents)
    target[1] = query[0]  # row 1 is the second parent of row 0
    after = method.pair_loss(query, target, parents)
    torch.testing.assert_close(after[0, 0], before[0, 0], rtol=0, atol=0)
    assert after[0, 1] != before[0, 1]


def test_shuffled_batch_gives_shuffled_losses(method, views):
    method.eval()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    straight = method.own_loss(views)
    for kept in ("_new_keys", "_new_outputs"):  # would move the queue or the centre
        getattr(method, kept, []).clear()
    shuffled = method.own_loss((views[0][order], views[1][order]))
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["moco", "byol"])
def test_after_step_moves_the_twin_by_its_momentum(name, monkeypatch):
    method = METHODS[name](Backbone("resnet18", image_size=16, width=4), momentum=0.9)
    monkeypatch.setattr(type(method), "total_steps", 100)
    monkeypatch.setattr(type(method), "global_step", 0)
    online, twin = method.backbone.trunk.conv1.weight, method.teacher[0].trunk.conv1.weight
    old = twin.clone()
    with torch.no_grad():
        online.add_(1.0)
    method.after_step()
    torch.testing.assert_close(twin, 0.9 * old + 0.1 * online)


def test_moco_pushes_its_keys_after_the_losses_only(views):
    method = METHODS["moco"](Backbone("resnet18", image_size=16, width=4))
    before = method.queue.keys.clone()
    method.own_loss(views)
    assert torch.equal(method.queue.keys, before)
    method.after_batch()
    assert not torch.equal(method.queue.keys[:6], before[:6])
    assert torch.equal(method.queue.keys[6:], before[6:])
    assert int(method.queue.pointer) == 6


@pytest.mark.parametrize(
    ("devices", "groups", "here", "across"),
    [(1, 4, 4, False), (2, 4, 2, False), (4, 4, 1, True), (8, 4, 1, True), (2, 1, 1, True)],
)
def test_moco_moves_images_only_where_devices_are_groups(
    devices, groups, here, across, monkeypatch
):
    """Groups are as large on any number of devices."""
    method = METHODS["moco"](Backbone("resnet18", image_size=16, width=4), bn_groups=groups)
    seen = []

    def shuffled(images, distributed):
        seen.append(distributed)
        return images, torch.arange(len(images))

    monkeypatch.setattr(moco, "world_size", lambda: devices)
    monkeypatch.setattr(moco, "batch_shuffle", shuffled)
    monkeypatch.setattr(moco, "batch_unshuffle", lambda rows, order, distributed: rows)
    method.embed_targets(torch.randn(8, 3, 16, 16))
    assert method.groups_here == here
    assert seen == [across]


def test_moco_normalises_queries_and_keys_in_different_groups():
    """With groups, a key's statistics come from other images than its query's."""
    backbone = Backbone("resnet18", image_size=16, width=4)
    whole = METHODS["moco"](backbone, bn_groups=1)
    grouped = METHODS["moco"](backbone, bn_groups=3)
    grouped.load_state_dict(whole.state_dict())
    images = torch.randn(6, 3, 16, 16)
    assert not torch.allclose(whole.targets(images), grouped.targets(images), atol=1e-4)
    first, second = grouped.targets(images), grouped.targets(images)
    assert not torch.allclose(first, second, atol=1e-4)  # another shuffle, other groups
    torch.testing.assert_close(
        grouped.query(images)[:2], whole.query(images[:2]), rtol=1e-4, atol=1e-5
    )
