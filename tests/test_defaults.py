"""What ``auto`` becomes, and that runs of few images learn."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ssl_samix
from ssl_samix.artifacts.run_folder import RunFolder, read_metrics
from ssl_samix.config.compose import build, compose
from ssl_samix.data.datamodule import auto_batch_size
from ssl_samix.errors import ConfigError, UserError
from ssl_samix.evaluation.training import FewLabels
from ssl_samix.training.defaults import resolve_auto
from ssl_samix.training.monitors import KNNMonitor

SMALL = {"backbone.width": 4, "trainer.accelerator": "cpu", "trainer.precision": "32-true"}


@pytest.mark.parametrize(
    ("images", "batch"),
    [(5, 5), (60, 8), (300, 32), (500, 32), (1438, 128), (2000, 128), (10_000, 256), (10**6, 256)],
)
def test_a_batch_is_a_power_of_two_and_at_most_an_eighth(images, batch):
    assert auto_batch_size(images) == batch


@pytest.mark.parametrize(
    ("images", "epochs", "queue"),
    [(60, 200, 16), (500, 200, 128), (2000, 50, 512), (10_000, 20, 4096), (10**6, 20, 65536)],
)
def test_auto_follows_the_images(images, epochs, queue):
    config, choices = compose("pretrain", ["method=moco"])
    found = resolve_auto(config, choices, images, {"data.batch_size": auto_batch_size(images)})
    assert config.trainer.max_epochs == found["trainer.max_epochs"] == epochs
    assert config.method.queue_size == queue
    assert config.optimizer.warmup_epochs == pytest.approx(epochs / 20)
    assert config.optimizer.lr == 0.25


@pytest.mark.parametrize("method", ["swav", "dino"])
def test_a_method_without_a_good_rate_wants_one(method):
    config, choices = compose("pretrain", [f"method={method}"])
    with pytest.raises(
        ConfigError, match=rf"for method={method}: set optimizer\.lr, 0\.5 to start"
    ):
        resolve_auto(config, choices, 1000, {})
    config, choices = compose("pretrain", [f"method={method}", "optimizer.lr=0.3"])
    assert "optimizer.lr" not in resolve_auto(config, choices, 1000, {})


def test_what_is_typed_wins():
    words = ["method=simclr", "optimizer.lr=0.01", "trainer.max_epochs=3", "data.batch_size=10"]
    config, choices = compose("pretrain", words)
    found = resolve_auto(config, choices, 1000, {"data.batch_size": 64})
    assert found == {"optimizer.warmup_epochs": pytest.approx(0.15), "mixup.size": 1}
    assert (config.optimizer.lr, config.trainer.max_epochs, config.data.batch_size) == (0.01, 3, 10)


@pytest.mark.parametrize(
    ("command", "words", "size"),
    [
        ("pretrain", ["data=folder"], 0.67),
        ("pretrain", ["data=cifar10", "mixup=mixup"], 0.67),
        ("pretrain", ["data=digits"], 1),  # 16 px
        ("pretrain", ["data=cifar10", "mixup=mixup", "mixup.placement=replace"], 1),
        ("pretrain", ["data=cifar10", "backbone=vit_tiny"], 1),  # has positions for one size
        ("pretrain", ["mixup.size=0.5"], None),
        ("pretrain", ["data=cifar10", "mixup=samix_paper"], None),  # whole, as published
        ("pretrain", ["mixup=none"], None),
        ("supervised", ["data=cifar10"], 1),
    ],
)
def test_mixtures_beside_the_views_of_a_resnet_are_smaller(command, words, size):
    config, choices = compose(command, words)
    assert resolve_auto(config, choices, 1000, {}).get("mixup.size") == size


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """500 images of 16 px: a bright square at one of many places on noise."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(500):
        pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
        row, column = rng.integers(0, 11, 2)
        pixels[row : row + 5, column : column + 5] = rng.integers(120, 255, 3)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def test_one_epoch_of_500_images_moves_every_weight(photos, tmp_path):
    settings = {**SMALL, "trainer.max_epochs": 1}
    run = ssl_samix.pretrain(photos, method="simclr", out=tmp_path / "run", **settings)
    last = torch.load(run.out / "last.ckpt", weights_only=True)
    assert last["global_step"] == 15  # of 32 images
    scales = [v for n, v in last["state_dict"].items() if n.startswith("backbone") and "bn" in n]
    scales = [v for v in scales if v.ndim == 1 and v.is_floating_point()]
    assert len(scales) > 10
    assert not any(torch.equal(scale, torch.ones_like(scale)) for scale in scales)


