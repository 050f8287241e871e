"""The Mixer's own optimizer: beside the encoder's, as if they were one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ssl_samix.errors import ConfigError
from ssl_samix.optim import JointOptimizer, MixerOptimizer, OptimizerRecipe
from tests.conftest import mixed_method, recipe


class Pair(nn.Module):
    """What is optimised: an encoder and a mixer of three weights each."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 1, bias=False)
        self.mixing = nn.Linear(3, 1, bias=False)

    def loss(self, step):
        inputs = torch.sin(torch.arange(6.0).view(2, 3) + step)
        return (self.encoder(inputs) ** 2 + (self.mixing(inputs) - 1) ** 2).sum()


def joint(pair):
    settings = recipe(lr=0.1, scaling="none", weight_decay=0.1, warmup_epochs=1)
    return settings.build(pair, 256, 40, 4, MixerOptimizer("adamw", 0.02))


def steps(pair, built, numbers):
    for step in numbers:
        built["optimizer"].zero_grad()
        pair.loss(step).backward()
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()


def test_each_part_moves_as_it_does_alone():
    pair, alone = Pair(), Pair()
    alone.load_state_dict(pair.state_dict())
    steps(pair, joint(pair), range(12))
    settings = recipe(lr=0.1, scaling="none", weight_decay=0.1, warmup_epochs=1)
    encoder = settings.build(nn.ModuleDict({"encoder": alone.encoder}), 256, 40, 4)
    adam = torch.optim.AdamW(alone.mixing.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(12):
        done = math.cos(math.pi * step / 40)  # a cosine over 40 steps, from the first one on
        adam.param_groups[0]["lr"] = 0.02 * (0.01 + 0.99 * 0.5 * (1 + done))
        for optimizer in (encoder["optimizer"], adam):
            optimizer.zero_grad()
        alone.loss(step).backward()
        for optimizer in (encoder["optimizer"], adam):
            optimizer.step()
        encoder["lr_scheduler"]["scheduler"].step()
    torch.testing.assert_close(pair.encoder.weight, alone.encoder.weight)
    torch.testing.assert_close(pair.mixing.weight, alone.mixing.weight, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    pair, other = Pair(), Pair()
    built = joint(pair)
    steps(pair, built, range(10))
    torch.save(
        {
            "net": pair.state_dict(),
            "optimizer": built["optimizer"].state_dict(),
            "schedule": built["lr_scheduler"]["scheduler"].state_dict(),
        },
        tmp_path / "x.ckpt",
    )
    steps(pair, built, range(10, 20))
    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)
    again = joint(other)
    other.load_state_dict(kept["net"])
    again["optimizer"].load_state_dict(kept["optimizer"])
    again["lr_scheduler"]["scheduler"].load_state_dict(kept["schedule"])
    steps(other, again, range(10, 20))
    assert torch.equal(pair.mixing.weight, other.mixing.weight)
    assert torch.equal(pair.encoder.weight, other.encoder.weight)


def test_a_mixer_that_rests_does_not_move():
    pair = Pair()
    built = joint(pair)
    steps(pair, built, range(3))
    before = pair.mixing.weight.detach().clone()
    built["optimizer"].zero_grad()
    pair.loss(3).backward()
    pair.mixing.weight.grad = None
    built["optimizer"].step()
    assert torch.equal(pair.mixing.weight, before)


def test_the_closure_is_called_once_and_its_loss_returned():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    both = JointOptimizer([torch.optim.SGD([w], lr=0.5) for w in weights])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = weights[0] + 2 * weights[1]
        loss.backward()
        return loss

    with torch.no_grad():
        assert both.step(closure).item() == 3.0
    assert calls == [True]
    assert [w.item() for w in weights] == [0.5, 0.0]


def test_a_gradient_scaler_sees_one_optimizer():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    both = JointOptimizer([torch.optim.SGD([w], lr=0.5, fused=True) for w in weights])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((weights[0] + 2 * weights[1]).sum()).backward()
    scaler.step(both)
    scaler.update()
    assert [w.item() for w in weights] == [0.5, 0.0]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_mixers_groups_are_its_own(name):
    method = mixed_method("simclr", "samix", optimizer=name, lr=0.03)
    settings = OptimizerRecipe(torch.optim.SGD, lr=0.4, scaling="none", warmup_epochs=5)
    built = settings.build(method, 256, 100, 10, method.mixing.optimizer)
    groups = {group["name"]: group for group in built["optimizer"].param_groups}
    rates = {key: group["lr"] for key, group in groups.items()}
    assert rates["mixer"] == 0.03  # no share in the encoder's warm-up
    assert rates["encoder"] == rates["no_decay"] < 0.1
    assert groups["mixer"]["weight_decay"] == 0
    mixer = {id(p) for p in method.mixing.parameters()}
    assert {id(p) for p in groups["mixer"]["params"]} == mixer


def test_an_unknown_optimizer_and_a_rate_that_is_not_positive_are_refused():
    with pytest.raises(ConfigError, match=r"unknown mixup\.optimizer 'adagrad'"):
        MixerOptimizer("adagrad")
    with pytest.raises(ConfigError, match=r"mixup\.lr must be a number at least"):
        MixerOptimizer("adamw", -0.1)
