"""A run folder of an earlier version (November 2026, before the Mixer had an optimizer of its own).

``old_run`` is the first of two epochs of ``samix pretrain data.limit=64 data.batch_size=32
method=simclr backbone.name=resnet10 backbone.width=4 trainer.precision=32-true
mixup.update_every=1``, ``expected.safetensors`` what that version computed from its files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ssl_samix
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.training.logging import read_metrics

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def images():
    waves = torch.linspace(-2, 2, 4 * 3 * 16 * 16).view(4, 3, 16, 16).sin()
    return waves + torch.linspace(0, 1, 16)


@pytest.mark.parametrize("name", ["mixer.safetensors", "last.ckpt"])
def test_an_old_mixer_draws_its_masks(name, images):
    mixer = ssl_samix.load_mixer(OLD / name)
    lam, partner = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([1, 2, 3, 0])
    masks = mixer(images, lam=lam, partner=partner).mask[..., ::3, ::3]
    expected = load_file(OLD / "expected.safetensors")["mask"]
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder.safetensors", "last.ckpt"])
def test_an_old_encoder_gives_its_features(name, images):
    encoder = ssl_samix.load_encoder(OLD / name)
    with torch.no_grad():
        features = encoder(images)
    expected = load_file(OLD / "expected.safetensors")["features"]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_an_old_run_goes_on_as_it_would_have_gone_on(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "run")
    run = ssl_samix.pretrain(resume=folder, trainer={"max_epochs": 2})
    _, row = read_metrics(run.out / "metrics.csv")
    # what the earlier version measured in its second epoch
    expected = {"loss": 7.358764172, "loss/mixer": 2.901742935, "mixer/mask_std": 0.007923557423}
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-3), name


def test_an_old_run_keeps_its_settings():
    config, choices = RunFolder(OLD).load_config()
    assert choices["mixup"] == "samix"
    assert config.mixup.mask == "paper"
    assert config.mixup.lr == 1.0
    assert "optimizer" not in config.mixup
