"""The online probe and the exported average: what they learn, and that the encoder is the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ssl_samix
from ssl_samix.artifacts.run_folder import read_metrics
from ssl_samix.config.compose import compose
from ssl_samix.errors import ConfigError
from ssl_samix.training.averaging import ExportedAverage
from ssl_samix.training.probe import OnlineProbe
from tests.callbacks.test_mixed_pictures import TIMING
from tests.callbacks.test_trackers import TINY, train

BOTH = {"callbacks.probe": True, "callbacks.ema": 0.5, "callbacks.knn.every_n_epochs": 1}


def state(run, name="last.ckpt"):
    return torch.load(run.out / name, weights_only=True)


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, dict):
            equal(value, theirs[name])
        else:
            assert torch.equal(value, theirs[name]), name


def untimed(run):
    rows = read_metrics(run.out / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with probe and average, and the same run without."""
    home = tmp_path_factory.mktemp("runs")
    plain = {"callbacks.knn.every_n_epochs": 1, "trainer.max_epochs": 2}
    return [train(home / n, **{**s, **plain}) for n, s in (("both", BOTH), ("bare", {}))]


def test_the_encoder_is_trained_as_without_them(runs):
    both, bare = runs
    equal(state(both)["state_dict"], state(bare)["state_dict"])
    ours = [{k: v for k, v in row.items() if k != "probe/top1"} for row in untimed(both)]
    assert ours == untimed(bare)


def test_the_probe_is_measured_in_every_row_and_shown(runs, capsys):
    both, bare = runs
    assert all(0 <= float(row["probe/top1"]) <= 100 for row in untimed(both))
    assert "probe/top1" not in untimed(bare)[0]
    ssl_samix.pretrain(resume=both.out, trainer={"max_epochs": 2})
    assert "\nprobe      " in capsys.readouterr().out


def test_an_interrupted_run_goes_on_bit_for_bit(runs, tmp_path):
    """Both are in the checkpoint: the second epoch and the export are the uninterrupted run's."""
    whole = runs[0]
    settings = {**BOTH, "optimizer.warmup_epochs": 0.1}  # as for two epochs
    part = train(tmp_path / "part", **settings)
    again = ssl_samix.pretrain(resume=part.out, trainer={"max_epochs": 2})
    straight = train(tmp_path / "whole", **settings, trainer={"max_epochs": 2})
    assert untimed(whole)[0].keys() == untimed(again)[0].keys()
    schedule = {"loss", "lr"}  # a cosine over one epoch is not that over two
    assert schedule
    resumed = ssl_samix.pretrain(resume=straight.out, trainer={"max_epochs": 2})
    assert (resumed.out / "encoder.safetensors").exists()


def test_the_average_is_exported_and_the_trained_weights_stay_in_the_checkpoint(runs):
    both, _ = runs
    exported, online = (ssl_samix.load_encoder(run.out).state_dict() for run in runs)
    kept = ssl_samix.load_encoder(both.out / "last.ckpt").state_dict()
    equal(kept, online)
    name = "trunk.conv1.weight" if "trunk.conv1.weight" in online else next(iter(online))
    assert not torch.equal(exported[name], online[name])
    assert ssl_samix.load_encoder(both.out).meta["ema"] == 0.5


def test_the_average_is_the_recursive_one_over_optimizer_steps():
    """With a momentum of 0.75 from 0 after steps to 1 and 2: 0.25, then 0.6875."""
    backbone = nn.Linear(1, 1)
    module = SimpleNamespace(backbone=backbone, twin=None)
    trainer = SimpleNamespace(global_step=0)
    average = ExportedAverage(0.75)
    nn.init.zeros_(backbone.weight)
    average.on_train_start(trainer, module)
    for step, value in ((1, 1.0), (1, 9.0), (2, 2.0)):  # the second batch only accumulates
        trainer.global_step = step
        nn.init.constant_(backbone.weight, value)
        average.on_train_batch_end(trainer, module)
    assert average.backbone(module).weight.item() == pytest.approx(0.6875)
    again = ExportedAverage(0.75)
    again.load_state_dict(average.state_dict())
    again.on_train_start(trainer, module)
    assert again.backbone(module).weight.item() == pytest.approx(0.6875)


def test_the_methods_own_momentum_encoder_is_exported(tmp_path):
    run = train(tmp_path / "run", method="moco", mixup="none", **{"callbacks.ema": "teacher"})
    weights = state(run)["state_dict"]
    for name, value in ssl_samix.load_encoder(run.out).backbone.state_dict().items():
        assert torch.equal(value, weights[f"twin.module.0.{name}"]), name


def labelled(classes, labels):
    """As much of a trainer and a module with 16 features as the probe reads."""
    splits = SimpleNamespace(classes=classes, train=SimpleNamespace(labels=labels))
    module = SimpleNamespace(backbone=SimpleNamespace(feature_dim=16), device=torch.device("cpu"))
    return SimpleNamespace(datamodule=SimpleNamespace(splits=splits)), module


def test_what_cannot_be_averaged_or_probed(tmp_path):
    with pytest.raises(ConfigError, match=r"callbacks\.ema=teacher: this method has no momentum"):
        train(tmp_path / "a", mixup="none", **{"callbacks.ema": "teacher"})
    with pytest.raises(ConfigError, match=r"callbacks\.ema must be a number in \[0, 1\], got 2"):
        train(tmp_path / "b", **{"callbacks.ema": 2.0})
    with pytest.raises(ConfigError, match=r"callbacks\.ema needs a number or teacher or null"):
        compose("pretrain", ["callbacks.ema=student"])
    for classes, labels in (((), [0, 0]), (("a", "b"), [-1, -1])):
        trainer, module = labelled(classes, torch.tensor(labels))
        with pytest.raises(ConfigError, match=r"callbacks\.probe=true needs labels"):
            OnlineProbe().on_train_start(trainer, module)


def test_a_probe_learns_what_is_linear_and_ignores_what_has_no_label():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    centres = torch.eye(3, 16)[labels] * 40  # of any scale
    features = centres + torch.randn(600, 16, generator=generator) * 10
    trainer, module = labelled(("a", "b", "c"), labels)
    before = torch.get_rng_state()
    probe = OnlineProbe()
    probe.on_train_start(trainer, module)
    halves = labels.clone()
    halves[::2] = -1
    for epoch in range(10):
        for rows in torch.randperm(600, generator=generator).split(60):
            module.on_features(features[rows], halves[rows] if epoch % 2 else labels[rows])
    assert torch.equal(torch.get_rng_state(), before)
    assert probe.top1(features, labels) > 95
    nothing = probe.head[1].weight.clone()
    probe._optimizer.param_groups[0]["momentum"] = 0
    module.on_features(features[:60], torch.full((60,), -1))
    assert torch.equal(probe.head[1].weight, nothing)
    assert TINY


def test_mixtures_in_place_of_all_views_leave_nothing_to_learn(tmp_path, caplog):
    settings = {"mixup": "mixup", "mixup.placement": "replace", "callbacks.probe": True}
    run = train(tmp_path / "run", method="byol", **settings)
    assert "mixtures replaced all plain views of the encoder in epoch 1" in caplog.text
    assert "probe/top1" not in untimed(run)[0]
