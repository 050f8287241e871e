"""Drawing plans."""

from __future__ import annotations

import pytest
import torch

from ssl_samix.errors import ConfigError
from ssl_samix.mixup.plan import derangement, draw_plan

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_partners_are_a_derangement(size):
    for _ in range(50):
        partner = derangement(size, CPU)
        assert sorted(partner.tolist()) == list(range(size))
        assert not (partner == torch.arange(size)).any()


def test_every_other_row_is_a_likely_partner():
    counts = torch.zeros(4, 4)
    for _ in range(3000):
        counts[torch.arange(4), derangement(4, CPU)] += 1
    off = counts[~torch.eye(4, dtype=torch.bool)]
    assert (off > 850).all()
    assert (off < 1150).all()


def test_ratios_are_one_per_sample_from_beta():
    lam = draw_plan(20_000, 2.0, CPU).lam
    assert lam.shape == (20_000,)
    assert lam.mean().item() == pytest.approx(0.5, abs=0.01)
    assert lam.var().item() == pytest.approx(1 / 20, abs=0.003)  # of Beta(2, 2)


def test_one_image_has_no_partner():
    with pytest.raises(ConfigError, match="at least 2"):
        draw_plan(1, 2.0, CPU)


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_alpha_is_positive(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        draw_plan(4, alpha, CPU)


def test_a_fraction_of_the_batch_is_mixed_evenly():
    plan = draw_plan(8, 2.0, CPU, fraction=0.5)
    assert plan.rows.tolist() == [0, 2, 4, 6]
    assert plan.lam.shape == plan.partner.shape == (4,)
    assert (plan.partner != plan.rows).all()
    assert torch.equal(plan.parents, torch.stack([plan.rows, plan.partner], dim=1))
    assert draw_plan(8, 2.0, CPU, fraction=0.01).rows.tolist() == [0]
