"""Every recipe builds, trains a little on data laid out as its own, and is what it says."""

from __future__ import annotations

import contextlib
import pickle
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ssl_samix.cli.recipes import main, recipes
from ssl_samix.config.compose import build, compose, groups, recipe_command
from ssl_samix.data.layout import DATASETS
from ssl_samix.errors import ConfigError
from ssl_samix.models.backbone import Backbone
from ssl_samix.training.pretrain import train_from_words as pretrain
from ssl_samix.training.run import build_optimizer
from ssl_samix.training.supervised import train_from_words as supervised
from ssl_samix.types import Batch, MixPlan

ROOT = Path(__file__).resolve().parent.parent
JOBS = {"pretrain": pretrain, "supervised": supervised}
RECIPES = {recipe.name: recipe for recipe in recipes()}
SUPERVISED = sorted(n for n, r in RECIPES.items() if r.command == "supervised")
CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "tiny_imagenet": 200, "imagenet": 1000}
SIZES = {"cifar10": 32, "cifar100": 32, "stl10": 96, "tiny_imagenet": 64, "imagenet": 224}
# Trained in every run of the tests, one for each command; the others by ``pytest -m slow``.
QUICK = {"cifar10/mocov2", "tiny_imagenet/resnet18"}
# Weights in millions with the classifier of all classes (timm's table, torchvision's models).
MILLIONS = {
    "imagenet/resnet18": 11.69, "imagenet/resnet34": 21.80, "imagenet/resnet50": 25.56,
    "imagenet/resnet101": 44.55, "imagenet/resnext101_32x4d": 44.18, "imagenet/vit_small": 22.05,
    "imagenet/swin_tiny": 28.29, "imagenet/convnext_tiny": 28.59, "cifar10/resnet18": 11.17,
    "cifar100/resnet18": 11.22, "tiny_imagenet/resnet18": 11.27,
}  # fmt: skip
# Published learning rate at the published global batch; the share of it that is left at the end.
RATES = {
    "imagenet/resnet18": (0.1, 256, 0), "imagenet/resnet34": (0.1, 256, 0),
    "imagenet/resnet50": (0.1, 256, 0), "imagenet/resnet101": (0.1, 256, 0),
    "imagenet/resnext101_32x4d": (0.1, 256, 0), "imagenet/vit_small": (1e-3, 1024, 1e-5),
    "imagenet/swin_tiny": (1e-3, 1024, 1e-5), "imagenet/convnext_tiny": (4e-3, 4096, 1e-6),
    "cifar10/resnet18": (0.1, 100, 0.05), "cifar100/resnet18": (0.1, 100, 0.05),
    "tiny_imagenet/resnet18": (0.2, 100, 0.05), "imagenet/mocov2": (0.03, 256, 0),
    "imagenet/simclr": (4.8, 4096, 0), "imagenet/byol": (3.2, 4096, 0),
}  # fmt: skip
RATES |= {
    f"{data}/{method}": (0.06 * 4, 512, 0)  # 0.06 for 128 images
    for data in ("cifar10", "cifar100", "stl10", "tiny_imagenet")
    for method in ("mocov2", "simclr", "byol")
}
# Two steps of 2 or 4 images at 224 px; at smaller sizes, where classes need an image each,
# narrow networks; not of width 8: torch 2.15 crashes in the backward pass of a 1x1 convolution
# with stride 2 of 8 channels (channels_last, 48 px and more, CPUs with AVX-512).
SHORT = ["trainer.max_epochs=1", "callbacks.pictures.rows=1", "data.workers=0"]
HEAVY = ("imagenet/resnet101", "imagenet/resnext101_32x4d", "imagenet/convnext_tiny")
NARROW = ["backbone.width=16", "data.limit=null"]


@cache  # of a third of a second, and each is read by several tests
def composed(name, *words):
    return compose(RECIPES[name].command, [f"experiment={name}", *words])


def noise(size, seed):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (size, size, 3), dtype=np.uint8)


def write_cifar(root, name, files, key, names_key):
    home, classes = root / DATASETS[name].folder, CLASSES[name]
    home.mkdir(parents=True)
    for number, (file, count) in enumerate(files.items()):
        rows = np.stack([noise(32, i).transpose(2, 0, 1).ravel() for i in range(count)])
        entry = {"data": rows, key: [(i + number * count) % classes for i in range(count)]}
        (home / file).write_bytes(pickle.dumps(entry))
    names = {names_key: [f"class {k}" for k in range(classes)]}
    (home / DATASETS[name].needs[-1]).write_bytes(pickle.dumps(names))


def write_stl10(root):
    home = root / "stl10_binary"
    home.mkdir()
    for part, count in (("train", 10), ("test", 10), ("unlabeled", 8)):
        np.stack([noise(96, i).transpose(2, 1, 0) for i in range(count)]).tofile(
            home / f"{part}_X.bin"
        )
        if part != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(home / f"{part}_y.bin")


