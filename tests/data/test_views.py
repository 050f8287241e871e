"""Recipes, what is drawn from them, and the views of a batch."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from ssl_samix.data import transforms
from ssl_samix.data import views as views_module
from ssl_samix.data.views import BatchedViews, ViewParams, Views, ViewSpec, apply, draw, scaled
from ssl_samix.errors import ConfigError, DataError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "views"
SETTINGS = {
    "crop_min": 0.08,
    "jitter": 0.8,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
    "grayscale": 0.2,
    "blur": 0.5,
    "solarize": 0.2,
}
SPEC = ViewSpec(**SETTINGS)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def pixels(count=8, height=20, width=24):
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def row(params, i):
    values = {f.name: getattr(params, f.name) for f in fields(params)}
    return ViewParams(**{k: v if k == "border" else v[i : i + 1] for k, v in values.items()})


def one_by_one(image, params, size):
    """The same view by torchvision alone; ``params`` of one sample."""
    box = [int(getattr(params, name)) for name in ("top", "left", "height", "width")]
    view = tv.resized_crop(image, *box, size=[size, size], antialias=True)
    if params.flip:
        view = tv.horizontal_flip(view)
    adjust = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    for operation in params.order[0].tolist() if params.jitter else []:
        view = adjust[operation](view, params.factors[0, operation].item())
    if params.grayscale:
        view = tv.rgb_to_grayscale(view, 3)
    if params.blur:
        kernel = transforms.blur_kernel_size(size)
        view = tv.gaussian_blur(view, [kernel] * 2, [params.sigma.item()] * 2)
    return tv.solarize(view, 0.5) if params.solarize else view


def test_apply_equals_torchvision_in_sequence():
    torch.manual_seed(0)
    images = pixels(count=40).float() / 255
    params = draw(SPEC, 40, 20, 24)
    # Inverting jumps at the threshold, where rounding decides: checked on its own.
    params = replace(params, solarize=torch.zeros_like(params.solarize))
    result = apply(images, params, 18)
    for i in range(40):
        expected = one_by_one(images[i], row(params, i), 18)
        torch.testing.assert_close(result[i], expected, atol=2e-5, rtol=0)


def test_a_view_does_not_depend_on_its_neighbours():
    torch.manual_seed(1)
    images = pixels().float() / 255
    params = draw(SPEC, 8, 20, 24)
    together = apply(images, params, 16)
    for i in range(8):
        alone = apply(images[i : i + 1], row(params, i), 16)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_what_is_off_leaves_the_crop_bit_for_bit():
    torch.manual_seed(2)
    images = pixels(count=32).float() / 255
    params = draw(SPEC, 32, 20, 24)
    box = (params.top, params.left, params.height, params.width)
    crop = transforms.crop_resize(images, box, params.flip, 16)
    off = ~(params.jitter | params.grayscale | params.blur | params.solarize)
    result = apply(images, params, 16)
    same = (result == crop).flatten(1).all(1)
    assert off.any()
    assert same[off].all()
    assert not same[~off].any()


def _span(reach, column):
    """Where a factor of the jitter may lie."""
    return (-reach, reach) if column == 3 else (1 - reach, 1 + reach)


def test_draws_follow_the_recipe():
    torch.manual_seed(3)
    n = 10_000
    spec = replace(SPEC, crop_min=0.2, crop_max=0.9, flip=0.3)
    params = draw(spec, n, 32, 40)
    shares = {"flip": 0.3, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2}
    for name, share in shares.items():
        assert getattr(params, name).float().mean().item() == pytest.approx(share, abs=0.03), name
    low, high = params.factors.min(0).values, params.factors.max(0).values
    torch.testing.assert_close(low, torch.tensor([0.2, 0.2, 0.2, -0.2]), atol=0.01, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.8, 1.8, 1.8, 0.2]), atol=0.01, rtol=0)
    for column, reach in enumerate((0.8, 0.8, 0.8, 0.2)):  # uniform: each tenth has its share
        shares = params.factors[:, column].histc(10, *_span(reach, column)) / n
        assert (shares - 0.1).abs().max() < 0.012, column  # four standard errors
    assert (params.sigma.histc(10, 0.1, 2.0) / n - 0.1).abs().max() < 0.012
    _, counts = params.order.unique(dim=0, return_counts=True)
    assert (counts / n - 1 / 24).abs().max() < 0.008  # four standard errors
    assert len(params.order.unique(dim=0)) == 24
    assert (params.order.sort(1).values == torch.arange(4)).all()
    for slot in range(4):
        assert params.order[:, slot].bincount().div(n).sub(0.25).abs().max() < 0.03
    assert params.sigma.min() >= 0.1
    assert params.sigma.max() <= 2.0


def test_crops_are_distributed_as_torchvisions():
    torch.manual_seed(5)
    n, height, width, area = 10_000, 32, 40, (0.2, 0.9)
    params = draw(replace(SPEC, crop_min=area[0], crop_max=area[1]), n, height, width)
    ours = torch.stack([params.top, params.left, params.height, params.width], 1).float()
    blank = torch.empty(3, height, width)
    ratio = (3 / 4, 4 / 3)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(blank, area, ratio) for _ in range(n)], dtype=torch.float
    )
    for boxes in (ours, theirs):
        share = boxes[:, 2] * boxes[:, 3] / (height * width)
        assert 0.17 < share.min() < 0.23
        assert 0.86 < share.max() < 0.94
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    for column in range(4):  # top, left, height, width: the same quantiles, to a pixel
        gap = ours[:, column].quantile(levels) - theirs[:, column].quantile(levels)
        assert gap.abs().max() <= 1
        bins = [boxes[:, column].histc(8, 0, 40) / n for boxes in (ours, theirs)]
        assert (bins[0] - bins[1]).abs().max() < 0.03
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.5, rtol=0)
    torch.testing.assert_close(ours.T.corrcoef(), theirs.T.corrcoef(), atol=0.06, rtol=0)
    assert (ours[:, :2] + ours[:, 2:]).max(0).values.tolist() == [height, width]


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 40, (0, 13, 10, 13)), (41, 10, (14, 0, 13, 10)), (9, 9, (0, 0, 9, 9))],
)
def test_a_crop_that_never_fits_is_the_central_one(height, width, box):
    # Whole images only, of no permitted shape (or, square, of a shape that chance seldom hits).
    params = draw(replace(SPEC, crop_min=1.0), 200, height, width)
    boxes = torch.stack([params.top, params.left, params.height, params.width], 1)
    assert (boxes == torch.tensor(box)).all()


def test_the_seed_decides_and_samples_and_views_differ():
    make = BatchedViews((SPEC, SPEC), 16, MEAN, STD)
    same = pixels(count=1).expand(6, -1, -1, -1)
    torch.manual_seed(4)
    first, second = make(same)
    torch.manual_seed(4)
    again = make(same)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, make(same)[0])
    assert not torch.equal(first, second)
    assert len(first.unique(dim=0)) == 6


def test_batched_views_are_normalised_channels_last_floats():
    plain = dict.fromkeys(SETTINGS, 0.0) | {"crop_min": 1.0, "flip": 0.0}
    make = BatchedViews((ViewSpec(**plain), SPEC), 20, MEAN, STD)
    images = pixels(count=5, height=20, width=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain_view, other = make(images)
    expected = tv.normalize(images.float() / 255, MEAN, STD)
    torch.testing.assert_close(plain_view, expected, atol=1e-5, rtol=0)
    assert other.shape == (5, 3, 20, 20)
    assert plain_view.dtype == other.dtype == torch.float32
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in (plain_view, other))
    assert not make.state_dict()
    assert not list(make.parameters())


def test_a_batch_of_several_pieces_keeps_its_order(monkeypatch):
    plain = dict.fromkeys(SETTINGS, 0.0) | {"crop_min": 1.0, "flip": 0.0}
    make = BatchedViews((ViewSpec(**plain),), 20, MEAN, STD)
    images = pixels(count=7, height=20, width=20)
    whole = make(images)[0]
    monkeypatch.setattr(views_module, "PIECE", 3 * 20 * 20 * 2)
    torch.testing.assert_close(make(images)[0], whole)
    assert make(images)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wrong", [pixels().float(), pixels()[0], pixels()[:, :1]])
def test_only_uint8_colour_batches_are_taken(wrong):
    with pytest.raises(DataError, match="uint8 images"):
        BatchedViews((SPEC,), 16, MEAN, STD)(wrong)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_min", 0.0),
        ("crop_max", 0.05),
        ("flip", 1.5),
        ("jitter", -0.1),
        ("brightness", float("nan")),
        ("contrast", -1),
        ("hue", 0.6),
        ("blur", "often"),
        ("solarize", True),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        replace(SPEC, **{name: value})
    assert str(value) in str(caught.value)


def test_wrong_fields_of_a_view_are_named():
    with pytest.raises(ConfigError, match="did you mean 'blur'"):
        Views(SETTINGS, SETTINGS | {"blurr": 0.5})
    with pytest.raises(ConfigError, match="lacks the settings hue, solarize"):
        Views({k: v for k, v in SETTINGS.items() if k not in ("hue", "solarize")}, SPEC)
    with pytest.raises(ConfigError, match="None"):
        Views(SPEC, None)


def test_wrong_sizes_and_statistics_are_refused():
    for size, mean, std in ((0, MEAN, STD), (16, MEAN[:2], STD), (16, MEAN, (0.2, 0.2, 0.0))):
        with pytest.raises(ConfigError, match="views need"):
            BatchedViews((SPEC,), size, mean, std)


def test_scaled_drops_blur_and_flip_where_they_do_not_belong():
    assert scaled(SPEC, 64, flip=True) == SPEC
    assert scaled(SPEC, 32, flip=True) == replace(SPEC, blur=0.0)
    assert scaled(SPEC, 96, flip=False) == replace(SPEC, flip=0.0)


@pytest.mark.parametrize(
    ("method", "blur", "solarize", "hue"),
    [
        ("moco", (0.5, 0.5), (0, 0), 0.1),
        ("simclr", (0.5, 0.5), (0, 0), 0.2),
        ("byol", (1.0, 0.1), (0, 0.2), 0.1),
    ],
)
def test_configs_state_the_papers_views(method, blur, solarize, hue):
    config = OmegaConf.load(CONFIGS / f"{method}.yaml")
    assert config._target_ == "ssl_samix.data.views.Views"
    specs = Views(config.a, config.b).specs(224, flip=True)
    assert tuple(spec.blur for spec in specs) == blur
    assert tuple(spec.solarize for spec in specs) == solarize
    assert {spec.hue for spec in specs} == {hue}


def test_data_can_ask_for_larger_crops():
    spec = ViewSpec(
        crop_min=0.2, crop_max=0.4, jitter=0, brightness=0, contrast=0, saturation=0, hue=0,
        grayscale=0, blur=0, solarize=0,
    )  # fmt: skip
    assert (scaled(spec, 32, True, 0.0).crop_min, scaled(spec, 32, True).crop_max) == (0.2, 0.4)
    larger = scaled(spec, 32, True, 0.5)
    assert (larger.crop_min, larger.crop_max) == (0.5, 0.5)
    with pytest.raises(ConfigError, match="crop_min"):
        scaled(spec, 32, True, 1.5)
