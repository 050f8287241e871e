"""Weights that torchvision's and timm's own constructors take."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from ssl_samix.artifacts.encoder import load_encoder
from ssl_samix.errors import ConfigError
from tests.export.conftest import ENCODERS, exported, saved


def without(path, model):
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model


def small_stem(model):
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def squeezenet():
    model = torchvision.models.squeezenet1_1()
    model.classifier = nn.AdaptiveAvgPool2d(1)
    return model


# (encoder, format) -> the library's network
NETWORKS = {
    ("standard", "torchvision"): lambda: without("fc", torchvision.models.resnet18()),
    ("resnet50", "torchvision"): lambda: without("fc", torchvision.models.resnet50()),
    ("small", "torchvision"): lambda: small_stem(without("fc", torchvision.models.resnet18())),
    ("torchvision", "torchvision"): lambda: without(
        "classifier.3", torchvision.models.mobilenet_v3_small()
    ),
    ("squeezenet", "torchvision"): squeezenet,
    ("googlenet", "torchvision"): lambda: without(
        "fc", torchvision.models.googlenet(aux_logits=False, init_weights=False)
    ),
    ("standard", "timm"): lambda: timm.create_model("resnet18", num_classes=0),
    ("small", "timm"): lambda: small_stem(timm.create_model("resnet18", num_classes=0)),
    ("vit", "timm"): lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=2
    ),
    ("timm", "timm"): lambda: timm.create_model("mobilenetv3_small_050", num_classes=0),
}


@pytest.mark.parametrize(("kind", "name"), NETWORKS)
def test_the_librarys_own_network_takes_the_weights_and_gives_the_same_features(
    kind, name, tmp_path
):
    run = saved(tmp_path / "run", kind)
    done = exported(run, name)
    assert done.path == run / "encoder.pth"
    weights = torch.load(done.path, weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in weights.values())
    model = NETWORKS[kind, name]()
    model.load_state_dict(weights, strict=True)
    size = ENCODERS[kind]["image_size"]
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        wanted = load_encoder(run)(images)
        torch.testing.assert_close(model.eval()(images), wanted, rtol=0, atol=1e-5)
        # What the user is told to write makes the same network.
        told = {"images": images}
        exec(done.usage, told)
        torch.testing.assert_close(told["features"], wanted, rtol=0, atol=1e-5)


RESNETS = ["small resnet10", "narrow", "narrow_standard", "wide resnet10", "narrow resnet50",
           "narrow resnext"]  # fmt: skip


@pytest.mark.parametrize("name", ["timm", "torchvision"])
@pytest.mark.parametrize("kind", RESNETS)
def test_resnets_of_any_width_and_stem_are_the_librarys_own(kind, name, tmp_path):
    """The lines that are printed need nothing but the library."""
    run = saved(tmp_path / "run", kind)
    done = exported(run, name)
    assert "ssl_samix" not in done.usage
    size = ENCODERS[kind]["image_size"]
    told = {"images": torch.randn(4, 3, size, size)}
    with torch.no_grad():
        exec(done.usage, told)
        wanted = load_encoder(run)(told["images"])
    assert type(told["model"]).__module__.startswith(f"{name}.models.")
    torch.testing.assert_close(told["features"], wanted, rtol=0, atol=1e-5)


def test_a_mix_up_of_statistics_would_be_seen(tmp_path):
    for kind in ("standard", "small", "torchvision", "timm", "googlenet", "narrow"):
        encoder = load_encoder(saved(tmp_path / kind, kind))
        images = torch.randn(4, 3, encoder.image_size, encoder.image_size)
        with torch.no_grad():
            wanted = encoder(images)
            for module in encoder.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.reset_running_stats()
            assert (encoder(images) - wanted).abs().max() > 1e-2, kind


def test_the_lines_for_a_small_stem_are_told_word_by_word(tmp_path):
    done = exported(saved(tmp_path / "run", "small"), "torchvision", out=tmp_path / "it's.pth")
    assert done.usage.splitlines() == [
        "# images: float32 (B, 3, 32, 32), RGB in [0, 1] minus (0.4, 0.5, 0.6), "
        "divided by (0.2, 0.25, 0.3)",
        "import torch",
        "import torchvision",
        "block = torchvision.models.resnet.BasicBlock",
        "model = torchvision.models.ResNet(block, [2, 2, 2, 2], "
        "**{'groups': 1, 'width_per_group': 64})",
        "model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, padding=1, bias=False)",
        "model.maxpool = torch.nn.Identity()",
        "model.fc = torch.nn.Identity()",
        f'model.load_state_dict(torch.load("{tmp_path}/it\'s.pth", weights_only=True))',
        "features = model.eval()(images)",
    ]


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("vit", "torchvision", "is a model of timm.*: choose format=timm, format=onnx or"),
        (
            "torchvision",
            "timm",
            "is a model of torchvision.*: choose format=torchvision",
        ),
    ],
)
def test_what_a_library_cannot_build_is_refused_with_formats_that_work(
    kind, name, sentence, tmp_path
):
    run = saved(tmp_path / "run", kind)
    with pytest.raises(ConfigError, match=sentence) as caught:
        exported(run, name)
    assert str(caught.value).endswith("format=torch_export")
    assert [p.name for p in run.iterdir()] == ["encoder.safetensors"]
