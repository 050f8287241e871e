"""Compiled passes give the numbers of plain ones; what cannot be compiled runs as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_samix import trainer as compiling
from ssl_samix.errors import ConfigError
from ssl_samix.mixup.mixer import MixBlock
from ssl_samix.models.backbone import Backbone
from ssl_samix.trainer import compile_if_wanted
from ssl_samix.types import Batch
from tests.conftest import METHODS, MIXINGS, mixed_method

CPU = torch.device("cpu")


def steps(method, count=2):
    """Losses of some steps, and the state after them.

    In double precision: in single, a rounding that puts one activation on the other side of a ReLU
    changes gradients of so small a batch by a percent.
    """
    method.double()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(method.parameters(), 0.01)
    losses = []
    for step in range(count):
        views = tuple(torch.randn(8, 3, 16, 16, generator=generator).double() for _ in range(2))
        torch.manual_seed(step)
        with method.memory.step():
            terms = method.mixing(method, Batch(views, torch.zeros(8), torch.arange(8)), step, 9)
        losses.append({name: loss.detach() for name, loss in terms.losses.items()})
        optimizer.zero_grad()
        sum(terms.losses.values()).backward()
        optimizer.step()
        method.twin.update(method.embedder, 0.9)
        method.after_batch()
    return losses, method.state_dict()


def test_compiled_passes_give_the_same_losses_and_weights():
    """The graphs as torch traces them, without the code that a compiler makes of them."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        method = mixed_method("moco", "samix", update_every=1)
        if compiled:
            method.compile_passes(backend="aot_eager")
        runs.append(steps(method))
    (losses, state), (same_losses, same_state) = runs
    for wanted, got in zip(losses, same_losses, strict=True):
        for term, loss in wanted.items():
            torch.testing.assert_close(got[term], loss, rtol=1e-9, atol=1e-12)
    assert state.keys() == same_state.keys(), "checkpoints do not tell whether a run was compiled"
    for key, tensor in state.items():
        torch.testing.assert_close(same_state[key], tensor, rtol=1e-9, atol=1e-12)


def test_the_compilers_code_gives_the_plain_mask_and_gradient():
    block = MixBlock(16)
    maps = [torch.randn(6, 16, 4, 4) for _ in range(2)]
    lam = torch.rand(6)
    results = []
    for compiled in (False, True):
        if compiled:
            if compiling._obstacle(block, CPU) is not None:
                pytest.skip("no compiler on this machine")
            block.compile(dynamic=False)
        block.zero_grad()
        mask = block(*maps, lam, 16)
        (mask * torch.linspace(0, 1, 16)).sum().backward()
        results.append((mask.detach(), {n: p.grad.clone() for n, p in block.named_parameters()}))
    (mask, slopes), (same_mask, same_slopes) = results
    torch.testing.assert_close(same_mask, mask, rtol=1e-5, atol=1e-5)
    for key, slope in slopes.items():
        torch.testing.assert_close(same_slopes[key], slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["moco", "simclr"])
def test_checkpointing_gives_the_same_losses_and_weights(name):
    """The frozen pass is recomputed when its modules are back in training mode."""
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        method = mixed_method(name, "samix", update_every=1)
        for part in method.modules():
            if hasattr(part, "checkpointing"):
                part.checkpointing = checkpointing
        runs.append(steps(method))
    (losses, state), (same_losses, same_state) = runs
    for wanted, got in zip(losses, same_losses, strict=True):
        for term, loss in wanted.items():
            torch.testing.assert_close(got[term], loss, rtol=1e-9, atol=1e-12)
    for key, tensor in state.items():
        torch.testing.assert_close(same_state[key], tensor, rtol=1e-9, atol=1e-12)


def test_a_checkpointed_transformer_learns_beside_a_frozen_pass():
    options = {"drop_path_rate": 0.5}  # active in training alone
    backbone = Backbone("test_vit", image_size=160, options=options, checkpointing=True)
    method = METHODS["simclr"](backbone, mixing=MIXINGS["samix"](backbone, update_every=1))
    views = tuple(torch.randn(4, 3, 160, 160) for _ in range(2))
    with method.memory.step():
        batch = Batch(views, torch.zeros(4), torch.arange(4))
        losses = method.mixing(method, batch, 0, 9).losses
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    assert method.mixing.policy.block.gamma.grad is not None


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.modes = []

    def compile_passes(self, mode=None):
        self.modes.append(mode)


@pytest.mark.parametrize(
    ("setting", "device", "modes"),
    [
        (False, "cpu", []),
        ("auto", "cpu", []),
        (True, "cpu", [None]),
        ("auto", "cuda", [None]),
        ("reduce-overhead", "cuda", ["reduce-overhead"]),
    ],
)
def test_who_is_compiled(setting, device, modes, monkeypatch):
    monkeypatch.setattr(compiling, "_obstacle", lambda module, device: None)
    method = Recorder()
    assert compile_if_wanted(method, setting, torch.device(device)) == bool(modes)
    assert method.modes == modes


def test_without_a_compiler_the_run_goes_on_and_says_so_once(monkeypatch, caplog):
    def fails(*args, **options):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", fails)
    method = Recorder()
    assert not compile_if_wanted(method, True, CPU)
    assert method.modes == []
    assert len(caplog.messages) == 1
    assert "No working C++ compiler found" in caplog.text
    assert "more" not in caplog.text.replace("InvalidCxx", "")


@pytest.mark.parametrize(
    ("backbone", "reason"), [({"width": 4}, "narrow"), ({"checkpointing": True}, "checkpointing")]
)
def test_networks_that_stay_as_they_are(backbone, reason, caplog):
    method = METHODS["simclr"](Backbone("resnet18", image_size=16, **{"width": 16, **backbone}))
    assert not compile_if_wanted(method, True, CPU)
    assert reason in caplog.text


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ConfigError, match="auto"):
        compile_if_wanted(Recorder(), "aut", CPU)
