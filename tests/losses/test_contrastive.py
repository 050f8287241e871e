"""The losses against sums written out term by term in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ssl_samix.losses import cosine_regression, info_nce, info_nce_in_batch, nt_xent


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def test_info_nce_is_the_papers_sum():
    query, positives, negatives, t = unit(3, 5), unit(3, 2, 5), unit(7, 5), 0.2
    losses = info_nce(query, positives, negatives, t)
    for i in range(3):
        for p in range(2):
            top = math.exp(dot(query[i], positives[i, p]) / t)
            bottom = top + sum(math.exp(dot(query[i], n) / t) for n in negatives)
            assert abs(float(losses[i, p]) + math.log(top / bottom)) < 1e-5


def test_in_batch_losses_leave_out_all_parents():
    query, others, t = unit(4, 5), unit(4, 5), 0.5
    parents = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    losses = info_nce_in_batch(query, others, parents, None, t)
    for i in range(4):
        for p in range(2):
            top = math.exp(dot(query[i], others[parents[i, p]]) / t)
            rest = [j for j in range(4) if j not in parents[i].tolist()]
            bottom = top + sum(math.exp(dot(query[i], others[j]) / t) for j in rest)
            assert abs(float(losses[i, p]) + math.log(top / bottom)) < 1e-5


def test_nt_xent_is_the_papers_double_loop():
    first, second, t = unit(4, 6), unit(4, 6), 0.5
    z = torch.cat([first, second])
    total = [0.0] * 4
    for i in range(8):
        j = (i + 4) % 8
        bottom = sum(math.exp(dot(z[i], z[k]) / t) for k in range(8) if k != i)
        total[i % 4] -= math.log(math.exp(dot(z[i], z[j]) / t) / bottom) / 2
    losses = nt_xent(first, second, first, second, 0, t)
    torch.testing.assert_close(losses, torch.tensor(total), rtol=1e-5, atol=1e-5)


def test_nt_xent_of_a_part_equals_that_part_of_the_whole():
    first, second = unit(6, 5).float(), unit(6, 5).float()
    whole = nt_xent(first, second, first, second, 0, 0.5)
    part = nt_xent(first[2:4], second[2:4], first, second, 2, 0.5)
    torch.testing.assert_close(part, whole[2:4])


def test_losses_stay_finite_at_tiny_temperatures():
    query = unit(4, 8).float()
    losses = info_nce(query, query[:, None], -query, 1e-3)
    assert torch.isfinite(losses).all()
    torch.testing.assert_close(losses, torch.zeros(4, 1), atol=1e-5, rtol=0)


def test_cosine_regression_is_the_squared_distance():
    query, positives = unit(5, 7), unit(5, 3, 7)
    expected = (query[:, None] - positives).square().sum(-1).float()
    torch.testing.assert_close(cosine_regression(query, positives), expected)


def test_autocast_does_not_touch_the_losses():
    """Products inside a loss stay float32: the value is that of the same rows in float32."""
    rows = [unit(6, 16).bfloat16() for _ in range(2)]
    queue, parents = unit(20, 16).float(), torch.arange(6)[:, None]
    calls = (
        lambda a, b: info_nce(a, b[:, None], queue, 0.1),
        lambda a, b: info_nce_in_batch(a, b, parents, None, 0.1),
        lambda a, b: nt_xent(a, b, a, b, 0, 0.1),
        lambda a, b: cosine_regression(a, b[:, None]),
    )
    for loss in calls:
        expected = loss(*[r.float() for r in rows])
        with torch.autocast("cpu", torch.bfloat16):
            measured = loss(*rows)
        assert measured.dtype == torch.float32
        torch.testing.assert_close(measured, expected)
