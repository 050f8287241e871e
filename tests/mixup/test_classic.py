"""What every hand-made policy promises, and masks that look at no image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ssl_samix.errors import ConfigError
from ssl_samix.mixup.plan import blend, share
from ssl_samix.mixup.policies import (
    AttentiveMix,
    CutMix,
    FMix,
    GridMix,
    Mixup,
    ResizeMix,
    SaliencyMix,
    box_around,
    shrink,
)
from ssl_samix.types import MixPlan

CLASSES = (Mixup, CutMix, ResizeMix, GridMix, FMix, SaliencyMix, AttentiveMix)
POLICIES = {policy.__name__.lower(): policy for policy in CLASSES}
BINARY = sorted(set(POLICIES) - {"mixup"})
SIZE = 16


def plan_of(lam, rows=None):
    rows = torch.arange(len(lam)) if rows is None else rows
    return MixPlan(lam=torch.as_tensor(lam), partner=(rows + 1) % (int(rows.max()) + 1), rows=rows)


def inputs(count=8, size=SIZE, **kinds):
    images, partners = torch.randn(2, count, 3, size, size, **kinds)
    return images, partners, (torch.rand(count, 5, 4, 4), torch.rand(count, 5, 4, 4))


def mix(name, plan, images, partners, maps):
    return POLICIES[name]()(images, partners, plan, maps)


@pytest.mark.parametrize("size", [16, 30, 33])
@pytest.mark.parametrize("name", POLICIES)
def test_shapes_and_pixels_between_their_parents(name, size):
    images, partners, maps = inputs(12, size)
    plan = plan_of(torch.linspace(0, 1, 12))
    mixed = mix(name, plan, images, partners, maps)
    assert mixed.images.shape == (12, 3, size, size)
    assert mixed.mask.shape == (12, 1, size, size)
    assert mixed.mask.dtype == torch.float32
    assert mixed.partner is plan.partner
    assert ((mixed.mask >= 0) & (mixed.mask <= 1)).all()
    mask = mixed.mask.expand_as(images)
    assert torch.equal(mixed.images[mask == 0], images[mask == 0])
    if name != "resizemix":
        other = partners[plan.partner]
        assert torch.equal(mixed.images[mask == 1], other[mask == 1])
        low, high = torch.minimum(images, other), torch.maximum(images, other)
        assert ((mixed.images >= low) & (mixed.images <= high)).all()


@pytest.mark.parametrize("name", BINARY)
def test_the_ratio_is_what_the_mask_leaves(name):
    plan = plan_of(torch.linspace(0, 1, 8))
    mixed = mix(name, plan, *inputs())
    assert mixed.mask.unique().tolist() == [0, 1]
    assert torch.equal(mixed.lam, 1 - mixed.mask.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("name", POLICIES)
def test_ratios_are_per_sample(name):
    images, partners, maps = inputs()
    mixed = mix(name, plan_of([1.0, 0.9, 0.6, 0.3] * 2), images, partners, maps)
    assert len(mixed.lam[:4].unique()) == len(mixed.lam[4:].unique()) == 4
    assert mixed.lam[0] == mixed.lam[4] == 1  # nothing of the partner
    assert torch.equal(mixed.images[::4], images[::4])


@pytest.mark.parametrize("name", ["mixup", "gridmix", "fmix", "attentivemix"])
def test_no_share_of_the_image_gives_the_partner(name):
    images, partners, maps = inputs()
    plan = plan_of(torch.zeros(8))
    mixed = mix(name, plan, images, partners, maps)
    assert torch.equal(mixed.images, partners[plan.partner])
    assert (mixed.lam == 0).all()


@pytest.mark.parametrize(
    ("name", "error"),
    [("fmix", 0.5 / SIZE**2), ("gridmix", 0.5 / 16), ("attentivemix", 0.5 / 16), ("mixup", 0)],
)
def test_the_area_is_the_plans(name, error):
    plan = plan_of(torch.rand(500))
    mixed = mix(name, plan, *inputs(500))
    assert (mixed.lam - plan.lam).abs().max() <= error + 1e-5


def test_cutmix_has_the_plans_area_before_clipping():
    lam = torch.full((4000,), 0.75)
    mixed = mix("cutmix", plan_of(lam), *inputs(4000))
    assert 1 - mixed.lam.min() == 0.25
    # Per axis: 8 of 16 px whole at 9 of 16 centres, cut to 4..7 px at the others of either side.
    kept = (8 * 9 + (4 + 5 + 6 + 7) + (5 + 6 + 7)) / 16 / 16
    assert 1 - mixed.lam.mean().item() == pytest.approx(kept**2, abs=0.005)


@pytest.mark.parametrize("name", ["cutmix", "resizemix", "gridmix", "fmix"])
def test_every_mixture_draws_its_own_place_and_every_place_is_drawn(name):
    masks = mix(name, plan_of(torch.full((2000,), 0.75)), *inputs(2000)).mask
    assert len(masks.unique(dim=0)) > 50
    assert (masks.mean(dim=0) > 0).all()
    rows, columns = masks.mean(dim=(0, 1, 3)), masks.mean(dim=(0, 1, 2))
    assert_close(rows, rows.flip(0), atol=0.05, rtol=0)
    assert_close(rows, columns, atol=0.05, rtol=0)


def test_swapped_parents_and_ratio_give_the_same_mixup():
    images, partners, maps = inputs()
    rows = torch.arange(8)
    lam = torch.rand(8)
    there = mix("mixup", MixPlan(lam, rows.roll(3), rows), images, partners, maps)
    swapped = mix("mixup", MixPlan(1 - lam, rows, rows.roll(3)), partners, images, maps)
    assert_close(there.images, swapped.images)
    assert torch.equal(there.lam, lam)


@pytest.mark.parametrize("name", sorted(set(BINARY) - {"resizemix"}))
def test_swapped_parents_and_inverse_mask_give_the_same_image(name):
    images, partners, maps = inputs()
    rows = torch.arange(8)
    plan = MixPlan(torch.rand(8), rows.roll(3), rows)
    mixed = mix(name, plan, images, partners, maps)
    mask = 1 - mixed.mask
    swapped = blend(partners, images, MixPlan(plan.lam, rows, rows.roll(3)), mask, share(mask))
    assert torch.equal(mixed.images, swapped.images)
    assert_close(mixed.lam, 1 - swapped.lam)


@pytest.mark.parametrize("name", POLICIES)
def test_a_part_of_the_batch(name):
    images, partners, maps = inputs(9)
    plan = plan_of(torch.rand(5), torch.arange(0, 9, 2))
    torch.manual_seed(1)
    part = mix(name, plan, images, partners, maps)
    torch.manual_seed(1)
    gathered = MixPlan(plan.lam, torch.arange(5), torch.arange(5))
    own_maps = (maps[0][plan.rows], maps[1][plan.partner])
    alone = mix(name, gathered, images[plan.rows], partners[plan.partner], own_maps)
    assert torch.equal(part.images, alone.images)
    assert torch.equal(part.mask, alone.mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", POLICIES)
def test_images_keep_their_type_and_memory_format(name, dtype):
    images, partners, maps = inputs(dtype=dtype)
    images, partners = (x.to(memory_format=torch.channels_last) for x in (images, partners))
    plan = plan_of(torch.rand(8))
    mixed = mix(name, plan, images, partners, tuple(m.to(dtype) for m in maps))
    assert mixed.images.dtype == dtype
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)
    assert mixed.mask.dtype == mixed.lam.dtype == torch.float32


@pytest.mark.parametrize("name", POLICIES)
def test_gradient_reaches_both_parents_by_their_share(name):
    images, partners, maps = inputs()
    images.requires_grad_()
    partners.requires_grad_()
    plan = plan_of(torch.linspace(0.2, 0.8, 8))
    mixed = mix(name, plan, images, partners, maps)
    mixed.images.sum().backward()
    assert_close(images.grad, (1 - mixed.mask).expand_as(images))
    given = partners.grad[plan.partner].sum(dim=(1, 2, 3))
    assert_close(given, 3 * mixed.mask.sum(dim=(1, 2, 3)), rtol=1e-4, atol=1e-3)
    if name != "resizemix":  # whose pixels move
        assert_close(partners.grad[plan.partner], mixed.mask.expand_as(images))


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_waits_for_the_device(name):
    with torch.device("meta"):  # tensors without values: whoever reads one on the host fails
        plan = MixPlan(torch.empty(5), *torch.empty(2, 5, dtype=torch.long).unbind())
        mixed = mix(name, plan, *inputs())
    assert mixed.images.shape == (5, 3, SIZE, SIZE)
    assert mixed.mask.is_meta


def slow_cutmix(image, other, row, column, side):
    """The paper's box, pixel by pixel."""
    mixed = image.clone()
    for r in range(row - side // 2, row - side // 2 + side):
        for c in range(column - side // 2, column - side // 2 + side):
            if 0 <= r < image.shape[1] and 0 <= c < image.shape[2]:
                mixed[:, r, c] = other[:, r, c]
    return mixed


def test_boxes_against_a_loop():
    images, partners, _ = inputs(6)
    centre = torch.tensor([[0, 0], [15, 15], [8, 3], [2, 14], [7, 7], [0, 9]])
    sides = [16, 5, 8, 9, 0, 1]
    lam = 1 - (torch.tensor(sides) / SIZE) ** 2
    plan = plan_of(lam)
    mask = box_around(centre, lam, SIZE)
    mixed = blend(images, partners, plan, mask, share(mask))
    for k, ((row, column), side) in enumerate(zip(centre.tolist(), sides, strict=True)):
        slow = slow_cutmix(images[k], partners[plan.partner[k]], row, column, side)
        assert torch.equal(mixed.images[k], slow), k


def test_resizemix_shows_the_whole_partner():
    images = torch.randn(4, 3, 32, 32)
    corner, side = torch.tensor([[0, 0], [3, 8], [20, 24], [5, 5]]), torch.tensor([32, 16, 7, 0])
    small = shrink(images, corner, side)
    assert small.isfinite().all()
    for k, ((top, left), width) in enumerate(zip(corner.tolist(), side.tolist(), strict=True)):
        if width:
            inside = small[k, :, top : top + width, left : left + width]
            whole = F.interpolate(images[k : k + 1], size=(width, width), mode="bilinear")
            assert_close(inside, whole[0])


def test_resizemix_keeps_its_box_inside():
    plan = plan_of(torch.rand(300))
    mixed = mix("resizemix", plan, *inputs(300))
    side = ((1 - plan.lam).sqrt() * SIZE).round()
    assert torch.equal(mixed.mask.sum(dim=(1, 2, 3)), side**2)


def test_gridmix_takes_whole_cells():
    mask = GridMix(grid=4).mask(torch.zeros(8, 3, 16, 16), plan_of(torch.rand(8)), None)
    cells = mask[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    assert (cells == cells[..., :1]).all()


def test_fmix_has_larger_regions_with_a_higher_decay():
    plan = plan_of(torch.full((32,), 0.5))
    edges = [
        FMix(decay).mask(torch.zeros(32, 3, 32, 32), plan, None).diff(dim=-1).abs().sum()
        for decay in (0.0, 1.5, 3.0)
    ]
    assert edges[0] > 2 * edges[1] > 4 * edges[2]


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match=r"mixup\.policy\.grid"):
        GridMix(grid=1)
    with pytest.raises(ConfigError, match=r"mixup\.policy\.decay"):
        FMix(decay=-1.0)
