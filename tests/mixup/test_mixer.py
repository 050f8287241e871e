"""The Mixer's network against a slow reference, and its numerics."""

from __future__ import annotations

import math

import pytest
import torch

from ssl_samix.errors import ConfigError
from ssl_samix.mixup import mixer
from ssl_samix.mixup.mixer import MixBlock, attend, balanced


def bilinear(side, size):
    """Weights (size, side) of bilinear up-sampling with half-pixel centres."""
    weights = torch.zeros(size, side, dtype=torch.float64)
    for pixel in range(size):
        at = min(max((pixel + 0.5) * side / size - 0.5, 0.0), side - 1.0)
        low = int(at)
        high = min(low + 1, side - 1)
        weights[pixel, low] += 1 - (at - low)
        weights[pixel, high] += at - low
    return weights


def reference(weights, own, partner, lam, size, form):
    """The Mixer in float64, from its description, a sample and a position at a time."""
    k, _, h, w = own.shape
    gamma = weights["gamma"].clamp(0, 1)
    own = torch.stack([own[n] * (1 + gamma * lam[n]) for n in range(k)])
    partner = torch.stack([partner[n] * (1 + gamma * (1 - lam[n])) for n in range(k)])
    both = torch.cat([own, partner], dim=1)

    def conv(name, x):
        out = torch.einsum("oc,nchw->nohw", weights[f"{name}.weight"][:, :, 0, 0], x)
        bias = weights.get(f"{name}.bias", torch.zeros(len(out[0])))
        return out + bias[None, :, None, None]

    query, key, hidden = conv("query", both), conv("key", both), conv("value.0", partner)
    mean = hidden.mean(dim=(0, 2, 3), keepdim=True)
    var = ((hidden - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    hidden = (hidden - mean) / (var + 1e-5).sqrt()
    hidden = hidden * weights["value.1.weight"][None, :, None, None]
    hidden = (hidden + weights["value.1.bias"][None, :, None, None]).relu()
    value = conv("value.3", hidden)[:, 0]
    masks, up = [], bilinear(h, size)
    for n in range(k):
        rows = []
        for i in range(h * w):
            q = query[n, :, i // w, i % w]
            scores = torch.einsum("d,dhw->hw", q, key[n]) / math.sqrt(len(q))
            chances = (scores - scores.max()).exp()
            rows.append((chances / chances.sum() * value[n]).sum())
        output = up @ torch.stack(rows).view(h, w) @ up.T
        if form == "anchored":
            output = output + torch.log((1 - lam[n]) / lam[n])
        masks.append(1 / (1 + (-output).exp()))
    return torch.stack(masks)[:, None]


@pytest.mark.parametrize("form", ["paper", "anchored"])
def test_value_and_gradient_equal_the_reference(form):
    block = MixBlock(6, form=form)
    torch.nn.init.normal_(block.value[3].weight)  # far from its start
    torch.nn.init.uniform_(block.value[1].weight, 0.5, 2.0)
    own, partner = torch.randn(2, 3, 6, 4, 4).unbind()
    lam, upstream = torch.tensor([0.2, 0.5, 0.9]), torch.randn(3, 1, 12, 12)
    names = [n for n, _ in block.named_parameters()]
    mask = block(own, partner, lam, 12)
    ours = torch.autograd.grad((mask * upstream).sum(), list(block.parameters()))
    weights = {n: p.detach().double().requires_grad_() for n, p in block.named_parameters()}
    slow = reference(weights, own.double(), partner.double(), lam.double(), 12, form)
    theirs = torch.autograd.grad(
        (slow * upstream.double()).sum(), [weights[n] for n in names], allow_unused=True
    )
    assert mask.shape == (3, 1, 12, 12)
    torch.testing.assert_close(mask.double(), slow, rtol=0, atol=1e-5)
    for name, mine, true in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5, msg=name)


def test_lambda_is_seen_per_sample_through_gamma_alone():
    block = MixBlock(4).eval()
    torch.nn.init.normal_(block.value[3].weight, std=3.0)
    maps = torch.randn(2, 4, 3, 3).abs()[:1].expand(2, -1, -1, -1)
    lam = torch.tensor([0.0, 1.0])
    first, second = block(maps, maps.flip(2), lam, 6)
    assert not torch.allclose(first, second, atol=1e-3)
    with torch.no_grad():
        block.gamma.zero_()
    first, second = block(maps, maps.flip(2), lam, 6)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("start", "bound"), [(-2.0, 0.0), (3.0, 1.0)])
def test_gamma_is_bounded_and_comes_back(start, bound):
    block = MixBlock(4)
    with torch.no_grad():
        block.gamma.fill_(start)
    assert block.bounded_gamma.item() == pytest.approx(bound, abs=1e-6)
    block.bounded_gamma.backward()
    assert block.gamma.grad.item() == 1.0


@pytest.mark.parametrize("form", ["anchored", "exact"])
def test_an_untrained_mixer_is_mixup(form):
    block = MixBlock(8, form=form)
    lam = torch.tensor([0.05, 0.3, 0.5, 0.99])
    mask = block(torch.randn(4, 8, 4, 4), torch.randn(4, 8, 4, 4), lam, 16)
    expected = (1 - lam)[:, None, None, None].expand_as(mask)
    torch.testing.assert_close(mask, expected, rtol=0, atol=5e-3)


LAMS = [0.0, 1e-3, 0.02, 0.3, 0.5, 0.9, 0.999, 1.0]
LOGITS = {
    "flat": torch.zeros_like,
    "noise": lambda noise: noise,
    "strong noise": lambda noise: 100 * noise,
    "huge": lambda noise: 3e4 * noise.sign(),
    "one pixel": lambda noise: torch.zeros_like(noise).index_fill(3, torch.tensor([0]), 60.0),
    "skewed": lambda noise: noise.exp().square(),
}


@pytest.mark.parametrize("kind", sorted(LOGITS))
@pytest.mark.parametrize("size", [1, 5, 32, 224])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_exact_mask_has_the_share_that_is_asked_for(kind, size, dtype):
    lam = torch.tensor(LAMS)
    logits = LOGITS[kind](torch.randn(len(lam), 1, size, size)).to(dtype)
    mask = balanced(logits, lam.to(dtype))
    assert ((mask >= 0) & (mask <= 1)).all()
    assert mask.dtype in (torch.float32, torch.float64)
    share = 1 - mask.double().mean(dim=(1, 2, 3))
    torch.testing.assert_close(share, lam.to(dtype).double(), rtol=0, atol=1e-3)


def test_an_exact_mask_keeps_the_order_of_its_logits():
    logits = torch.randn(3, 1, 6, 6)
    mask = balanced(logits, torch.tensor([0.2, 0.5, 0.8]))
    order, found = logits.flatten(1).argsort(dim=1), mask.flatten(1)
    assert (found.gather(1, order).diff(dim=1) > 0).all()


def test_the_gradient_of_an_exact_mask_is_that_of_its_level():
    """By finite differences: the level answers to each logit, so that the share stays."""
    logits = torch.randn(3, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    lam = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: balanced(x, lam), logits)
    (slope,) = torch.autograd.grad(balanced(logits, lam).mean(), logits)
    assert slope.abs().max() < 1e-12


@pytest.mark.parametrize("size", [8, 30])
def test_whatever_an_exact_mixer_has_learned_its_masks_keep_their_ratios(size):
    block = MixBlock(8, form="exact")
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    lam = torch.linspace(0, 1, 16)
    mask = block(torch.randn(16, 8, 4, 4), torch.randn(16, 8, 4, 4), lam, size)
    assert mask.flatten(1).std(dim=1)[1:-1].min() > 0.01
    torch.testing.assert_close(1 - mask.mean(dim=(1, 2, 3)), lam, rtol=0, atol=1e-3)


def test_anchored_mask_is_finite_at_the_ends():
    block = MixBlock(8, form="anchored")
    mask = block(torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), torch.tensor([0.0, 1.0]), 8)
    mask.sum().backward()
    assert torch.isfinite(mask).all()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


