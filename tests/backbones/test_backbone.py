"""Every backbone's face."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from ssl_samix.errors import ConfigError
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.resnet import RESNETS
from ssl_samix.trainer import memory_format


def weights(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_parameter_counts_are_torchvisions(name):
    reference = torchvision.models.get_model(name, weights=None)
    reference.fc = nn.Identity()
    assert weights(Backbone(name, image_size=224)) == weights(reference)


def test_resnet10_has_one_block_a_stage():
    reference = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    reference.fc = nn.Identity()
    assert weights(Backbone("resnet10", image_size=224)) == weights(reference)


def test_parameter_count_of_resnext101_32x4d():
    """torchvision has no such model, but the block it would be made of; timm's count agrees."""
    block = torchvision.models.resnet.Bottleneck
    reference = torchvision.models.ResNet(block, [3, 4, 23, 3], groups=32, width_per_group=4)
    reference.fc = nn.Identity()
    count = weights(Backbone("resnext101_32x4d", image_size=224))
    assert count == weights(reference)
    assert count == weights(timm.create_model("resnext101_32x4d", num_classes=0))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_full_width_is_torchvisions_network(name):
    reference = torchvision.models.get_model(name, weights=None)
    reference.fc = nn.Identity()
    backbone = Backbone(name, image_size=64)
    backbone.trunk.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone.eval()(images), reference.eval()(images))


@pytest.mark.parametrize(
    ("size", "stem", "small"),
    [(32, "auto", True), (63, "auto", True), (64, "auto", False), (96, "small", True),
     (32, "standard", False)],
)  # fmt: skip
def test_stem_follows_the_image_size_unless_forced(size, stem, small):
    conv = Backbone("resnet18", image_size=size, width=4, stem=stem).trunk.conv1
    assert (conv.kernel_size, conv.stride) == (((3, 3), (1, 1)) if small else ((7, 7), (2, 2)))


