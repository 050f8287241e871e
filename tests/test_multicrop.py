"""Small views beside the two large ones: queries only, the same for every method."""

from __future__ import annotations

import pytest
import torch

from ssl_samix.artifacts.run_folder import read_metrics
from ssl_samix.config.compose import build, compose
from ssl_samix.data.datamodule import StepReader
from ssl_samix.data.view_spec import SmallViews
from ssl_samix.errors import ConfigError
from ssl_samix.models.backbone import Backbone
from ssl_samix.types import Batch
from tests.conftest import METHODS, mixed_method, samix_here
from tests.test_invariants import count_passes


def data(*words, limit=24):
    config, _ = compose("pretrain", [f"data.limit={limit}", "data.batch_size=8", *words])
    return build(config.data, views=build(config.views), seed=0)


def drawn(module):
    """The views of a first step."""
    reader = StepReader(module.images, module.views.per_image, seed=0, rank=0)
    return module.on_after_batch_transfer(reader[0, list(range(8))], 0).views


@pytest.fixture
def small():
    return torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)


def test_the_loss_is_the_mean_over_all_pairs_of_a_query_and_a_key(method, views, small):
    method.eval()  # one pass of all small views and one pass each have the same statistics
    own = torch.arange(6)[:, None]
    pairs = [
        method.plain_loss(method.query(views[q]), method.keys(views[k]))
        for q, k in method.directions
    ]
    keys = sorted({k for _, k in method.directions})
    for view in small:
        pairs += [
            method.pair_loss(method.query(view), method.keys(views[k]), own)[:, 0] for k in keys
        ]
    if type(method).__name__ in ("BarlowTwins", "VICReg"):  # the small views are one batch
        query, rows = method.query(torch.cat(small)), own.repeat(2, 1)
        pairs[-2:] = method.pair_loss(query, method.keys(views[1]), rows)[:, 0].chunk(2)
    with method.memory.step():
        loss = method.own_loss((*views, *small))
    torch.testing.assert_close(loss, torch.stack(pairs).mean(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_small_views_are_queries_only_and_teach(name, views, small):
    method = METHODS[name](Backbone("resnet18", image_size=16, width=4))
    counted, pushed = count_passes(method), []
    if hasattr(method, "queue"):
        method.queue.push = pushed.append
    given = tuple(view.clone().requires_grad_() for view in small)
    with method.memory.step():
        method.own_loss(views)
        plain = dict(counted)
    with method.memory.step():
        method.after_batch()
        pushed.clear()
        method.own_loss((*views, *given)).mean().backward()
    assert counted["online"] == 2 * plain["online"] + 12
    assert counted["teacher"] == 2 * plain["teacher"]
    for view in given:
        assert view.grad.flatten(1).abs().sum(dim=1).min() > 0
    method.after_batch()
    assert [len(keys) for keys in pushed] == [6] * len(pushed)


@pytest.mark.parametrize("device", ["batched", "workers"])
def test_the_large_views_are_those_without_small_ones(device):
    plain, more = (
        drawn(data(f"views.device={device}", f"views.small.count={count}")) for count in (0, 3)
    )
    assert [view.shape for view in more] == [(8, 3, 16, 16)] * 2 + [(8, 3, 7, 7)] * 3
    if device == "batched":  # in workers, an image's views are drawn before the next image's
        for one, other in zip(plain, more, strict=False):
            assert torch.equal(one, other)
    assert not torch.equal(more[2], more[3])


@pytest.mark.parametrize(("image", "side"), [(16, 7), (32, 14), (96, 48), (224, 96)])
def test_the_automatic_side(image, side):
    assert SmallViews().side(image) == side


def test_small_crops_are_small_and_otherwise_like_the_first_view():
    views = build(compose("pretrain", ["method=byol", "views.small.count=6"])[0].views)
    first, _ = views.specs(224)
    small = views.small_specs(224)
    assert len(small) == 6
    assert (small[0].crop_min, small[0].crop_max) == (0.05, 0.14)
    assert (small[0].blur, small[0].hue) == (first.blur, first.hue)
    raised = views.small_specs(32, crop_min=0.2)[0]
    assert (raised.crop_min, raised.crop_max) == (0.2, 0.2)


@pytest.mark.parametrize("mixing", ["mixup", "samix"])
def test_mixtures_are_of_the_large_views(mixing, views, small):
    losses = []
    for given in (views, (*views, *small)):
        torch.manual_seed(0)
        method = mixed_method("byol", mixing).eval()
        torch.manual_seed(1)
        rows = torch.arange(6)
        with method.memory.step():
            losses.append(method.mixing(method, Batch(given, rows, rows), 0, 10).losses)
    assert losses[0]["own"] != losses[1]["own"]
    torch.testing.assert_close(losses[0]["mix"], losses[1]["mix"])


def test_a_run_with_small_views(tmp_path):
    words = [
        "data.limit=64", "data.batch_size=32", "backbone.width=8", "trainer.max_epochs=1",
        "views.small.count=2", "out=run",
    ]  # fmt: skip
    assert "views.small.size=7" in samix_here("pretrain", *words, cwd=tmp_path)
    assert float(read_metrics(tmp_path / "run" / "metrics.csv")[-1]["loss"]) > 0


def test_a_transformer_takes_small_views_if_its_positions_are_resampled():
    options = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    rigid = Backbone("vit_tiny_patch16_224", image_size=16, options=options)
    with pytest.raises(ConfigError, match=r"images of 8 px: .*dynamic_img_size=true"):
        rigid.check_small(8, "views.small.size")
    options["dynamic_img_size"] = True
    method = METHODS["byol"](Backbone("vit_tiny_patch16_224", image_size=16, options=options))
    method.backbone.check_small(8, "views.small.size")
    views = (torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8))
    assert method.own_loss(views).shape == (4,)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["views.small.count=33"], "views.small.count must be"),
        (["views.small.count=2", "views.small.size=17"], "views.small.size must be"),
        (["views.small.crop_min=0.5"], "views.small.crop_min must be"),
        (["views.small.count=2", "mixup=mixup", "mixup.placement=replace"],
         "mixup.placement=replace leaves small views unused: set views.small.count=0"),
        (["views.small.count=2", "backbone=vit_tiny", "backbone.options.patch_size=4"],
         "cannot take images of 7 px: change views.small.size"),
    ],
)  # fmt: skip
def test_mistakes_are_told(words, sentence, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in fails("pretrain", "data.limit=64", "data.batch_size=32", *words)
