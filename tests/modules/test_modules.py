"""Twin, queue and groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_samix.errors import ConfigError
from ssl_samix.methods.moco import Queue
from ssl_samix.models.distributed import in_groups
from ssl_samix.models.ema import EMATwin, frozen_forward, momentum_at


def test_twin_is_a_copy_and_follows():
    net = nn.Linear(3, 2)
    twin = EMATwin(net)
    old = twin.module.weight.clone()
    assert torch.equal(old, net.weight)
    with torch.no_grad():
        net.weight.add_(2.0)
    twin.update(net, 0.75)
    torch.testing.assert_close(twin.module.weight, old + 0.5)
    assert not twin.module.weight.requires_grad
    assert not twin(torch.randn(4, 3)).requires_grad


def test_momentum_rises_to_one_by_a_cosine():
    values = [momentum_at(step, 101, 0.9, 1.0) for step in range(102)]
    assert values[0] == pytest.approx(0.9)
    assert values[50] == pytest.approx(0.95, abs=1e-3)
    assert values[100] == values[101] == 1.0
    assert values == sorted(values)


def test_frozen_forward_equals_eval_and_leaves_flags_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    images = torch.randn(5, 3, 6, 6)
    frozen = frozen_forward(net, images)
    assert not frozen.requires_grad
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    torch.testing.assert_close(frozen, net.eval()(images))


def test_queue_holds_the_newest_keys_in_a_ring():
    queue = Queue(5, 2)
    for value in range(1, 5):
        queue.push(torch.full((2, 2), float(value)))
    # 8 keys pushed into 5 places: 1 1 2 2 3 | 3 4 4
    assert queue.keys[:, 0].tolist() == [3, 4, 4, 2, 3]
    assert int(queue.pointer) == 3


def test_queue_smaller_than_a_batch_keeps_the_newest():
    queue = Queue(3, 1)
    queue.push(torch.arange(7.0)[:, None])
    assert sorted(queue.keys[:, 0].tolist()) == [4, 5, 6]


def test_queue_is_part_of_the_state():
    queue = Queue(4, 2)
    queue.push(torch.ones(3, 2))
    other = Queue(4, 2)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.keys, queue.keys)
    assert int(other.pointer) == 3


def test_queue_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="queue_size"):
        Queue(0, 2)


def one(net):
    return lambda part: (net(part),)


def test_groups_are_normalised_apart_and_in_order():
    net = nn.BatchNorm1d(3)
    images = torch.randn(8, 3)
    (grouped,) = in_groups(one(net), images, 4)
    parts = torch.cat([nn.BatchNorm1d(3)(images[i : i + 2]) for i in range(0, 8, 2)])
    torch.testing.assert_close(grouped, parts)
    torch.testing.assert_close(in_groups(one(net), images, 1)[0], nn.BatchNorm1d(3)(images))


def test_no_group_has_a_single_image():
    images = torch.randn(5, 3)
    assert torch.isfinite(in_groups(one(nn.BatchNorm1d(3)), images, 4)[0]).all()


def test_twin_moves_statistics_when_asked_and_counts_nothing():
    net = nn.BatchNorm1d(2)
    twin = EMATwin(net)
    with torch.no_grad():
        net.weight.fill_(3.0)
    net(torch.tensor([[0.0, 4.0], [2.0, 8.0]]))
    twin.update(net, 0.75)
    torch.testing.assert_close(twin.module.weight, torch.full((2,), 1.5))
    torch.testing.assert_close(twin.module.running_mean, torch.zeros(2))
    twin.update(net, 0.5, statistics=True)
    torch.testing.assert_close(twin.module.running_mean, net.running_mean / 2)
    torch.testing.assert_close(twin.module.weight, torch.full((2,), 2.25))
    assert int(twin.module.num_batches_tracked) == 0
