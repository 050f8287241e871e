"""Training on labels: what moves, what does not, and by how much."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from ssl_samix.eval_protocols import linear, semi_supervised

from ssl_samix import trainer as engine
from ssl_samix.config.compose import compose, groups
from ssl_samix.data.datamodule import CROP_AND_FLIP, LabelledData
from ssl_samix.data.images import MemoryImages
from ssl_samix.errors import ConfigError
from ssl_samix.evaluation.measures import top1_top5
from ssl_samix.evaluation.training import Classifier, Recipe, fit
from ssl_samix.models.backbone import Backbone

SGD = Recipe(optimizer="sgd", lr=(0.5,), schedule="cosine", epochs=2, batch_size=8)
CPU = torch.device("cpu")


class Watch(pl.Callback):
    """Keeps what the optimizer used, and what it was given."""

    def __init__(self):
        self.lrs, self.batches, self.losses = [], [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.lrs.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.batches.append(batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.losses.append(float(outputs["loss"]))


def two_colours(count=32, seed=0):
    """Images that are light or dark; light is class 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    noise = torch.randint(60, (count, 3, 16, 16), generator=generator)
    pixels = (noise + 180 * labels[:, None, None, None]).to(torch.uint8)
    return MemoryImages(pixels, labels, [str(i) for i in range(count)])


def data(images, batch_size=8, picks=None):
    picks = range(len(images)) if picks is None else picks
    half = [0.5] * 3
    return LabelledData(images, picks, CROP_AND_FLIP, half, half, batch_size=batch_size, seed=0)


@pytest.fixture
def backbone():
    return Backbone("resnet18", image_size=16, width=4)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_frozen_backbone_does_not_move_in_any_entry(backbone):
    before = state(backbone)
    module = fit(backbone, 2, SGD, data(two_colours()), seed=0, device=CPU)
    for name, tensor in module.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not module.heads[0].bias.detach().eq(0).all()


def test_fine_tuning_moves_its_copy_and_not_the_encoder(backbone):
    before = state(backbone)
    recipe = replace(SGD, backbone_lr=0.1)
    module = fit(backbone, 2, recipe, data(two_colours()), seed=0, device=CPU)
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())
    tuned = module.backbone.state_dict()
    assert not torch.equal(tuned["trunk.conv1.weight"], before["trunk.conv1.weight"])
    assert not torch.equal(tuned["trunk.bn1.running_mean"], before["trunk.bn1.running_mean"])


def test_heads_trained_together_are_those_trained_alone(backbone):
    together = fit(
        backbone, 2, replace(SGD, lr=(0.5, 0.05)), data(two_colours()), seed=0, device=CPU
    )
    alone = fit(backbone, 2, SGD, data(two_colours()), seed=0, device=CPU)
    torch.testing.assert_close(together.heads[0].weight, alone.heads[0].weight)
    assert not torch.allclose(together.heads[1].weight, alone.heads[0].weight, atol=1e-3)


