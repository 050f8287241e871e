"""Pictures of mixtures: what is painted where, when they appear, and that they disturb nothing."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ssl_samix
from ssl_samix.config.compose import build, compose, groups
from ssl_samix.data.views import normalize
from ssl_samix.errors import ConfigError, UserError
from ssl_samix.models.backbone import Backbone
from ssl_samix.pictures import colours, greys, paint, write_png
from ssl_samix.training.mixed_pictures import (
    MixedPictures,
    fixed_images,
    paint_mixed,
    paired,
)
from ssl_samix.types import Mixed
from tests.conftest import METHODS

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
POLICIES = sorted(set(groups()["mixup"]) - {"none", "samix_p"})
TINY = {
    "mixup": "samix",
    "data.limit": 128,
    "data.batch_size": 64,
    "backbone.width": 8,
    "method.queue_size": 64,
    "trainer.max_epochs": 2,
    "trainer.accelerator": "cpu",
    "callbacks.knn.val_limit": 20,
    "callbacks.knn.every_n_epochs": 9,
}
TIMING = {"seconds", "cpu_seconds", "images_per_second", "data_wait", "knn/seconds"}


def normalised(pixels):
    return normalize(pixels, torch.tensor(MEAN), torch.tensor(STD))


def tile(picture, column, row, columns, rows, side):
    """Cut a tile out: tiles end 12 px before the right and lower border, 4 px apart."""
    x = picture.width - 12 - (columns - column) * (side + 4) + 4
    y = picture.height - 12 - (rows - row) * (side + 4) + 4
    return torch.from_numpy(np.array(picture.crop((x, y, x + side, y + side)))).permute(2, 0, 1)


def enlarged(pixels, factor):
    return pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


@pytest.fixture(scope="module")
def digits():
    config, _ = compose("pretrain", ["data.batch_size=32"])
    return build(config.data, views=build(config.views), seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = {**TINY, "callbacks.pictures.every_n_epochs": 1}
    return ssl_samix.pretrain("digits", "moco", tmp_path_factory.mktemp("run") / "run", **settings)


def test_pixels_come_back_from_their_normalised_form():
    pixels = torch.randint(256, (5, 3, 9, 9), dtype=torch.uint8)
    assert torch.equal(colours(normalised(pixels), MEAN, STD), pixels)
    masks = torch.tensor([0, 0.5, 1.0])[:, None, None, None]
    assert greys(masks).flatten().tolist() == [0, 128, 255]


def test_each_tile_is_where_its_column_says():
    own, other = torch.randint(256, (2, 2, 3, 16, 16), dtype=torch.uint8)
    mask = torch.zeros(2, 1, 16, 16)
    mask[1] = 1  # the first mixture is its image, the second its partner
    images = torch.stack([own[0], other[1]])
    mixed = Mixed(normalised(images), torch.arange(2), torch.tensor([0.9, 0.1]), mask)
    lam = torch.tensor([0.9, 0.1])
    picture = paint_mixed(normalised(own), normalised(other), mixed, lam, MEAN, STD)
    for row in range(2):
        shown = [tile(picture, column, row, 4, 2, 128) for column in range(4)]
        assert torch.equal(shown[0], enlarged(own[row], 8))
        assert torch.equal(shown[1], enlarged(other[row], 8))
        assert (shown[2] == 255 * row).all()
        assert torch.equal(shown[3], shown[row])


@pytest.mark.parametrize(
    ("size", "side"), [(8, 128), (16, 128), (24, 120), (28, 112), (32, 128), (96, 96), (224, 224)]
)
def test_small_images_are_enlarged_by_whole_factors(size, side):
    rows = [[torch.zeros(3, size, size, dtype=torch.uint8)] * 2] * 3
    picture = paint(("image", "lam 0.1\nmask"), rows)
    assert picture.size == (12 + 2 * side + 4 + 12, 12 + 2 * 18 + 3 * side + 2 * 4 + 12)


def test_the_ratios_are_written_beside_their_rows():
    rows = [[torch.zeros(1, 16, 16, dtype=torch.uint8)]] * 2
    bare, named = paint(["mask"], rows), paint(["mask"], rows, ["lam 0.10", ""])
    left = named.width - bare.width
    assert left > 30
    ink = np.array(named)[:, 12:left].min(axis=(1, 2)) < 100
    middle = named.height - 12 - 128 - 4 - 64
    assert ink[middle - 10 : middle + 10].any()
    assert not ink[middle + 64 :].any()


def test_a_picture_is_written_whole_and_its_folder_is_made(tmp_path):
    write_png(tmp_path / "new" / "a.png", Image.new("RGB", (3, 2)))
    assert Image.open(tmp_path / "new" / "a.png").size == (3, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_png(tmp_path / "file" / "a.png", Image.new("RGB", (3, 2)))
    with pytest.raises(UserError, match="cannot write"):
        write_png(tmp_path / "file" / "below" / "a.png", Image.new("RGB", (3, 2)))


@pytest.mark.parametrize("count", [2, 3, 8, 15, 16, 40])
def test_nobody_is_its_own_partner(count):
    own, other = paired(torch.arange(count), 8)
    assert len(own) == len(other) == min(8, count)
    assert (own != other).all()
    if count >= 16:
        assert not set(own.tolist()) & set(other.tolist())


def test_images_are_of_all_classes_and_always_the_same(digits):
    train = digits.splits.train
    first = fixed_images(train, 10)
    assert torch.equal(first, fixed_images(train, 10))
    assert not torch.equal(first, fixed_images(train, 10, seed=1))
    rows = (train.load(range(len(train)))[None] == first[:, None]).all(dim=(2, 3, 4))
    assert sorted(train.labels[row][0].item() for row in rows) == list(range(10))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_painted_and_nothing_is_disturbed(name, digits, tmp_path):
    config, _ = compose("pretrain", [f"mixup={name}"])
    backbone = Backbone("resnet18", image_size=16, width=4)
    method = METHODS["simclr"](backbone, mixing=build(config.mixup, backbone=backbone))
    before = {k: v.clone() for k, v in method.mixing.state_dict().items() if torch.is_tensor(v)}
    state = torch.get_rng_state()
    callback = MixedPictures(tmp_path)
    picture = callback.picture(method, digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in method.modules())
    for key, value in before.items():
        assert torch.equal(method.mixing.state_dict()[key], value)
    torch.rand(1)
    assert np.array_equal(picture, callback.picture(method, digits)), "the same one every time"
    first = fixed_images(digits.splits.train, 16)
    for row in range(8):
        assert torch.equal(tile(picture, 0, row, 4, 8, 128), enlarged(first[row], 8))
        assert torch.equal(tile(picture, 1, row, 4, 8, 128), enlarged(first[8 + row], 8))


def test_the_automatic_interval_gives_about_five_pictures(tmp_path):
    auto = MixedPictures(tmp_path)
    assert [auto.interval(epochs) for epochs in (1, 2, 5, 6, 30, 100)] == [1, 1, 1, 2, 6, 20]
    assert MixedPictures(tmp_path, 3).interval(100) == 3
    for settings in ({"every_n_epochs": 0}, {"every_n_epochs": "often"}, {"rows": 0}):
        with pytest.raises(ConfigError, match=r"callbacks\.pictures"):
            MixedPictures(tmp_path, **settings)


def test_a_run_leaves_a_picture_per_interval_and_shows_it_in_tensorboard(run):
    names = ["epoch-0001.png", "epoch-0002.png"]
    assert sorted(p.name for p in (run.out / "mixing").iterdir()) == names
    first, last = (np.array(Image.open(run.out / "mixing" / name)) for name in names)
    assert first.shape == last.shape
    board = EventAccumulator(str(run.out / "tensorboard")).Reload()
    shown = board.Images("mixing")
    assert [image.step for image in shown] == [2, 4]
    assert (shown[0].height, shown[0].width) == first.shape[:2]


def test_the_last_epoch_has_a_picture_and_pictures_change_nothing(run, tmp_path):
    settings = {**TINY, "callbacks.pictures.every_n_epochs": 5}
    rare = ssl_samix.pretrain("digits", "moco", tmp_path / "rare", **settings)
    assert [p.name for p in (rare.out / "mixing").iterdir()] == ["epoch-0002.png"]
    rows = []
    for folder in (run.out, rare.out):
        with (folder / "metrics.csv").open() as file:
            rows.append(
                [{k: v for k, v in r.items() if k not in TIMING} for r in csv.DictReader(file)]
            )
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    ours, theirs = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run.out, rare.out)
    )
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_without_mixing_there_is_nothing_to_show(trained, tmp_path):
    assert not (trained("moco none", tmp_path / "run") / "mixing").exists()
