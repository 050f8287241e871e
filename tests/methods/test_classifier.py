"""A classifier that mixes: who learns from which loss, and what the losses are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssl_samix.backbones.backbone import Backbone
from ssl_samix.choices import groups
from ssl_samix.config import build, compose
from ssl_samix.errors import ConfigError
from ssl_samix.methods.classifier import Classifier
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


def terms(method, step=0):
    torch.manual_seed(4)
    with method.memory.step():
        return method.mixing(method, method.taken(batch()), step, 10)


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


def test_the_mixers_losses_are_of_the_teachers_logits():
    """Local: two-way softmax over the parents' classes; global: the mixed cross-entropy."""
    method = classifier("samix", eta=0.5, mask_weight=0.0).eval()
    plan = MixPlan(torch.rand(8), torch.arange(8).roll(3), torch.arange(8))
    method.mixing.draw = lambda images: plan
    taken = method.taken(batch())
    with method.memory.step():
        logs = method.mixing.learn(method, taken, 0.0).logs
        images = taken.views[0]
        maps = method.teacher_backbone.stage_map(images, 3)
        mixed = method.mixing.policy.attached(images, images, plan, (maps, maps)).images
    logits = method.teacher(mixed)
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