def write_folders(root, size, train, val):
    for split, count in (("train", train), ("val", val)):
        for name in ("n01440764", "n01443537"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(noise(size, i + 7 * (split == "val")))
                picture.save(root / split / name / f"{name}_{i}.JPEG")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder -> root of small data, laid out as the real ones are."""
    root = tmp_path_factory.mktemp("data")
    batches = {f"data_batch_{i}": 4 for i in range(1, 6)} | {"test_batch": 10}
    write_cifar(root / "cifar10", "cifar10", batches, "labels", "label_names")
    files = {"train": 100, "test": 100}
    write_cifar(root / "cifar100", "cifar100", files, "fine_labels", "fine_label_names")
    (root / "stl10").mkdir()
    write_stl10(root / "stl10")
    write_folders(root / "tiny_imagenet" / "tiny-imagenet-200", 64, 4, 2)
    write_folders(root / "imagenet", 240, 4, 1)
    return root


@pytest.fixture
def _small_is_whole(monkeypatch):
    """Let torchvision accept data sets that are smaller than the real ones."""
    for kind in (torchvision.datasets.CIFAR10, torchvision.datasets.STL10):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)


def weights(backbone, classes):
    """Millions of weights with a linear classifier."""
    own = sum(p.numel() for p in backbone.parameters())
    return (own + (backbone.feature_dim + 1) * classes) / 1e6


@pytest.fixture
def _on_meta(monkeypatch):
    """Make tensors that have a shape and no numbers, of which nothing is computed."""
    # Meta tensors have no mixed precision.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("_on_meta")
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_its_networks_make_a_step_at_their_full_size(name):
    recipe, kind = RECIPES[name], name.split("/")[0]
    # One group of MoCo's: a pass for each takes seconds without any numbers, too.
    config = composed(name)[0].copy()
    if "moco" in name:
        config.method.bn_groups = 1
    size, images = config.data.image_size, 64
    backbone = build(config.backbone, image_size=size)
    parts = {"mixing": build(config.mixup, backbone=backbone), "optimizer": build_optimizer(config)}
    if recipe.command == "pretrain":
        method = build(config.method, backbone=backbone, **parts)
    else:
        method = build(config.classifier, backbone=backbone, classes=CLASSES[kind], **parts)
        assert method.mixed_projector is not None, "a head for mixtures, as published"
    rows = torch.arange(images)
    # Beta's samples cannot be drawn on meta.
    method.mixing.draw = lambda _: MixPlan(torch.rand(images), rows, rows)
    views = tuple(torch.empty(images, 3, size, size) for _ in range(2))
    batch = Batch(views, torch.zeros(images, dtype=torch.long), rows)
    with method.memory.step():
        losses = method.mixing(method, batch, 0, 10).losses
    assert set(losses) == {"own", "mix", "mixer"}, "the Mixer read the maps of this backbone"
    sum(losses.values()).backward()
    for part in (backbone, method.mixing.policy):
        assert all(p.grad is not None for p in part.parameters() if p.requires_grad)
    assert size == SIZES[kind]
    if name in MILLIONS:
        assert weights(backbone, CLASSES[kind]) == pytest.approx(MILLIONS[name], abs=0.005)
        assert backbone.small_stem == (size < 64 or kind == "tiny_imagenet")


TRAINED = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(RECIPES)
]


@pytest.mark.usefixtures("_small_is_whole")
@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_a_few_steps(name, data, tmp_path):
    recipe, kind = RECIPES[name], name.split("/")[0]
    words = [f"experiment={name}", f"data.root={data / kind}", f"out={tmp_path / 'run'}", *SHORT]
    words += ["data.batch_size=4"] if kind != "cifar100" else ["data.batch_size=50"]
    words += NARROW if kind != "imagenet" else []
    if name in HEAVY:
        words += ["data.batch_size=2", "data.limit=4"]
    if recipe.command == "pretrain":
        words += ["data.limit=8"] if kind != "cifar100" else []
        words += ["method.hidden_dim=64"] if name.endswith(("byol", "simclr")) else []
        words += ["method.queue_size=32", "method.bn_groups=1"] if "moco" in name else []
        # The networks at 224 px are the supervised recipes' too: two views of all cost minutes.
        words += ["backbone.width=16"] if kind == "imagenet" else []
    run = JOBS[recipe.command](words)
    steps = {"cifar10": 5, "cifar100": 2}.get(kind, 2) if recipe.command == "supervised" else 2
    assert run.metrics["step"] == steps
    assert np.isfinite(run.metrics["loss"])
    assert run.metrics["mixer/local"] > 0, "the Mixer read the maps of this backbone"
    assert (run.out / "mixer.safetensors").exists()
    assert run.encoder.image_size == SIZES[kind]


@pytest.mark.parametrize(
    ("name", "cifar10", "imagenet"),
    [("18", 11.17, 11.69), ("34", 21.28, 21.80), ("50", 23.52, 25.56), ("101", 42.51, 44.55)],
)
def test_whose_numbers_of_weights_the_published_table_has(name, cifar10, imagenet):
    """OpenMixup's page on ImageNet lists those for CIFAR-10; ours are torchvision's, as said."""
    with torch.device("meta"):
        small = Backbone(f"resnet{name}", 32)
    assert weights(small, 10) == pytest.approx(cifar10, abs=0.005)
    known = getattr(torchvision.models, f"ResNet{name}_Weights").IMAGENET1K_V1.meta["num_params"]
    assert known / 1e6 == pytest.approx(imagenet, abs=0.005)
    assert MILLIONS[f"imagenet/resnet{name}"] == imagenet
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert f"{cifar10:.2f}" in text
    assert f"{imagenet:.2f}" in text


@pytest.mark.usefixtures("_small_is_whole")
def test_classifiers_learn_from_the_labelled_part(data, tmp_path):
    """STL-10's many images without labels are for pretraining."""
    words = ["data=stl10", f"data.root={data / 'stl10'}", "data.batch_size=5", *SHORT]
    run = supervised([*words, "backbone.width=8", f"out={tmp_path / 'run'}"])
    assert run.metrics["step"] == 2  # of 10 labelled images, not of the 8 others
    assert "val/top1" in run.metrics


def test_every_recipe_is_checked_here():
    assert set(RATES) == set(RECIPES)
    assert set(MILLIONS) == set(SUPERVISED)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_learning_rate_is_the_published_one_on_any_number_of_devices(name):
    rate, batch, end = RATES[name]
    for words in ((), ("trainer.devices=8",)):
        config, _ = composed(name, *words)
        # The batch is that of all devices, so that nothing changes with their number.
        assert config.data.batch_size == batch
        optimizer = build(config.optimizer)
        assert optimizer.scaled_lr(batch) == pytest.approx(rate)
        assert optimizer.final * rate == pytest.approx(end)
    # Twice the batch, twice the rate.
    assert optimizer.scaled_lr(2 * batch) == pytest.approx(2 * rate)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_plain_method_is_a_word_away(name):
    config, choices = composed(name, "mixup=none", "trainer.max_epochs=7")
    assert not config.mixup
    assert choices["mixup"] == "none"
    assert config.trainer.max_epochs == 7


def test_a_recipe_says_its_own_length():
    for recipe in recipes():
        config, _ = composed(recipe.name)
        assert recipe.epochs == f"{config.trainer.max_epochs} epochs"


def test_all_are_listed():
    shown = main([])
    assert set(re.findall(r"experiment=(\S+)", shown)) == set(groups()["experiment"])
    assert len(main(["imagenet", "supervised", "resnet"]).splitlines()) == 2 + 5
    assert "samix supervised experiment=imagenet/swin_tiny" in main(["swin"])
    with pytest.raises(ConfigError, match="no recipe holds swim"):
        main(["swim"])


def test_the_page_has_a_row_for_each():
    rows = re.findall(r"^\| `(\w+/\w+)` \|", (ROOT / "docs" / "recipes.md").read_text(), re.M)
    assert sorted(rows) == sorted(RECIPES)


def test_a_recipe_of_the_other_command_is_named(fails):
    assert fails("pretrain", "experiment=imagenet/resnet18") == (
        "samix: experiment=imagenet/resnet18 is a recipe of samix supervised"
    )
    assert "did you mean 'cifar10/simclr'" in fails("pretrain", "experiment=cifar10/simcl")
    assert recipe_command(ROOT / "configs" / "experiment" / "cifar10" / "byol.yaml") == "pretrain"


def test_what_a_recipe_sets_is_for_its_own_choices():
    """Another choice comes with its own settings, the rest of the recipe stays."""
    config, choices = composed("imagenet/swin_tiny", "backbone=resnet50")
    assert (config.backbone.name, config.backbone.options) == ("resnet50", {})
    assert (config.trainer.max_epochs, choices["experiment"]) == (300, "imagenet/swin_tiny")
    config, _ = composed("imagenet/vit_small", "mixup=cutmix", "mixup.alpha=0.5", "optimizer.lr=1")
    alone, _ = compose("supervised", ["mixup=cutmix", "mixup.alpha=0.5"])
    assert config.mixup == alone.mixup
    assert config.backbone.options == {"patch_size": 16, "drop_path_rate": 0.1}
    assert (config.optimizer.lr, config.data.batch_size) == (1, 1024)
    config, _ = composed("cifar10/mocov2", "method=simclr", "optimizer=adamw")
    alone, _ = compose("pretrain", ["method=simclr", "optimizer=adamw"])
    assert (config.method, config.optimizer) == (alone.method, alone.optimizer)
    assert (config.data.name, config.data.batch_size) == ("cifar10", 512)
    assert config.views == alone.views
    same, _ = composed("imagenet/byol", "mixup=samix", "method=byol")
    assert same == composed("imagenet/byol")[0]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_mixers_rate_is_one_that_it_can_learn_with(name):
    """LARS does not scale what has no weight decay: the Mixer would get the whole of it."""
    config, _ = composed(name)
    optimizer = build(config.optimizer)
    assert optimizer.scaled_lr(config.data.batch_size) * config.mixup.lr <= 0.25
