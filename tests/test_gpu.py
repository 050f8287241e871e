"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from ssl_samix.config.compose import build, compose
from ssl_samix.data.views import BatchedViews
from ssl_samix.types import Batch
from tests.conftest import METHODS, mixed_method, samix_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def batch(device, count=16):
    generator = torch.Generator().manual_seed(1)
    views = (torch.randn(count, 3, 16, 16, generator=generator) for _ in range(2))
    rows = torch.arange(count, device=device)
    return Batch(tuple(view.to(device) for view in views), rows, rows)


def losses_of(method, data, steps=1):
    """Losses of the last of some steps, gradients included."""
    for step in range(steps):
        method.zero_grad()
        with method.memory.step():
            losses = method.mixing(method, data, step, 10).losses
        sum(losses.values()).backward()
        method.after_batch()
    return {name: float(loss) for name, loss in losses.items()}


@pytest.mark.parametrize("name", ["moco", "byol"])
def test_views_are_those_of_the_cpu(name):
    config, _ = compose("pretrain", [f"method={name}"])
    specs = build(config.views).specs(64)
    images = torch.randint(0, 256, (50, 3, 64, 64), dtype=torch.uint8)
    given = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        given[device] = BatchedViews(specs, 64, (0.5,) * 3, (0.25,) * 3).to(device)(
            images.to(device)
        )
    for wanted, got in zip(given["cpu"], given["cuda"], strict=True):
        # A value at the edge of solarizing or of a hue's sixth may fall on the other side.
        far = (got.cpu() - wanted).abs() > 1e-3
        assert far.float().mean() < 1e-3


def test_views_and_step_never_wait():
    """CUDA itself says when the host waits for the device."""
    config, _ = compose("pretrain", ["method=moco"])
    make = BatchedViews(build(config.views).specs(16), 16, (0.5,) * 3, (0.25,) * 3).cuda()
    method = mixed_method("moco", "samix", update_every=1).cuda()
    pixels = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, device="cuda")
    rows = torch.arange(16, device="cuda")

    def step():
        with method.memory.step():
            losses = method.mixing(method, Batch(make(pixels), rows, rows), 0, 10).losses
        sum(losses.values()).backward()
        method.twin.update(method.embedder, 0.99)
        method.after_batch()

    step()  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_bfloat16_is_near_float32(name):
    results = []
    for mixed in (False, True):
        torch.manual_seed(0)
        method = mixed_method(name, "samix", update_every=1).cuda()
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            results.append(losses_of(method, batch("cuda")))
    full, half = results
    for term, loss in full.items():
        assert half[term] == pytest.approx(loss, rel=3e-2, abs=3e-2), term


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_passes_and_recorded_graphs_give_the_same_losses(mode):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        method = mixed_method("moco", "samix", update_every=1).cuda()
        if compiled:
            method.compile_passes(mode=mode)
        torch.manual_seed(1)
        results.append(losses_of(method, batch("cuda"), steps=4))
    for term, loss in results[0].items():
        assert results[1][term] == pytest.approx(loss, rel=1e-2, abs=1e-3), term


@pytest.mark.parametrize("compiled", ["false", "auto"])
def test_the_command_trains_and_is_resumed(compiled, tmp_path):
    words = ["data.limit=256", "data.batch_size=64", "backbone.width=16", "out=run"]
    first = samix_here(
        "pretrain", *words, "trainer.max_epochs=1", f"trainer.compile={compiled}", cwd=tmp_path
    )
    assert "cuda" in first
    samix_here("pretrain", "resume=run", "trainer.max_epochs=2", cwd=tmp_path)
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 3
