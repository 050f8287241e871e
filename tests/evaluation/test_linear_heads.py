"""Heads that are trained together, against autograd and torch.optim one at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_samix.errors import ConfigError
from ssl_samix.evaluation.linear import Examples, Grid, Scaling, batches, measure, train_heads


def whole(features, labels):
    rows = torch.arange(len(features))
    return Examples(features, labels, rows, Scaling(features, rows))


def some(n=100):
    return whole(torch.randn(n, 7, dtype=torch.float64), torch.randint(4, (n,)))


def test_heads_are_what_autograd_and_torch_optim_make_of_each():
    size, epochs, seed = 16, 6, 3
    settings = [(0.5, 0.0), (20.0, 1e-3), (3.0, 0.05)]
    data = some()
    heads = train_heads(data, 4, settings, epochs, size, seed)
    generator = torch.Generator().manual_seed(seed)
    start = torch.empty(7, 4).normal_(std=0.01, generator=generator)
    order = [b for epoch in batches(100, size, epochs, generator) for b in epoch]
    assert len(order) == 36
    for i, (rate, decay) in enumerate(settings):
        layer = nn.Linear(7, 4).double()
        layer.weight.data, layer.bias.data = start.double().T.clone(), torch.zeros(4).double()
        groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}]
        optimizer = torch.optim.SGD(groups, lr=rate * size / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order))
        for rows in order:
            x, y = data.read(rows)
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x), y).backward()
            optimizer.step()
            schedule.step()
        own = slice(4 * i, 4 * i + 4)
        torch.testing.assert_close(heads.weight[:, own], layer.weight.T, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(heads.bias[own], layer.bias, rtol=1e-9, atol=1e-10)
        assert (layer.weight.T - start).abs().max() > 0.1  # it has been trained


def test_a_head_does_not_feel_the_others():
    data = some()
    together = train_heads(data, 4, [(1.0, 0.0), (30.0, 1e-4)], 3, 32, 0)
    alone = train_heads(data, 4, [(30.0, 1e-4)], 3, 32, 0)
    torch.testing.assert_close(together.weight[:, 4:], alone.weight)


def test_an_epoch_has_full_batches_of_different_images():
    first, second = batches(10, 4, 2, torch.Generator().manual_seed(0))
    assert [len(b) for b in (*first, *second)] == [4, 4, 4, 4]
    assert len(torch.cat(first).unique()) == 8
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_scaled_features_have_mean_squared_length_one():
    features = 1000 + 300 * torch.randn(500, 8)
    x = Scaling(features, torch.arange(400))(features[:400])
    assert x.square().sum(dim=1).mean().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.var(dim=0), torch.full((8,), 1 / 8), rtol=0.01, atol=0)


def test_a_feature_that_does_not_vary_becomes_zero():
    features = torch.randn(300, 3)
    features[:, 1] = 0.3 * (1 + 1e-7 * torch.randn(300))  # rounding is no variation
    x = Scaling(features, torch.arange(300))(features)
    assert x[:, 1].abs().max() == 0
    assert x[:, [0, 2]].std(dim=0).min() > 0.5


def test_the_rows_that_are_measured_do_not_depend_on_the_chunk():
    data = some(50)
    heads = train_heads(data, 4, [(1.0, 0.0), (30.0, 1e-4)], 3, 32, 0)
    for whole_set, row_by_row in zip(measure(heads, data), measure(heads, data, 8), strict=True):
        torch.testing.assert_close(whole_set, row_by_row)


def test_what_a_grid_refuses_diverges():
    fits, breaks = (300.0, 3.7 / 300), (300.0, 6.0 / 300)
    Grid(learning_rates=fits[:1], weight_decays=fits[1:])
    with pytest.raises(ConfigError, match="diverge"):
        Grid(learning_rates=breaks[:1], weight_decays=breaks[1:])
    heads = train_heads(some(256), 4, [fits, breaks], 100, 256, 0)
    largest = heads.weight.view(7, 2, 4).abs().amax(dim=(0, 2))
    assert largest[0] < 1e3
    assert largest[1] > 1e6
