"""A classifier that mixes: who learns from which loss, and what the losses are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ssl_samix.config.compose import build, compose, groups
from ssl_samix.errors import ConfigError
from ssl_samix.methods.classifier import Classifier
from ssl_samix.models.backbone import Backbone
from ssl_samix.optim import parameter_groups
from ssl_samix.types import Batch, MixPlan
from tests.conftest import MIXINGS, frozen_mixer, recipe

LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
POLICIES = sorted(set(groups()["mixup"]) - {"none", "samix_c", "samix_p"})


def classifier(mixing=None, backbone=None, settings=None, **mixed):
    backbone = backbone or Backbone("resnet18", image_size=16, width=4)
    objective = None if mixing is None else MIXINGS[mixing](backbone, **mixed)
    return Classifier(backbone, classes=4, optimizer=recipe(), mixing=objective, **(settings or {}))


def batch():
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return Batch((images,), LABELS, torch.arange(8))


def terms(method, step=0, dtype=torch.float32):
    torch.manual_seed(4)
    given = replace(batch(), views=(batch().views[0].to(dtype),))
    with method.memory.step():
        return method.mixing(method, method.taken(given), step, 10)


def with_gradient(method):
    return {n for n, p in method.named_parameters() if p.grad is not None}


def test_without_mixing_the_loss_is_the_cross_entropy():
    method = classifier(settings={"smoothing": 0.1}).eval()
    taken = method.taken(batch())
    expected = F.cross_entropy(method.embedder(taken.views[0]), LABELS, label_smoothing=0.1)
    torch.testing.assert_close(method.own_loss(taken.views).mean(), expected)


@pytest.mark.parametrize("placement", ["auto", "add", "replace"])
def test_each_loss_reaches_its_own_network_and_no_other(placement):
    for wanted in ("encoder", "mixer"):
        method = classifier("samix", placement=placement)
        losses = terms(method).losses
        assert ("own" in losses) == (placement != "replace")
        mine = losses.pop("mixer")
        (sum(losses.values()) if wanted == "encoder" else mine).backward()
        prefixes = ("backbone.", "projector.") if wanted == "encoder" else ("mixing.",)
        expected = {n for n, _ in method.named_parameters() if n.startswith(prefixes)}
        assert with_gradient(method) == expected, wanted


def test_hand_made_policies_replace_the_plain_images_unless_told_otherwise():
    assert set(terms(classifier("mixup")).losses) == {"mix"}
    assert set(terms(classifier("samix_p")).losses) == {"mix"}
    assert set(terms(classifier("mixup", placement="add")).losses) == {"own", "mix"}


def test_the_mixed_loss_is_of_both_labels():
    method = classifier("mixup").eval()
    plan = MixPlan(torch.full((8,), 0.3), torch.arange(8).roll(1), torch.arange(8))
    method.mixing.draw = lambda images: plan
    images = batch().views[0]
    mixed = 0.3 * images + 0.7 * images.roll(1, 0)
    shares = 0.3 * F.one_hot(LABELS, 4) + 0.7 * F.one_hot(LABELS.roll(1), 4)
    expected = F.cross_entropy(method.embedder(mixed), shares)
    torch.testing.assert_close(terms(method).losses["mix"], expected)


@pytest.mark.parametrize("heads", ["one", "two"])
def test_the_mixers_losses_are_of_the_teachers_logits(heads):
    """Local: two-way softmax over the parents' classes; global: the mixed cross-entropy."""
    method = classifier("samix", eta=0.5, mask_weight=0.0, settings={"heads": heads}).eval()
    if heads == "two":
        method.mixed_twin.module.weight.data.normal_()  # far from the plain head's
    plan = MixPlan(torch.rand(8), torch.arange(8).roll(3), torch.arange(8))
    method.mixing.draw = lambda images: plan
    taken = method.taken(batch())
    with method.memory.step():
        logs = method.mixing.learn(method, taken, 0.0).logs
        images = taken.views[0]
        maps = method.teacher_backbone.stage_map(images, 3)
        mixed = method.mixing.policy.attached(images, images, plan, (maps, maps)).images
    head = method.twin.module[1] if heads == "one" else method.mixed_twin.module
    logits = head(method.teacher_backbone(mixed))
    own, other = LABELS, LABELS.roll(3)
    pair = torch.stack([logits[range(8), own], logits[range(8), other]], 1).log_softmax(1)
    local = -(plan.lam * pair[:, 0] + (1 - plan.lam) * pair[:, 1]).mean()
    shares = plan.lam[:, None] * F.one_hot(own, 4) + (1 - plan.lam[:, None]) * F.one_hot(other, 4)
    torch.testing.assert_close(logs["mixer/local"], local)
    torch.testing.assert_close(logs["mixer/global"], F.cross_entropy(logits, shares))