def test_the_loss_of_500_images_falls(photos, tmp_path):
    settings = {**SMALL, "trainer.max_epochs": 5, "mixup": "none"}
    run = ssl_samix.pretrain(photos, method="simclr", out=tmp_path / "run", **settings)
    losses = [float(row["loss"]) for row in read_metrics(run.out / "metrics.csv")]
    assert losses[-1] < losses[0] - 0.1


def test_what_was_automatic_is_written_and_goes_on(photos, tmp_path):
    out = tmp_path / "run"
    settings = {**SMALL, "trainer.max_epochs": 1, "mixup": "none"}
    ssl_samix.pretrain(photos, method="simclr", out=out, **settings)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["auto"]["data.batch_size"] == saved["data"]["batch_size"] == 32
    assert saved["optimizer"]["lr"] == 0.5
    longer = ssl_samix.pretrain(
        photos, method="simclr", out=out, **settings | {"trainer.max_epochs": 2}
    )
    assert len(read_metrics(longer.out / "metrics.csv")) == 2
    assert RunFolder(out).automatic()["data.batch_size"] == 32
    with pytest.raises(UserError, match=r"data\.batch_size is 32 there, 16 here"):
        ssl_samix.pretrain(
            photos, method="simclr", out=out,
            **settings | {"trainer.max_epochs": 2, "data.batch_size": 16},
        )  # fmt: skip


def test_pretraining_starts_from_an_encoder(photos, tmp_path):
    settings = {**SMALL, "trainer.max_epochs": 1, "mixup": "none"}
    first = ssl_samix.pretrain(photos, method="simclr", out=tmp_path / "first", **settings)
    frozen = settings | {"optimizer.lr": 1e-12, "optimizer.weight_decay": 0.0}
    again = ssl_samix.pretrain(
        photos, method="moco", out=tmp_path / "again", init=first.out, seed=1, **frozen
    )
    before = first.encoder.backbone.trunk.conv1.weight
    torch.testing.assert_close(again.encoder.backbone.trunk.conv1.weight, before)
    with pytest.raises(
        ConfigError, match=r"of width 4 .* this run has .* width 8 .*: choose the same"
    ):
        ssl_samix.pretrain(
            photos, out=tmp_path / "other", init=first.out, **settings | {"backbone.width": 8}
        )


def test_published_weights_are_of_the_published_network(photos, tmp_path):
    with pytest.raises(ConfigError, match="no published weights are known for 'resnet10'"):
        ssl_samix.pretrain(
            photos, out=tmp_path / "run", init="pretrained", **{"backbone.name": "resnet10"}
        )
    assert not (tmp_path / "run").exists()


class Images:
    """So many images."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.mark.parametrize(
    ("size", "jitter", "crop"), [(32, (0.4, 0.1), 0.2), (64, (0.8, 0.2), 0.08)]
)
def test_jitter_and_crops_follow_the_image_size(size, jitter, crop):
    for spec in build(compose("pretrain", [])[0].views).specs(size, True, "auto"):
        assert (spec.brightness, spec.hue) == jitter
        assert spec.crop_min == crop
    typed = compose("pretrain", ["views.a.brightness=0.7"])[0].views
    assert build(typed).specs(size)[0].brightness == 0.7


@pytest.mark.parametrize(
    ("epochs", "limit", "before"), [(100, 1000, False), (200, 2300, True), (1000, 5000, True)]
)
def test_a_measurement_costs_one_percent_of_the_run(epochs, limit, before):
    """An epoch makes 4 passes of 400 images; a measurement 900, and those of validation images."""
    train, val = Images(400), Images(5000)
    data = SimpleNamespace(splits=SimpleNamespace(train=train, bank=train, val=val))
    monitor = KNNMonitor(val_limit="auto")
    monitor._worth = lambda *_: {"untrained/rankme": 1.0}
    trainer = SimpleNamespace(
        datamodule=data, max_epochs=epochs, global_step=0, is_global_zero=True,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )  # fmt: skip
    monitor.on_train_start(trainer, None)
    assert monitor.val_limit == limit
    assert bool(monitor.before) == before


def test_few_images_that_choose_a_learning_rate_are_counted(caplog):
    labels = torch.arange(200) % 2
    task = SimpleNamespace(
        labelled=[SimpleNamespace(labels=labels)], splits=SimpleNamespace(classes=("a", "b"))
    )
    few = FewLabels(task, torch.arange(200), None, 0.1, 0)
    kept, held = few.split()
    assert (len(kept), len(held)) == (180, 20)
    assert "20 labelled images choose the learning rate: one right or wrong is 5.0" in caplog.text