@pytest.mark.parametrize(
    ("name", "size", "channels", "strides"),
    [
        ("resnet18", 32, (64, 128, 256, 512), (1, 2, 4, 8)),
        ("resnet50", 64, (256, 512, 1024, 2048), (4, 8, 16, 32)),
        ("convnext_tiny", 64, (96, 192, 384, 768), (4, 8, 16, 32)),
        ("vit_tiny_patch16_224", 64, (192,) * 4, (16,) * 4),
        ("swin_tiny_patch4_window7_224", 224, (96, 192, 384, 768), (4, 8, 16, 32)),
        ("swin_t", 64, (96, 192, 384, 768), (4, 8, 16, 32)),
        ("regnet_y_400mf", 64, (48, 104, 208, 440), (4, 8, 16, 32)),
    ],
)
def test_stage_maps_are_as_stated(name, size, channels, strides):
    backbone = Backbone(name, image_size=size).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = backbone.features(images)
        pooled = backbone(images)
        third = backbone.stage_map(images, 3)
    torch.testing.assert_close(features.pooled, pooled)
    assert pooled.shape == (2, backbone.feature_dim)
    for stage, (c, s) in enumerate(zip(channels, strides, strict=True), start=1):
        assert features.maps[stage].shape == (2, c, size // s, size // s)
        assert (backbone.map_spec(stage).channels, backbone.map_spec(stage).stride) == (c, s)
    torch.testing.assert_close(third, features.maps[3])


def test_building_moves_no_statistics():
    buffers = dict(Backbone("resnet18", image_size=32, width=4).named_buffers())
    assert float(buffers["trunk.bn1.num_batches_tracked"]) == 0
    assert torch.equal(buffers["trunk.bn1.running_mean"], torch.zeros(4))


def test_width_scales_every_stage():
    backbone = Backbone("resnet50", image_size=32, width=8)
    assert backbone.feature_dim == 8 * 8 * 4
    assert backbone.map_spec(3).channels == 8 * 4 * 4


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "resnet19"}, "did you mean 'resnet18'"),
        ({"name": "resnet19", "width": 16}, "did you mean 'resnet18'"),
        ({"name": "resnet18", "width": 0}, "backbone.width of resnet18 must be"),
        ({"name": "convnext_tiny", "width": 16}, "is for ResNets"),
        ({"name": "convnext_tiny", "stem": "small"}, "is for ResNets"),
        ({"name": "resnet18", "stem": "smal"}, "did you mean 'small'"),
        ({"name": "vgg11", "image_size": 8}, "cannot take images of 8 px"),
        ({"name": "inception_v3"}, "cannot take images of 32 px"),
        ({"name": "vit_tiny_patch16_224", "image_size": 30}, "not a multiple of its patch"),
        ({"name": "resnet18", "options": {"patch_size": 4}}, "are for timm models"),
        ({"name": "vit_tiny_patch16_224", "options": {"no_such": 4}}, "no_such"),
    ],
)
def test_what_does_not_fit_is_one_sentence(settings, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        Backbone(**{"image_size": 32, **settings})
    assert "\n" not in str(caught.value)


def test_a_missing_stage_is_named():
    backbone = Backbone("resnet18", image_size=32, width=4)
    with pytest.raises(ConfigError, match="has no stage 5; its stages: 1, 2, 3, 4"):
        backbone.map_spec(5)
    with pytest.raises(ConfigError, match="its stages: none"):
        Backbone("shufflenet_v2_x0_5", image_size=64).map_spec(3)


@pytest.mark.parametrize(("width", "contiguous"), [(4, True), (8, True), (16, False)])
def test_a_very_narrow_network_computes_in_its_own_layout(width, contiguous):
    """oneDNN's strided 1x1 convolution of few channels_last channels corrupts memory."""
    backbone = Backbone("resnet18", image_size=16, width=width)
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    maps = [
        backbone.stage_map(images, 1),
        backbone.map_and_features(images, 1)[0],
        backbone.features(images).maps[1],
    ]
    assert [m.is_contiguous() for m in maps] == [contiguous] * 3
    seen = []
    backbone.trunk.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    backbone(images)
    assert seen[0].is_contiguous() == contiguous


def test_narrow_convolutions_without_stride_keep_channels_last():
    net = Backbone("efficientnet_b0", image_size=32)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert min(conv.in_channels for conv in convs) < 8
    assert memory_format(net) == torch.channels_last


def test_a_very_narrow_network_trains_at_a_size_where_memory_was_corrupted():
    code = """
import torch
from ssl_samix.models.backbone import Backbone
from ssl_samix.trainer import memory_format
for width in (8, 12):
    backbone = Backbone("resnet18", image_size=96, stem="small", width=width)
    backbone.to(memory_format=memory_format(backbone))
    images = torch.randn(4, 3, 96, 96).to(memory_format=torch.channels_last)
    for size in range(4):
        backbone(images).square().mean().backward()
        torch.randn(100_000 + size)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def gradients(backbone, images):
    backbone.zero_grad()
    maps, pooled = backbone.map_and_features(images, 3)
    (pooled.square().sum() + maps.square().mean()).backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "test_vit"])
def test_checkpointing_changes_no_number(name):
    size, settings = (32, {"width": 8}) if name in RESNETS else (160, {})
    plain = Backbone(name, image_size=size, **settings)
    saving = Backbone(name, image_size=size, checkpointing=True, **settings)
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, size, size)
    wanted, got = gradients(plain, images), gradients(saving, images)
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-5, atol=1e-6)
    for key, tensor in plain.state_dict().items():  # among them the normalisation statistics
        torch.testing.assert_close(saving.state_dict()[key], tensor, rtol=0, atol=0)


def test_checkpointing_keeps_less():
    def kept(backbone):
        tensors = []

        def keep(tensor):
            tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            backbone(torch.randn(8, 3, 32, 32))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        return sum(size for place, size in storages.items() if place not in weights)

    plain, saving = (
        kept(Backbone("resnet18", 32, width=8, checkpointing=on)) for on in (False, True)
    )
    assert saving < plain / 2


def test_a_model_that_cannot_checkpoint_says_so():
    with pytest.raises(ConfigError, match="checkpointing"):
        Backbone("alexnet", image_size=64, checkpointing=True)