def test_the_mixers_pass_leaves_the_teacher_as_it_is():
    method = classifier("samix")
    before = {k: v.clone() for k, v in method.twin.state_dict().items()}
    taken = method.taken(batch())
    with method.memory.step():
        method.mixing.learn(method, taken, 0.0).losses["mixer"].backward()
    for name, value in method.twin.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_makes_a_step(policy):
    backbone = Backbone("resnet18", image_size=16, width=4)
    mixing = build(compose("supervised", [f"mixup={policy}"])[0].mixup, backbone=backbone)
    method = Classifier(backbone, classes=4, optimizer=recipe(), mixing=mixing)
    losses = terms(method).losses
    assert ("own" in losses) == policy.startswith("samix")
    sum(losses.values()).backward()
    assert method.backbone.trunk.conv1.weight.grad.abs().max() > 0


def test_the_average_follows_at_once_and_slower_later(monkeypatch):
    method = classifier(settings={"ema": 0.9})
    weight, average = method.projector.weight, method.twin.module[1].weight
    moved = []
    for step in (0, 1000):
        monkeypatch.setattr(type(method), "global_step", step)
        with torch.no_grad():
            weight.add_(1)
        before = average.clone()
        method.after_step()
        moved.append(((average - before) / (weight - before)).mean().item())
    assert moved == pytest.approx([0.9, 0.1], abs=1e-4)  # 1 - 1/10, then 1 - ema


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "cross_entrop"}, "did you mean 'cross_entropy'"),
        ({"smoothing": 1.0}, "classifier.smoothing must be a number in"),
        ({"ema": -0.1}, "classifier.ema must be a number in"),
        ({"heads": "tow"}, "did you mean 'two'"),
        ({"heads": "two"}, "classifier.heads=two needs mixtures beside the plain images"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        classifier(settings=settings)


def test_a_frozen_mixer_works_for_labels_too():
    method = classifier("samix_p")
    sum(terms(method).losses.values()).backward()
    assert with_gradient(method) == {
        n for n, _ in method.named_parameters() if n.startswith(("backbone.", "projector."))
    }
    assert frozen_mixer().training is False


TWO = {"heads": "two"}


def gradients(method, loss):
    """The gradients of a loss by the names of the parameters that it reaches."""
    method.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


def test_plain_images_and_mixtures_teach_a_head_each():
    method = classifier("samix", settings=TWO)
    losses = terms(method).losses
    heads = {"own": "projector.", "mix": "mixed_projector.", "mixer": None}
    for name, mine in heads.items():
        reached = gradients(method, losses[name])
        assert not any(key.startswith("mixed_twin.") for key in reached)
        for head in ("projector.", "mixed_projector."):
            slopes = [value for key, value in reached.items() if key.startswith(head)]
            assert len(slopes) == (2 if head == mine else 0), (name, head)
            assert all(value.abs().max() > 0 for value in slopes)
        assert any(key.startswith("backbone.") for key in reached) == (name != "mixer")
    assert all(p.grad is None for p in method.twin.parameters())


def test_each_head_gives_its_own_logits_of_the_same_images():
    """The same tensor through both heads: neither is given what the step remembers of the other."""
    method = classifier("samix", settings=TWO).eval()
    images = batch().views[0]
    with method.memory.step():
        for ask, head in (
            (method.query, method.projector),
            (method.mixed_query, method.mixed_projector),
            (method.query, method.projector),
        ):
            torch.testing.assert_close(ask(images), head(method.backbone(images)))


def test_the_mixers_teacher_is_the_average_of_the_mixtures_head_in_eval_mode(monkeypatch):
    method = classifier("samix", settings={**TWO, "ema": 0.5})
    monkeypatch.setattr(type(method), "global_step", 1000)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        before = [p.clone() for p in method.mixed_twin.module.parameters()]
        method.after_step()
    online, average = method.mixed_projector, method.mixed_twin.module
    for old, now, new in zip(before, online.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(new, (old + now) / 2)
    images = batch().views[0].requires_grad_()
    logits = method.train().frozen_query(images)
    assert method.training
    method.twin.eval()
    torch.testing.assert_close(logits, average(method.teacher_backbone(images)))
    logits.sum().backward()
    assert images.grad.abs().max() > 0
    assert with_gradient(method) == set()


@pytest.mark.parametrize(
    ("mixing", "mixed", "heads"),
    [
        (None, {}, 1),
        ("mixup", {}, 1),
        ("mixup", {"placement": "add"}, 1),
        ("samix_p", {"placement": "add"}, 1),
        ("samix", {"placement": "replace"}, 1),
        ("samix", {}, 2),
        ("samix", {"placement": "add"}, 2),
    ],
)
def test_auto_gives_a_second_head_where_a_policy_learns_beside_plain_images(mixing, mixed, heads):
    method = classifier(mixing, settings={"heads": "auto"}, **mixed)
    assert (method.mixed_projector is None) == (heads == 1)
    assert (method.mixed_twin is None) == (heads == 1)
    logits = [network(batch().views[0]) for network in method.measured().values()]
    assert [found.shape for found in logits] == [(8, 4 * heads)] * 2


def test_one_head_is_the_default():
    assert compose("supervised", [])[0].classifier.heads == "one"
    method = classifier("samix")
    known = ("backbone.", "projector.", "twin.module.0.", "twin.module.1.", "mixing.")
    assert all(key.startswith(known) for key in method.state_dict()), "as old checkpoints have it"


def test_two_heads_are_refused_where_only_one_would_learn():
    with pytest.raises(ConfigError, match=r"choose a mixup and mixup\.placement=add"):
        classifier("samix", settings=TWO, placement="replace")
    with pytest.raises(ConfigError, match=r"choose a mixup and mixup\.placement=add"):
        classifier("mixup", settings=TWO)
    assert classifier("mixup", settings=TWO, placement="add").mixed_projector is not None


@pytest.mark.parametrize("mixing", ["samix", "mixup"])
def test_every_weight_has_a_gradient_in_every_step_and_the_heads_learn_in_theirs(
    mixing, monkeypatch
):
    """DDP waits for the gradient of each weight, and a fused optimizer wants them all at once."""
    method = classifier(mixing, settings=TWO, placement="add", during=(0.5, 1.0))
    monkeypatch.setattr(type(method), "total_steps", 10)
    monkeypatch.setattr(method, "log_dict", lambda *args, **kwargs: None)
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    groups = parameter_groups(method, 1e-4)  # the Mixer's of its own: it may rest
    optimizer = torch.optim.SGD(groups, 0.1, 0.9, fused=True)
    for step, learns in ((0, False), (5, True), (4, False)):
        monkeypatch.setattr(type(method), "global_step", step)
        optimizer.zero_grad()
        method.training_step(batch(), 0).backward()
        assert with_gradient(method) == trained, step
        slopes = [p.grad.abs().max() for p in method.mixed_projector.parameters()]
        assert [bool(slope > 0) for slope in slopes] == [learns, learns], step
        assert method.projector.weight.grad.abs().max() > 0
        method.on_before_optimizer_step(optimizer)
        optimizer.step()


@pytest.mark.slow  # tests/test_compiling.py compiles a method's passes
def test_compiled_passes_of_two_heads_give_the_same_losses_and_gradients():
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        method = classifier("samix", settings=TWO)
        if compiled:
            method.compile_passes(backend="aot_eager")
        losses = terms(method.double(), dtype=torch.float64).losses
        runs.append((losses, gradients(method, sum(losses.values()))))
    (losses, slopes), (same_losses, same_slopes) = runs
    assert slopes.keys() == same_slopes.keys()
    for wanted, got in ((losses, same_losses), (slopes, same_slopes)):
        for key, value in wanted.items():
            torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-9)
