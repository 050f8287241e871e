"""Views drawn image by image with torchvision, beside those of a batch."""

import pickle
from dataclasses import fields

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from ssl_samix.data.views import BatchedViews, ViewSpec
from ssl_samix.data.worker_views import WorkerViews, normalize
from ssl_samix.errors import DataError

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
        assert torch.equal(view, expected), name
    (view,) = WorkerViews((ViewSpec(**off),), 24)(image)
    assert torch.equal(view, image)
    for settings in ({"blur": 1.0}, {"jitter": 1.0, "hue": 0.5}, {"jitter": 1.0, "contrast": 1}):
        make = WorkerViews((ViewSpec(**off | settings),) * 8, 24)
        # Any of eight, for a blur of 0.1 pixels changes nothing.
        assert not torch.equal(make(image), image.expand(8, -1, -1, -1)), settings


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


def test_normalize_maps_0_and_255_to_the_ends():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    result = normalize(pixels, torch.full((3,), 0.5), torch.full((3,), 0.25))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result[:, 0, 0, 0], torch.tensor([-2.0, 2.0]))