def test_chunked_attention_is_the_whole(monkeypatch):
    query, key, value = torch.randn(2, 5, 20), torch.randn(2, 5, 20), torch.randn(2, 1, 20)
    whole = attend(query, key, value)
    monkeypatch.setattr(mixer, "MOST_POSITIONS", 7)
    torch.testing.assert_close(attend(query, key, value), whole)


def test_inner_width_is_half_the_channels_at_most_width():
    assert MixBlock(6).query.out_channels == 3
    assert MixBlock(1024).query.out_channels == 128


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"form": "papr"}, "unknown mixup.mask 'papr': did you mean 'paper'"),
        ({"upsampling": "cubic"}, "unknown mixup.upsampling 'cubic'"),
        ({"width": 0}, "mixup.width must be"),
    ],
)
def test_unknown_settings_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MixBlock(4, **settings)


def test_shuffled_pairs_give_shuffled_masks():
    block = MixBlock(6)
    own, partner, lam = torch.randn(5, 6, 3, 3), torch.randn(5, 6, 3, 3), torch.rand(5)
    order = torch.tensor([3, 0, 4, 2, 1])
    straight = block(own, partner, lam, 9)
    shuffled = block(own[order], partner[order], lam[order], 9)
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_agrees():
    block = MixBlock(16)
    own, partner, lam = torch.randn(4, 16, 4, 4), torch.randn(4, 16, 4, 4), torch.rand(4)
    plain = block(own, partner, lam, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = block(own, partner, lam, 8)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain, rtol=1e-2, atol=1e-2)


def test_attention_holds_products_that_float16_cannot():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, d, 16) * 40 for d in (256, 256, 1))
    assert (query.transpose(1, 2) @ key).abs().max() > torch.finfo(torch.float16).max
    found = attend(query.half(), key.half(), value.half())
    scores = query.half().double().transpose(1, 2) @ key.half().double() / 16
    expected = (scores.softmax(dim=2) @ value.half().double().transpose(1, 2))[..., 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
