"""Parameter groups, learning rates and the schedule."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from lightly.utils import lars
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ssl_samix.config.saved import merged
from ssl_samix.errors import ConfigError
from ssl_samix.optim import LARS, MixerOptimizer, parameter_groups
from tests.conftest import mixed_method, recipe


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_biases_and_normalisation_are_not_decayed():
    module = net()
    module[3].weight.requires_grad_(False)
    groups = {g["name"]: g for g in parameter_groups(module, 0.1)}
    assert [p.ndim for p in groups["encoder"]["params"]] == [4]
    assert groups["encoder"]["weight_decay"] == 0.1
    assert len(groups["no_decay"]["params"]) == 4  # two of BatchNorm, two biases
    assert groups["no_decay"]["weight_decay"] == 0


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 0.4), ("sqrt", 0.2), ("none", 0.1)])
def test_learning_rate_is_stated_for_256_images(scaling, expected):
    assert recipe(lr=0.1, scaling=scaling).scaled_lr(1024) == pytest.approx(expected)


def rates(total, warmup_epochs, final=0.0):
    settings = {"lr": 1.0, "warmup_epochs": warmup_epochs, "final": final}
    built = recipe(**settings).build(net(), 256, total, steps_per_epoch=10)
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_schedule_warms_up_and_falls_by_a_cosine():
    seen = rates(total=200, warmup_epochs=1)
    assert seen[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    for i in (0, 60, 120, 189):
        assert seen[10 + i] == pytest.approx((1 + math.cos(math.pi * i / 190)) / 2, abs=1e-6)
    last = (1 + math.cos(math.pi * 99 / 100)) / 2
    assert rates(total=100, warmup_epochs=0, final=0.2)[-1] == pytest.approx(0.2 + 0.8 * last)


@pytest.mark.parametrize("total", [1, 2, 40])
def test_no_step_has_a_rate_of_0(total):
    seen = rates(total=total, warmup_epochs=5)
    assert len(seen) == total
    assert min(seen) > 0
    assert seen[0] == pytest.approx(1 / max(1, total // 10))


def test_a_short_run_warms_up_for_a_tenth():
    seen = rates(total=50, warmup_epochs=100)
    assert seen[4] == pytest.approx(1.0)


def test_a_prolonged_run_follows_the_longer_schedule():
    short = recipe(lr=1.0).build(net(), 256, 10, 10)
    for _ in range(10):
        short["optimizer"].step()
        short["lr_scheduler"]["scheduler"].step()
    long = recipe(lr=1.0).build(net(), 256, 100, 10)
    long["optimizer"].load_state_dict(short["optimizer"].state_dict())
    long["lr_scheduler"]["scheduler"].load_state_dict(
        short["lr_scheduler"]["scheduler"].state_dict()
    )
    for _ in range(40):
        long["optimizer"].step()
        long["lr_scheduler"]["scheduler"].step()
    assert long["optimizer"].param_groups[0]["lr"] == pytest.approx(0.5)  # step 50 of 100


@pytest.mark.parametrize(
    "settings", [{"lr": 0}, {"weight_decay": -1}, {"final": 2}, {"scaling": "cubic"}]
)
def test_settings_outside_their_range(settings):
    with pytest.raises(ConfigError):
        recipe(**settings)


def test_lars_leaves_biases_unscaled():
    module = nn.Linear(2, 2)
    optimizer = LARS(parameter_groups(module, 1e-4), lr=1.0)
    module.weight.grad, module.bias.grad = torch.ones(2, 2), torch.ones(2)
    before = module.bias.detach().clone(), module.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(module.bias, before[0] - 1)
    assert (module.weight - before[1]).abs().max() < 0.01  # trust coefficient 0.001


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {}])
def test_lars_makes_lightlys_steps_without_a_question_to_the_device(settings):
    weights = []
    for kind in (lars.LARS, LARS):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        nn.init.zeros_(module[1].weight)  # of norm 0, which is not scaled
        optimizer = kind(parameter_groups(module, 1e-2), lr=0.3, **settings)
        for step in range(3):
            for weight in module.parameters():
                weight.grad = torch.randn_like(weight) if step else torch.zeros_like(weight)
            optimizer.step()
        weights.append([w.detach() for w in module.parameters()])
    for theirs, ours in zip(*weights, strict=True):
        assert torch.equal(theirs, ours)
    told = pytest.raises(DataDependentOutputException)
    for kind, answer in ((lars.LARS, told), (LARS, nullcontext())):
        with FakeTensorMode(), answer:
            weight = nn.Parameter(torch.ones(3, 2))
            weight.grad = torch.ones(3, 2)
            kind([weight], lr=0.3, weight_decay=0.1).step()


def test_the_mixer_may_share_the_encoders_optimizer_without_decay():
    method = mixed_method("simclr", "samix")
    built = recipe(lr=0.4, scaling="none", weight_decay=0.1).build(
        method, 256, 100, 10, MixerOptimizer("encoder", 0.5)
    )
    groups = {group["name"]: group for group in built["optimizer"].param_groups}
    assert {name: group["initial_lr"] for name, group in groups.items()} == {
        "encoder": 0.4, "no_decay": 0.4, "mixer": 0.2,
    }  # fmt: skip
    assert groups["mixer"]["weight_decay"] == 0
    mixer = {id(p) for p in method.mixing.parameters()}
    assert {id(p) for p in groups["mixer"]["params"]} == mixer
    twin = {id(p) for p in method.twin.parameters()}
    assert not any(id(p) in twin for group in groups.values() for p in group["params"])


def test_an_old_run_with_lightlys_lars_goes_on_with_ours():
    installed = {"_target_": "ssl_samix.optim.LARS", "momentum": 0.9}
    saved = {"_target_": "lightly.utils.lars.LARS", "momentum": 0.8}
    assert merged(saved, installed) == {**installed, "momentum": 0.8}
