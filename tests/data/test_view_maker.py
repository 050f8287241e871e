"""Supervised views: shifts, policies, erasing; on the device or image by image."""

from __future__ import annotations

import pytest
import torch

from ssl_samix.config.compose import compose, groups
from ssl_samix.data.folder import empty_classes
from ssl_samix.data.view_spec import OneView
from ssl_samix.data.views import ViewMaker, WorkerCrops, WorkerViews, _erased
from ssl_samix.errors import ConfigError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def pictures(count, size=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def maker(name, size=16, **changes):
    settings = compose("supervised", [f"augment={name}"])[0].augment
    return ViewMaker(OneView(**{**settings, **changes}).specs(size), size, MEAN, STD)


def shown(view):
    """Undo the normalisation: uint8 (B, 3, S, S)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (view * std + mean).mul(255).round().to(torch.uint8)


def one_by_one(make, images):
    return make(torch.stack([make.per_image(image) for image in images]))


@pytest.mark.parametrize("way", ["batched", "per image"])
def test_shifts_are_pieces_of_the_mirrored_image(way):
    images, make = pictures(40), maker("shift_flip", flip=0.0)
    assert make.per_image is None
    if way == "per image":
        make = maker("shift_flip", flip=0.0, policy="randaugment", operations=0)
        (views,) = one_by_one(make, images)
    else:
        (views,) = make(images)
    padded = torch.nn.functional.pad(images.float(), [2] * 4, mode="reflect").to(torch.uint8)
    seen = set()
    for image, view in zip(padded, shown(views), strict=True):
        places = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(image[:, top : top + 16, left : left + 16], view)
        ]
        assert len(places) == 1, "a shift by whole pixels, and nothing else"
        seen.add(places[0])
    assert len(seen) > 10
    assert {top for top, _ in seen} == {left for _, left in seen} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", ["randaugment", "trivialaugment"])
def test_a_policy_draws_for_every_image(name):
    make = maker(name, crop_min=1.0, flip=0.0, erasing=0.0, pad=0.001)
    same = pictures(1).expand(24, -1, -1, -1)
    views = shown(one_by_one(make, same)[0])
    assert len({view.numpy().tobytes() for view in views}) > 12


def test_erasing_draws_for_every_image_and_leaves_others_alone():
    images = pictures(200)
    (plain,) = maker("shift_flip", pad=0.0, crop_min=1.0, flip=0.0)(images)
    torch.manual_seed(0)
    (views,) = maker("shift_flip", pad=0.0, crop_min=1.0, flip=0.0, erasing=0.25)(images)
    torch.manual_seed(0)
    (again,) = maker("shift_flip", pad=0.0, crop_min=1.0, flip=0.0, erasing=0.0)(images)
    changed = (views != again).flatten(1).any(dim=1)
    assert 30 < changed.sum() < 70  # a quarter of 200, three standard deviations
    assert plain.shape == views.shape
    areas = (views != again).any(dim=1).flatten(1).float().mean(dim=1)[changed]
    assert areas.min() > 0.01
    assert areas.max() < 0.4
    assert len(areas.unique()) > 10
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_erasing_is_torchvisions_of_each_image():
    images = pictures(60)
    make = maker("shift_flip", pad=0.0, crop_min=1.0, flip=0.0, erasing=0.5)
    (plain,) = maker("shift_flip", pad=0.0, crop_min=1.0, flip=0.0, erasing=0.0)(images)
    torch.manual_seed(5)
    theirs = torch.stack([make._erasing[0](view) for view in plain])
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(_erased(plain.clone(), make._erasing[0]), theirs)
    assert torch.equal(torch.rand(1), drawn), "as many random numbers"


def test_mean_and_deviation_are_copied_to_the_device_once():
    make = maker("randaugment", erasing=0.0)
    pixels = torch.empty(4, 1, 3, 16, 16, dtype=torch.uint8, device="meta")
    make(pixels)
    kept = make._mean
    assert kept.is_meta
    make(pixels)
    assert make._mean is kept


def test_a_run_on_the_cpu_does_not_use_the_gpu_of_its_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    specs = OneView(**compose("supervised", [])[0].augment).specs(224)
    for accelerator, kind in (("cpu", WorkerViews), ("auto", WorkerCrops), ("gpu", WorkerCrops)):
        make = ViewMaker(specs, 224, MEAN, STD, accelerator=accelerator)
        assert type(make.per_image) is kind


def test_the_files_say_what_they_are_called():
    policies = {n: compose("supervised", [f"augment={n}"])[0].augment for n in groups()["augment"]}
    assert policies["randaugment"].policy == "randaugment"
    assert policies["trivialaugment"].policy == "trivialaugment"
    assert policies["shift_flip"].pad == 0.125
    for name in ("crop_flip", "shift_flip"):
        assert policies[name].policy == "none"


def test_wrong_settings_are_told():
    settings = dict(compose("supervised", [])[0].augment)
    with pytest.raises(ConfigError, match="did you mean 'trivialaugment'"):
        OneView(**{**settings, "policy": "trivialaugmnt"})
    with pytest.raises(ConfigError, match="magnitude must be a number"):
        OneView(**{**settings, "magnitude": 31})
    with pytest.raises(ConfigError, match="did you mean 'erasing'"):
        OneView(**{**settings, "erasin": 0.1})


def test_folders_without_an_image_are_found(tmp_path):
    for name in ("train/full/deep", "train/empty", "train/text", "val/full"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train" / "full" / "deep" / "a.png").touch()
    (tmp_path / "train" / "text" / "a.txt").touch()
    assert empty_classes(tmp_path) == ["empty", "text"]
    assert empty_classes(tmp_path / "train") == ["empty", "text"]