def test_the_step_is_that_of_plain_sgd(backbone, monkeypatch):
    """Against a loop written out: momentum, weight decay, cosine, scaled learning rate."""
    monkeypatch.setattr(engine, "choose_precision", lambda _: "32-true")  # the loop's
    watch = Watch()
    recipe = replace(SGD, weight_decay=0.01, lr=(3.0,))
    module = fit(backbone, 2, recipe, data(two_colours()), seed=3, device=CPU, callbacks=[watch])
    start = Classifier(backbone, 2, recipe, seed=3)
    weight, bias = (p.detach().clone() for p in start.heads[0].parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    backbone.eval()
    steps = len(watch.batches)
    assert steps == 8
    for step, batch in enumerate(watch.batches):
        lr = 3.0 * 8 / 256 * 0.5 * (1 + math.cos(math.pi * step / steps))
        assert watch.lrs[step] == pytest.approx([lr])
        with torch.no_grad():
            features = backbone(batch.views[0])
        slope = (features @ weight.T + bias).softmax(1) - F.one_hot(batch.label, 2)
        slopes = [slope.T @ features / 8 + 0.01 * weight, slope.mean(0) + 0.01 * bias]
        velocity = [0.9 * v + slope for v, slope in zip(velocity, slopes, strict=True)]
        weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    torch.testing.assert_close(module.heads[0].weight.detach(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.heads[0].bias.detach(), bias, rtol=1e-4, atol=1e-5)


def test_standardized_heads_read_features_of_mean_0_and_variance_1(backbone):
    recipe = replace(SGD, standardize=True)
    module, plain = (Classifier(backbone, 2, r, seed=0) for r in (recipe, SGD))
    features = 7 + 3 * torch.randn(64, backbone.feature_dim)
    scaled = (features - features.mean(dim=0)) / features.var(dim=0, unbiased=False).sqrt()
    logits = module.logits(features)[0]
    torch.testing.assert_close(logits, module.heads[0](scaled), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.logits(features)[0], plain.heads[0](features))
    assert not list(module.scaling.parameters())
    learned = fit(backbone, 2, recipe, data(two_colours()), seed=0, device=CPU)
    assert learned.scaling.running_mean.abs().max() > 0.1
    assert not learned.scaling.training, "one image must have an answer of its own"


def test_learning_rates_of_backbone_and_heads(backbone):
    watch = Watch()
    recipe = replace(
        SGD, backbone_lr=0.2, schedule="step", milestones=(0.5,), gamma=0.1, epochs=4, lr=(1.0, 2.0)
    )
    fit(backbone, 2, recipe, data(two_colours()), seed=0, device=CPU, callbacks=[watch])
    scale = 8 / 256
    assert watch.lrs[0] == pytest.approx([1.0 * scale, 2.0 * scale, 0.2 * scale])
    assert watch.lrs[7] == pytest.approx(watch.lrs[0])  # the last step of the second epoch
    assert watch.lrs[8] == pytest.approx([0.1 * lr for lr in watch.lrs[0]])


def test_milestones_are_met_exactly():
    recipe = Recipe(
        optimizer="sgd",
        lr=(30,),
        schedule="step",
        milestones=(0.6, 0.8),
        epochs=100,
        batch_size=256,
    )
    factors = [recipe.factor(epoch / 100) for epoch in (0, 59, 60, 79, 80, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_what_can_be_learned_is_learned(backbone):
    recipe = replace(SGD, lr=(1.0,), backbone_lr=1.0, epochs=8)
    module = fit(backbone, 2, recipe, data(two_colours(64)), seed=0, device=CPU)
    test = two_colours(64, seed=1)
    with torch.no_grad():
        features = module.backbone((test.pixels.float() / 255 - 0.5) / 0.5)
        logits = module.logits(features)[0]
    assert top1_top5(logits, test.labels)[0] == 100


def test_only_the_picked_images_are_seen_once_an_epoch():
    picks = [3, 5, 8, 13, 21, 34]
    sampler = data(two_colours(), batch_size=2, picks=picks).train_dataloader().sampler
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([i for _, batch in sampler for i in batch])
    assert sorted(epochs[0]) == sorted(epochs[1]) == [3, 5, 8, 13, 21, 34]
    assert epochs[0] != epochs[1]


def test_few_labels_are_one_batch(backbone):
    watch = Watch()
    labelled = data(two_colours(), batch_size=256, picks=[0, 1, 2, 3])
    fit(backbone, 2, SGD, labelled, seed=0, device=CPU, callbacks=[watch])
    assert [len(b.label) for b in watch.batches] == [4, 4]
    assert sorted(watch.batches[0].index.tolist()) == [0, 1, 2, 3]


def test_accuracies():
    logits = torch.eye(6)[torch.tensor([0, 1, 2, 3])] + torch.tensor(
        [0, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3]
    )
    assert top1_top5(logits, torch.tensor([0, 1, 2, 4])) == (75.0, 100.0)
    assert top1_top5(logits, torch.tensor([0, 1, 2, 0])) == (75.0, 75.0)  # the sixth of six
    assert top1_top5(logits[:, :2], torch.tensor([0, 1, 1, 1]))[1] == 100.0


@pytest.mark.parametrize("name", groups()["preset"])
def test_presets_of_the_linear_probe(name):
    config, _ = compose("linear", ["data=digits", f"preset={name}"])
    assert linear.recipe(config).backbone_lr == 0


def test_published_values():
    """Times batch / 256; MoCo v3 and SimCLR on CIFAR state 0.1 at 1024 and at 512 images."""
    found = {
        name: linear.recipe(compose("linear", ["data=digits", f"preset={name}"])[0])
        for name in groups()["preset"]
    }
    at_own_batch = {n: r.lr[0] * r.batch_size / 256 for n, r in found.items()}
    assert at_own_batch == pytest.approx(
        {
            "moco": 30,
            "mocov3": 0.1,
            "simclr": 0.1,
            "simclr_cifar": 0.1,
            "byol": 0.2,
            "simsiam": 1.6,
            "solo": 0.3,
            "samix_small": 1.0,
        }
    )
    epochs = {n: r.epochs for n, r in found.items()}
    assert epochs == {
        "moco": 100, "mocov3": 90, "simclr": 90, "simclr_cifar": 100, "byol": 80, "simsiam": 90,
        "solo": 100, "samix_small": 100,
    }  # fmt: skip


@pytest.mark.parametrize("name", groups()["finetune"])
def test_presets_of_fine_tuning(name):
    config, _ = compose("semi", ["data=digits", f"finetune={name}"])
    found = semi_supervised.recipes(config)
    assert len(found) == (9 if name.startswith("openmixup") else 1)
    assert all(recipe.backbone_lr > 0 for recipe in found)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optimizer": "sgdd"}, "did you mean 'sgd'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"lr": ()}, "at least one learning rate"),
        ({"lr": (-1.0,)}, "lr must be a number at least"),
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": 1}, "batch_size must be"),
        ({"milestones": (60,)}, "milestones must be"),
    ],
)
def test_recipes_out_of_range(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace(SGD, **settings)
