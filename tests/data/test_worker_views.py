"""Views drawn image by image with torchvision, beside those of a batch."""

import pickle
from dataclasses import fields, replace

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from ssl_samix.data.images import FileImages
from ssl_samix.data.sources import PathSource
from ssl_samix.data.views import (
    BatchedViews,
    SeparableBlur,
    ViewMaker,
    ViewSpec,
    WorkerCrops,
    WorkerViews,
    draw,
    normalize,
    recolour,
)
from ssl_samix.errors import ConfigError, DataError

SPEC = ViewSpec(
    crop_min=0.2,
    flip=0.3,
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.3,
    blur=0.5,
    solarize=0.4,
)


@pytest.fixture(autouse=True)
def one_thread():
    """As in a DataLoader worker; more threads than that only slow such small images down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(height=40, width=30):
    """Bright on the right, red at the bottom, textured."""
    across = torch.linspace(0, 200, width).expand(3, height, width).clone()
    across[0] += torch.linspace(0, 50, height).unsqueeze(1)
    across += 5 * (torch.arange(width) % 2)
    return across.to(torch.uint8)


def test_views_are_stacked_uint8_and_follow_the_seed():
    make = pickle.loads(pickle.dumps(WorkerViews((SPEC, SPEC), 24)))  # as workers get it
    torch.manual_seed(0)
    views = make(picture())
    assert views.shape == (2, 3, 24, 24)
    assert views.dtype == torch.uint8
    assert not torch.equal(views[0], views[1])
    torch.manual_seed(0)
    assert torch.equal(make(picture()), views)


def test_a_wrong_image_is_refused():
    make = WorkerViews((SPEC,), 24)
    for wrong in (picture().float(), picture()[:1], picture()[None]):
        with pytest.raises(DataError, match="uint8 image"):
            make(wrong)


def test_each_operation_alone_is_torchvisions():
    image = picture(24, 24)
    off = dict.fromkeys((field.name for field in fields(ViewSpec)), 0.0) | {"crop_min": 1.0}
    off |= {"crop_max": 1.0, "policy": "none"}
    only = {
        "grayscale": tv.rgb_to_grayscale(image, 3),
        "solarize": tv.solarize(image, 128),
        "flip": tv.horizontal_flip(image),
    }
    for name, expected in only.items():
        (view,) = WorkerViews((ViewSpec(**off | {name: 1.0}),), 24)(image)
        # Pillow rounds where torchvision cuts off.
        assert (view.int() - expected.int()).abs().max() <= 1, name
    (view,) = WorkerViews((ViewSpec(**off),), 24)(image)
    assert torch.equal(view, image)
    for settings in ({"blur": 1.0}, {"jitter": 1.0, "hue": 0.5}, {"jitter": 1.0, "contrast": 1}):
        make = WorkerViews((ViewSpec(**off | settings),) * 8, 24)
        # Any of eight, for a blur of 0.1 pixels changes nothing.
        assert not torch.equal(make(image), image.expand(8, -1, -1, -1)), settings


def test_the_blur_is_torchvisions():
    image = tv.to_pil_image(picture())
    for seed in range(5):
        torch.manual_seed(seed)
        blurred = tv.pil_to_tensor(SeparableBlur(7)(image))
        torch.manual_seed(seed)
        wanted = v2.GaussianBlur(7, (0.1, 2.0))(picture())
        assert (blurred.int() - wanted.int()).abs().max() <= 1


def test_statistics_agree_with_batched_views():
    torch.manual_seed(1)
    count, mean, std = 500, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    make = WorkerViews((SPEC,), 24)
    drawn = torch.cat([make(picture()) for _ in range(count)])
    theirs = normalize(drawn, torch.tensor(mean), torch.tensor(std))
    batch = picture().expand(count, -1, -1, -1)
    (ours,) = BatchedViews((SPEC,), 24, mean, std)(batch)
    assert theirs.is_contiguous(memory_format=torch.channels_last)
    for name, statistic in {
        "mean per channel": lambda x: x.mean((0, 2, 3)),
        "spread per channel": lambda x: x.std((0, 2, 3)),
        "spread inside a view": lambda x: x.std((1, 2, 3)).mean(),
        "left to right": lambda x: x.mean((0, 1, 2)),
        "edges": lambda x: x.diff(dim=3).abs().mean(),
    }.items():
        gap = (statistic(theirs) - statistic(ours)).abs().max()
        assert gap < 0.2, name


def test_crops_are_torchvisions_and_nothing_else():
    torch.manual_seed(2)
    crops = WorkerCrops((SPEC, SPEC), 24)(picture())
    torch.manual_seed(2)
    for crop in crops:
        box = v2.RandomResizedCrop.make_params(
            v2.RandomResizedCrop(24, scale=(0.2, 1.0)), [picture()]
        )
        wanted = tv.resized_crop(picture(), *box.values(), size=[24, 24], antialias=True)
        assert torch.equal(crop, wanted)


def test_crops_are_finished_with_the_whole_batch():
    crops = torch.stack([WorkerCrops((SPEC,), 24)(picture()) for _ in range(30)])
    make = BatchedViews((SPEC,), 24, (0.0,) * 3, (1.0,) * 3)
    torch.manual_seed(4)
    (views,) = make.finish(crops)
    torch.manual_seed(4)
    params = draw(SPEC, 30, 24, 24)
    assert params.flip.any()
    assert not params.flip.all()
    plain = crops[:, 0].float() / 255
    mirrored = torch.stack(
        [tv.horizontal_flip(c) if on else c for c, on in zip(plain, params.flip, strict=True)]
    )
    torch.testing.assert_close(views, recolour(mirrored, params))


@pytest.mark.parametrize("size", [24, 112])
def test_statistics_agree_wherever_views_are_made(size):
    torch.manual_seed(1)
    count, mean, std = 300, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    image = picture(2 * size, size)
    shown = {}
    for device in ("workers", "batched"):
        make = ViewMaker((SPEC,), size, mean, std, device)
        if make.per_image is None:
            pixels = tv.resize(image, [size, size], antialias=True).expand(count, -1, -1, -1)
        else:
            pixels = torch.stack([make.per_image(image) for _ in range(count)])
        (shown[device],) = make(pixels)
        assert shown[device].shape == (count, 3, size, size)
    for name, statistic in {
        "mean per channel": lambda x: x.mean((0, 2, 3)),
        "spread per channel": lambda x: x.std((0, 2, 3)),
        "left to right": lambda x: x.mean((0, 1, 2)),
    }.items():
        gap = (statistic(shown["workers"]) - statistic(shown["batched"])).abs().max()
        assert gap < 0.25, name


@pytest.mark.parametrize(
    ("device", "size", "gpu", "way"),
    [
        ("auto", 96, False, None),
        ("auto", 97, False, WorkerViews),
        ("auto", 97, True, WorkerCrops),
        ("workers", 24, True, WorkerViews),
        ("batched", 97, False, WorkerCrops),
    ],
)
def test_where_views_are_made(device, size, gpu, way, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    made = ViewMaker((SPEC,), size, (0.5,) * 3, (0.5,) * 3, device).per_image
    assert (None if made is None else type(made)) is way


def test_a_policy_is_not_batched():
    spec = replace(SPEC, policy="trivialaugment")
    with pytest.raises(ConfigError, match="image by image"):
        ViewMaker((spec,), 24, (0.5,) * 3, (0.5,) * 3, "batched")


def test_normalize_maps_0_and_255_to_the_ends():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    result = normalize(pixels, torch.full((3,), 0.5), torch.full((3,), 0.25))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result[:, 0, 0, 0], torch.tensor([-2.0, 2.0]))


def test_a_decoded_picture_is_cropped_without_a_copy(tmp_path, monkeypatch):
    tv.to_pil_image(picture()).save(tmp_path / "0.png")
    images = FileImages(PathSource([str(tmp_path / "0.png")]), torch.zeros(1).long(), 24)
    make, seen = WorkerViews((SPEC,), 24), []
    torch.manual_seed(0)
    expected = make(images.original(0))
    monkeypatch.setattr(tv, "to_pil_image", lambda *given: seen.append(given))
    monkeypatch.setattr("ssl_samix.data.images.to_tensor", lambda *given: seen.append(given))
    crops = WorkerCrops((SPEC,), 24)
    assert crops(images.picture(0)).shape == (1, 3, 24, 24)
    assert not seen
    monkeypatch.undo()
    torch.manual_seed(0)
    assert torch.equal(make(images.picture(0)), expected)
