"""``samix convert openmixup``: another project's checkpoints give the same numbers here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.models import resnet18

from ssl_samix.artifacts.encoder import load_encoder
from ssl_samix.artifacts.mixer import Frozen, PretrainedObjective, load_mixer
from ssl_samix.artifacts.openmixup import read_text, side
from ssl_samix.cli.convert import main, parse_convert
from ssl_samix.errors import CheckpointError, ConfigError, UserError
from ssl_samix.mixup.mixer import MixBlock, bend
from ssl_samix.models.backbone import Backbone

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)
CONFIG = """
img_norm_cfg = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
train_pipeline = [
    dict(type='RandomResizedCrop', size=40, scale=(0.2, 1.0)),
    dict(type='RandomHorizontalFlip')
]
model = dict(
    type='AutoMixup',
    lam_margin=0.2,
    backbone=dict(type='ResNet', depth=18, style='pytorch', norm_cfg=dict(type='BN')),
    mix_block=dict(
        type='PixelMixBlock',
        unsampling_mode=['nearest'], lam_mul=True, lam_mul_k=1, lam_residual=True,
        use_scale=True,
        value_neck_cfg=dict(type='ConvNeck', norm_cfg=dict(type='BN'), with_last_dropout=0.1)),
    mix_args=dict(fill_std=[1, 1, 1], automix=dict(lam_margin=0)))
"""


def lively(module):
    """Give every normalisation statistics of its own: nobody can confuse them with a batch's."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.weight, 1, 0.1)
            nn.init.normal_(part.bias, std=0.1)
    return module.eval()


def mix_block(channels):
    """The state of a PixelMixBlock with SAMix's settings."""
    inner = channels // 2
    block = {
        "value.conv.0.conv.weight": torch.randn(inner, channels, 1, 1) / channels**0.5,
        "value.conv.0.bn.weight": torch.rand(inner) + 0.5,
        "value.conv.0.bn.bias": torch.randn(inner),
        "value.conv.0.bn.running_mean": torch.randn(inner),
        "value.conv.0.bn.running_var": torch.rand(inner) + 0.5,
        "value.conv.0.bn.num_batches_tracked": torch.tensor(7),
        "value.conv.1.conv.weight": torch.randn(1, inner, 1, 1) / inner**0.5,
    }
    for part in ("query", "key"):
        block[f"{part}.conv.weight"] = torch.randn(inner, 2 * channels, 1, 1) / channels**0.5
        block[f"{part}.conv.bias"] = torch.randn(inner)
    return block


def reference_mask(
    block, own, partner, lam, k, size, mode="bilinear", *, elu=True, scaled=True, gamma=1.0
):
    """PixelMixBlock's mask for the partner, one image and one position at a time, in float64."""
    w = {name: t.double() for name, t in block.items()}
    conv = {n.removesuffix(".weight"): t[:, :, 0, 0] for n, t in w.items() if t.ndim == 4}
    kappa = 1 + k
    bent = lam
    if k >= 0:
        bent = (4 / 3 * lam**3 - 2 * lam**2 + kappa * lam) / (kappa - 2 / 3)
    masks = []
    for mine, theirs in zip(own.double(), partner.double(), strict=True):
        side = mine.shape[-1]
        a = mine.flatten(1).T * (1 + gamma * bent)  # (positions, channels)
        b = theirs.flatten(1).T * (1 + gamma * (1 - bent))
        hidden = b @ conv["value.conv.0.conv"].T - w["value.conv.0.bn.running_mean"]
        hidden = hidden / (w["value.conv.0.bn.running_var"] + 1e-5).sqrt()
        hidden = hidden * w["value.conv.0.bn.weight"] + w["value.conv.0.bn.bias"]
        hidden = torch.where(hidden > 0, hidden, (hidden.exp() - 1) * elu)
        value = hidden @ conv["value.conv.1.conv"][0]
        query, key = (
            torch.cat([a, b], 1) @ conv[f"{n}.conv"].T + w[f"{n}.conv.bias"]
            for n in ("query", "key")
        )
        seen = []
        for one in query:
            likeness = key @ one / (len(one) ** 0.5 if scaled else 1)
            share = (likeness - likeness.max()).exp()
            seen.append((share / share.sum()) @ value)
        masks.append(torch.stack(seen).view(1, side, side))
    grown = F.interpolate(torch.stack(masks), scale_factor=size // side, mode=mode)
    return (1 / (1 + (-grown).exp())).float()


def network(width=None, small=True, name="resnet18"):
    """A ResNet whose state has the names that OpenMixup's have: torchvision's own if width=None."""
    if width is not None:
        return lively(Backbone(name, 32, width, "small" if small else "standard")).trunk
    net = resnet18(num_classes=1)
    if small:
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    net.fc = nn.Identity()
    return lively(net)


def checkpoint(width=8, small=True, classes=100, name="resnet18"):
    """State dict of an AutoMixup classifier, and its two networks."""
    q, k = network(width, small, name), network(width, small, name)
    channels = len(k.state_dict()["layer4.0.conv1.weight"]) // 2 * (4 if name == "resnet50" else 1)
    state = {f"backbone_q.{n}": t for n, t in q.state_dict().items()}
    for prefix in ("backbone_k", "backbone"):  # the second stands for the first
        state |= {f"{prefix}.{n}": t for n, t in k.state_dict().items()}
    state |= {f"mix_block.{n}": t for n, t in mix_block(channels).items()}
    for head in ("head_mix_q", "head_one_q", "head_mix_k", "head_one_k", "head"):
        state[f"{head}.fc.weight"] = torch.zeros(classes, 2 * channels)
        state[f"{head}.fc.bias"] = torch.zeros(classes)
    return state, q, k


def saved(tmp_path, content):
    path = tmp_path / "published.pth"
    torch.save(content, path)
    return path


def converted(tmp_path, state, *options, meta=None):
    """Convert a state dict and return the folder and what was printed."""
    path = saved(tmp_path, {"state_dict": state, "author": "openmixup", "meta": meta or {}})
    out = tmp_path / "out"
    return out, main(["openmixup", str(path), "-o", str(out), *options])


def refused(tmp_path, state, *options, meta=None):
    """Return the sentence for a state dict; nothing may have been written."""
    with pytest.raises(UserError) as error:
        converted(tmp_path, state, *options, meta=meta)
    assert not (tmp_path / "out").exists()
    return str(error.value)


# The Mixer's options


def test_ratios_are_bent_as_openmixup_bends_them():
    lam = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert bend(lam, None) is lam
    torch.testing.assert_close(bend(lam, 0.25), torch.tensor([0, 5 / 14, 0.5, 9 / 14, 1]))
    torch.testing.assert_close(bend(lam, 0.0), torch.tensor([0, 7 / 16, 0.5, 9 / 16, 1]))


def test_mixer_is_the_same_without_the_options():
    torch.manual_seed(3)
    plain = MixBlock(8)
    torch.manual_seed(3)
    named = MixBlock(8, activation="relu", lam_curve=None)
    assert list(plain.state_dict()) == list(named.state_dict())
    assert isinstance(plain.value[2], nn.ReLU)
    with pytest.raises(ConfigError, match=r"unknown mixup\.activation 'elo': did you mean 'elu'"):
        MixBlock(8, activation="elo")
    with pytest.raises(ConfigError, match="lam_curve must be a number at least 0"):
        MixBlock(8, lam_curve=-1)


# Whole checkpoints


def test_whole_checkpoint_gives_the_features_of_its_network(tmp_path):
    state, q, _ = checkpoint(width=None)
    out, said = converted(tmp_path, state)
    encoder = load_encoder(out / "encoder.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), q(images), rtol=0, atol=1e-5)
    assert encoder.backbone.settings == {
        "name": "resnet18", "width": 64, "stem": "small", "options": {},
    }  # fmt: skip
    assert (encoder.image_size, encoder.mean, encoder.std) == (32, CIFAR_MEAN, CIFAR_STD)
    assert "backbone_q, resnet18 of width 64 (small stem), of images of 32 px" in said
    assert "reads stage 3 of backbone_k, lam_mul_k 0.25, lam_margin 0.08, bilinear masks" in said


@pytest.mark.parametrize("k", [-1.0, 0.25, 1.0])
def test_masks_are_those_of_the_mix_block(tmp_path, k):
    state, _, teacher = checkpoint()
    block = {n.removeprefix("mix_block."): t for n, t in state.items() if "mix_block" in n}
    mixer = load_mixer(converted(tmp_path, state, "--lam-mul-k", f"{k:g}")[0])
    images, partner = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 0])
    with torch.no_grad():
        maps = teacher.stage_maps(images)[2]
    for lam in (0.1, 0.37, 0.5, 0.9):
        mixed = mixer(images, lam=lam, partner=partner)
        expected = reference_mask(block, maps, maps[partner], lam, k, 32)
        assert expected.std() > 0.01  # flat masks would show nothing
        torch.testing.assert_close(mixed.mask, expected, rtol=0, atol=1e-5)
        whole = (1 - expected) * images + expected * images[partner]
        torch.testing.assert_close(mixed.images, whole, rtol=0, atol=1e-4)


def test_masks_at_and_beyond_the_margin(tmp_path):
    state, _, teacher = checkpoint()
    block = {n.removeprefix("mix_block."): t for n, t in state.items() if "mix_block" in n}
    out, _ = converted(tmp_path, state, "--upsampling", "nearest")
    mixer = load_mixer(out)
    images, partner = torch.randn(2, 3, 32, 32), torch.tensor([1, 0])
    mixed = mixer(images, lam=0.05, partner=partner)
    torch.testing.assert_close(mixed.mask, torch.full_like(mixed.mask, 0.95))  # flat, as there
    with torch.no_grad():
        maps = teacher.stage_maps(images)[2]
        for lam in (0.0, 1.0):  # the network itself knows no margin
            mask = mixer.policy.block(maps, maps[partner], torch.full((2,), lam), 32)
            expected = reference_mask(block, maps, maps[partner], lam, 0.25, 32, "nearest")
            torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)


def test_mixer_of_a_wide_backbone_keeps_its_width(tmp_path):
    state, _, teacher = checkpoint(width=20, name="resnet50")
    block = {n.removeprefix("mix_block."): t for n, t in state.items() if "mix_block" in n}
    mixer = load_mixer(converted(tmp_path, state)[0])
    assert mixer.policy.block.query.weight.shape[:2] == (160, 640)  # ours have 128 at most
    images, partner = torch.randn(2, 3, 32, 32), torch.tensor([1, 0])
    with torch.no_grad():
        maps = teacher.stage_maps(images)[2]
    expected = reference_mask(block, maps, maps[partner], 0.7, 0.25, 32)
    mask = mixer(images, lam=0.7, partner=partner).mask
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)


def test_moving_average_as_the_encoder(tmp_path):
    state, q, k = checkpoint()
    out, said = converted(tmp_path, state, "--network", "k")
    images = torch.randn(2, 3, 32, 32)
    encoder = load_encoder(out)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), k(images), rtol=0, atol=1e-5)
        assert not torch.allclose(encoder(images), q(images))
    assert "backbone_k, resnet18" in said


def test_mixer_is_a_policy_for_training(tmp_path):
    state, _, _ = checkpoint()
    out, _ = converted(tmp_path, state)
    backbone = Backbone("resnet18", 32, 8)
    objective = PretrainedObjective(mixer=str(out), backbone=backbone)
    assert isinstance(objective.policy, Frozen)
    assert not any(p.requires_grad for p in objective.policy.parameters())


def test_standard_stem_has_photographs_and_straight_ratios(tmp_path):
    state, q, _ = checkpoint(small=False, classes=1000)
    out, said = converted(tmp_path, state, "--image-size", "64")
    encoder = load_encoder(out)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), q(images), rtol=0, atol=1e-5)
    assert (encoder.image_size, encoder.mean) == (64, (0.485, 0.456, 0.406))
    assert load_mixer(out).policy.block.lam_curve is None
    assert "lam_mul_k -1" in said


def test_200_classes_and_a_small_stem_are_tiny_imagenet(tmp_path):
    mixer = load_mixer(converted(tmp_path, checkpoint(classes=200)[0])[0])
    assert (mixer.image_size, mixer.std) == (64, (0.229, 0.224, 0.225))
    assert mixer.policy.block.lam_curve is None


def test_options_say_which_images(tmp_path):
    state, _, _ = checkpoint(classes=17)
    assert "give --image-size, --mean and --std" in refused(tmp_path, state)
    words = ["--image-size", "16", "--mean", "[0.1,0.2,0.3]", "--std", "0.4, 0.5, 0.6"]
    encoder = load_encoder(converted(tmp_path, state, *words)[0])
    assert (encoder.image_size, encoder.mean, encoder.std) == (16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_configuration_in_the_file_is_believed(tmp_path):
    state, _, _ = checkpoint()
    out, _ = converted(tmp_path, state, meta={"config": CONFIG, "epoch": 3})
    mixer = load_mixer(out)
    assert (mixer.image_size, mixer.mean, mixer.std) == (40, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (mixer.policy.block.lam_curve, mixer.policy.block.upsampling) == (1, "nearest")
    assert mixer.policy.lam_margin == 0.2  # and not what another part of it says


def test_ratios_beyond_the_margin_of_the_configuration_have_masks_of_their_own(tmp_path):
    """Their masks are flat where lam_margin >= lam or lam_margin >= 1 - lam."""
    state, _, _ = checkpoint()
    images, partner = torch.randn(2, 3, 40, 40), torch.tensor([1, 0])
    for margin, flat in (("0.2", (0.01, 0.1, 0.15, 0.85)), ("0.02", (0.01,)), ("-1", ())):
        text = CONFIG.replace("lam_margin=0.2", f"lam_margin={margin}")
        (tmp_path / margin).mkdir()
        mixer = load_mixer(converted(tmp_path / margin, state, meta={"config": text})[0])
        for lam in (0.01, 0.1, 0.15, 0.5, 0.85):
            spread = mixer(images, lam=lam, partner=partner).mask.std()
            assert (spread < 1e-6) == (lam in flat)


def test_what_a_configuration_leaves_out_has_the_values_of_the_constructors(tmp_path):
    state, _, teacher = checkpoint()
    block = {n.removeprefix("mix_block."): t for n, t in state.items() if "mix_block" in n}
    text = "model = dict(type='AutoMixup', mix_block=dict(type='PixelMixBlock', in_channels=32))"
    mixer = load_mixer(converted(tmp_path, state, meta={"config": text})[0])
    assert mixer.policy.lam_margin == 0
    images, partner = torch.randn(2, 3, 32, 32), torch.tensor([1, 0])
    with torch.no_grad():
        maps = teacher.stage_maps(images)[2]
    expected = reference_mask(block, maps, maps[partner], 0.05, -1, 32, gamma=0)
    mask = mixer(images, lam=0.05, partner=partner).mask
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "options"),
    [
        ("with_last_dropout=0.1", "act_cfg=dict(type='ReLU', inplace=True)", {"elu": False}),
        ("with_last_dropout=0.1", "act_cfg=dict(type='ELU')", {}),
        ("use_scale=True", "use_scale=False", {"scaled": False}),
        ("lam_mul=True", "lam_mul=0.5", {"gamma": 0.5}),
        ("lam_mul=True", "lam_mul=False", {"gamma": 0}),
        ("lam_mul=True, lam_mul_k=1, lam_residual=True,", "lam_residual=False,", {"gamma": 0}),
    ],
)
def test_settings_that_change_the_mask_are_read(tmp_path, old, new, options):
    state, _, teacher = checkpoint()
    block = {n.removeprefix("mix_block."): t for n, t in state.items() if "mix_block" in n}
    assert old in CONFIG
    meta = {"config": CONFIG.replace(old, new)}
    mixer = load_mixer(converted(tmp_path, state, meta=meta)[0])
    images, partner = torch.randn(2, 3, 40, 40), torch.tensor([1, 0])
    with torch.no_grad():
        maps = teacher.stage_maps(images)[2]
    mask = mixer(images, lam=0.7, partner=partner).mask
    expected = reference_mask(block, maps, maps[partner], 0.7, 1, 40, "nearest", **options)
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)
    if options:
        without = reference_mask(block, maps, maps[partner], 0.7, 1, 40, "nearest")
        assert (mask - without).abs().max() > 1e-3  # the setting shows


def test_old_names_and_prefixes_give_the_same_mixer(tmp_path):
    state, _, _ = checkpoint()
    first = load_file(converted(tmp_path, state)[0] / "mixer.safetensors")
    old = {}
    for name, tensor in state.items():
        for part in ("query", "key"):
            name = name.replace(f"{part}.conv.", f"{part}.")  # noqa: PLW2901
        old[f"module.{name.replace('.fc.', '.fc_cls.')}"] = tensor
    (tmp_path / "old").mkdir()
    second = load_file(converted(tmp_path / "old", old)[0] / "mixer.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("network_name", ["backbone_q", "backbone"])
def test_classifier_without_a_mix_block_gives_an_encoder(tmp_path, network_name):
    q = network(8)
    state = {f"{network_name}.{n}": t for n, t in q.state_dict().items()}
    state["head.fc.weight"] = torch.zeros(10, 64)
    out, said = converted(tmp_path, state)
    assert [path.name for path in out.iterdir()] == ["encoder.safetensors"]
    assert "published.pth has no mix_block" in said
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(out)(images), q(images), rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="holds no mixer"):
        load_mixer(out)


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnext50_32x4d", "resnext101_32x4d"])
def test_depth_and_groups_are_seen_in_the_shapes(tmp_path, name):
    width = 16 if name.startswith("resnext") else 4
    trunk = Backbone(name, 8, width, "small").trunk
    state = {f"backbone_q.{n}": t for n, t in trunk.state_dict().items()}
    state["head_one_q.fc.weight"] = torch.zeros(10, 1)
    out, _ = converted(tmp_path, state, "--image-size", "8")
    settings = load_encoder(out).backbone.settings
    assert (settings["name"], settings["width"], settings["stem"]) == (name, width, "small")


# Self-supervised checkpoints


def self_supervised(q, k, names, alias):
    """State dict of a method, its networks at ``names``, beside projections and a queue."""
    state = {}
    for name, net in zip(names, (q, k), strict=True):
        state |= {f"{name}.{n}": t for n, t in net.state_dict().items()}
        neck = name[:-2] + ".1" if name.endswith(".0") else f"neck{name[-2:]}"
        state |= {f"{neck}.mlp.0.weight": torch.zeros(4, 64), f"{neck}.mlp.0.bias": torch.zeros(4)}
    if alias:  # of the trained network, which is registered twice
        state |= {f"backbone.{n}": t for n, t in q.state_dict().items()}
    return state | {"queue": torch.zeros(4, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}


@pytest.mark.parametrize(
    ("names", "alias"),
    [
        (("encoder_q.0", "encoder_k.0"), True),  # MOCO, DenseCL
        (("encoder_q", "encoder_k"), True),  # MoCoSAMix
        (("encoder_q", "encoder_k"), False),  # MoCoMix
        (("online_net.0", "target_net.0"), True),  # BYOL
        (("base_encoder.0", "momentum_encoder.0"), True),  # MoCoV3
    ],
)
def test_methods_with_a_moving_average(tmp_path, names, alias):
    q, k = network(8, small=False), network(8, small=False)
    state = self_supervised(q, k, names, alias)
    images = torch.randn(2, 3, 64, 64)
    for letter, net, name in (("q", q, names[0]), ("k", k, names[1])):
        (tmp_path / letter).mkdir()
        out, said = converted(tmp_path / letter, state, "--network", letter)
        assert [path.name for path in out.iterdir()] == ["encoder.safetensors"]
        assert f"{name}, resnet18 of width 8 (standard stem), of images of 224 px" in said
        with torch.no_grad():
            torch.testing.assert_close(load_encoder(out)(images), net(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["backbone", "encoder.0"])  # SimCLR and others; SimSiam
def test_methods_without_a_moving_average(tmp_path, name):
    q = network(8)
    state = {f"{name}.{n}": t for n, t in q.state_dict().items()}
    state |= {f"backbone.{n}": t for n, t in q.state_dict().items()}
    state["neck.fc.0.weight"] = torch.zeros(4, 64)
    assert "published.pth has no moving average: it has" in refused(
        tmp_path, state, "--network", "k"
    )
    assert "give --image-size, --mean and --std" in refused(tmp_path, state)
    out, said = converted(tmp_path, state, meta={"config": CONFIG})
    assert f"{name}, resnet18 of width 8 (small stem), of images of 40 px" in said
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(out)(images), q(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG.replace("AutoMixup", "MoCoSAMix"), None])
def test_mixer_of_moco_samix_and_its_teacher(tmp_path, config):
    q, k = network(8, small=False), network(8, small=False)
    block = mix_block(32)
    state = self_supervised(q, k, ("encoder_q", "encoder_k"), alias=True)
    state |= {f"mix_block.{n}": t for n, t in block.items()}
    state["mix_block.pre_head.fc.weight"] = torch.zeros(2)  # of older versions, beside the mask
    state["head_clst.fc_cls.weight"] = torch.zeros(100, 64)  # clusters, not aircraft
    size = ["--image-size", "64"]
    out, said = converted(tmp_path, state, *size, meta={"config": config} if config else None)
    assert "mix_block, reads stage 3 of encoder_k" in said
    assert ("lam_mul_k 1, lam_margin 0.2" if config else "lam_mul_k -1, lam_margin 0.08") in said
    mixer = load_mixer(out)
    images, partner = torch.randn(3, 3, 64, 64), torch.tensor([1, 2, 0])
    with torch.no_grad():
        maps = k.stage_maps(images)[2]
    settings = (1, 64, "nearest") if config else (-1, 64)
    for lam in (0.25, 0.6):
        expected = reference_mask(block, maps, maps[partner], lam, *settings)
        assert expected.std() > 0.01
        mask = mixer(images, lam=lam, partner=partner).mask
        torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)


def test_teacher_has_to_be_there(tmp_path):
    q = network(8, small=False)
    state = {f"encoder_q.{n}": t for n, t in q.state_dict().items()}
    state |= {f"mix_block.{n}": t for n, t in mix_block(32).items()}
    assert "has no encoder_k" in refused(tmp_path, state)


# What is refused


def test_automix_and_other_mix_blocks_are_refused(tmp_path):
    state, _, _ = checkpoint()

    def without(part):
        return {n: t for n, t in state.items() if not n.startswith(f"mix_block.{part}")}

    automix = {**without("value"), "mix_block.value.weight": torch.zeros(1, 32, 1, 1)}
    assert "its value is one convolution, as AutoMix's" in refused(tmp_path, automix)
    assert "it has no key (x_qk_concat=False)" in refused(tmp_path, without("key"))
    sentence = refused(tmp_path, without("value.conv.0.bn.bias"))
    assert "it lacks value.conv.0.bn.bias: --encoder-only leaves the Mixer" in sentence
    normed = {**state, "mix_block.query.bn.weight": torch.zeros(16)}
    assert "it also has query.bn.weight" in refused(tmp_path, normed)
    both = {**state, "mix_block.value.conv.0.conv.weight": torch.zeros(16, 64, 1, 1)}
    assert "it has another value.conv.0.conv.weight" in refused(tmp_path, both)
    other = {**state, **{f"mix_block.{n}": t for n, t in mix_block(40).items()}}
    assert "no stage of backbone_k has half of its query's 80 channels" in refused(tmp_path, other)
    out, said = converted(tmp_path, automix, "--encoder-only")
    assert "no Mixer: --encoder-only" in said
    assert not (out / "mixer.safetensors").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("use_scale=True", "att_act_cfg=dict(type='ReLU')", "att_act_cfg={'type': 'ReLU'}: it"),
        ("use_scale=True", "mask_mode='none'", "mask_mode='none': it must be 'none_v_'"),
        ("use_scale=True", "double_norm=True", "double_norm=True: it must be False"),
        ("use_scale=True", "attention_mode='gaussian'", "it must be 'embedded_gaussian'"),
        ("use_scale=True", "pre_norm_cfg=dict(type='IN')", "{'type': 'IN'}: it must be None"),
        ("lam_residual=True", "lam_residual=False", "lam_residual=False: it must be True"),
        ("lam_residual=True,", "", "lam_residual=False: it must be True"),
        ("with_last_dropout=0.1", "act_cfg=dict(type='GELU')", "value: it must be ELU or ReLU"),
        ("with_last_dropout=0.1", "act_cfg=None", "act_cfg=None of the value: it must be ELU"),
        ("with_last_dropout=0.1", "act_cfg=dict(type='ELU', alpha=2)", "'alpha': 2} of the value"),
        ("with_last_dropout=0.1", "conv_cfg=dict(type='ConvWS')", "'ConvWS'}: it must be None"),
        ("dict(type='BN'), with", "dict(type='BN', eps=0.1), with", "its eps must be 1e-05"),
        ("use_scale=True", "use_scale=not debug", "does not say what its use_scale=not debug is"),
        ("lam_mul_k=1", "lam_mul_k=None", "does not say what its lam_mul_k=None is"),
        ("lam_margin=0.2", "lam_margin=0.7", "lam_margin must be a number in [0, 0.5], got 0.7"),
    ],
)  # fmt: skip
def test_settings_that_change_the_mask_are_refused(tmp_path, old, new, said):
    state, _, _ = checkpoint()
    assert old in CONFIG
    text = CONFIG.replace(old, new)
    sentence = refused(tmp_path, state, meta={"config": text})
    assert said in sentence
    assert "\n" not in sentence
    converted(tmp_path, state, "--encoder-only", meta={"config": text})  # needs none of them


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("style='pytorch'", "style='caffe'", "style='caffe': it must be 'pytorch'"),
        ("style='pytorch'", "strides=(1, 2, 2, 1)", "1]: it must be [1, 2, 2, 2]"),
        ("style='pytorch'", "dilations=(1, 1, 1, 2)", "dilations=[1, 1, 1, 2]: it must be"),
        ("style='pytorch'", "conv_cfg=dict(type='ConvWS')", "it must be None"),
        ("dict(type='BN'))", "dict(type='BN', eps=0.1))", "its eps must be 1e-05"),
    ],
)  # fmt: skip
def test_settings_that_change_the_features_are_refused(tmp_path, old, new, said):
    state, _, _ = checkpoint()
    text = CONFIG.replace(old, new)
    assert text != CONFIG
    assert said in refused(tmp_path, state, "--encoder-only", meta={"config": text})


def test_several_ways_of_upsampling_have_to_be_chosen_from(tmp_path):
    state, _, _ = checkpoint()
    text = CONFIG.replace("['nearest']", "['nearest', 'bilinear']")
    sentence = refused(tmp_path, state, meta={"config": text})
    assert "unsampling_mode=['nearest', 'bilinear']: choose by --upsampling" in sentence
    out, _ = converted(tmp_path, state, "--upsampling", "bilinear", meta={"config": text})
    assert load_mixer(out).policy.block.upsampling == "bilinear"


def test_configuration_that_is_not_text_of_python(tmp_path):
    sentence = refused(tmp_path, checkpoint()[0], meta={"config": "model: {type: AutoMixup"})
    assert "has a configuration that cannot be read: write its state_dict alone" in sentence


def test_networks_that_do_not_fit_are_refused(tmp_path):
    state, _, _ = checkpoint()
    for foreign in ("fc.weight", "backbone.conv1.weight", "encoder.conv1.weight"):
        sentence = refused(tmp_path, {foreign: torch.zeros(2, 2)})
        assert "is not a checkpoint of OpenMixup: it has no backbone_q, encoder_q.0" in sentence
    deep = {**state, "backbone_q.stem.0.weight": torch.zeros(4, 3, 3, 3)}
    assert "begins with three convolutions (ResNetV1c, V1d)" in refused(tmp_path, deep)
    lacking = {n: t for n, t in state.items() if n != "backbone_q.layer2.0.bn1.weight"}
    sentence = "does not fit resnet18: it lacks layer2.0.bn1.weight"
    assert sentence in refused(tmp_path, lacking)
    short = {n: t for n, t in state.items() if "backbone_q.layer4" not in n}
    assert "is not a known ResNet: its stages have (2, 2, 2, 0) blocks" in refused(tmp_path, short)
    stemless = {n: t for n, t in state.items() if n != "backbone_q.conv1.weight"}
    assert "is not a ResNet: it has no conv1" in refused(tmp_path, stemless)
    alone = {n: t for n, t in state.items() if not n.startswith("backbone_k.")}
    assert "has no backbone_k" in refused(tmp_path, alone)


def test_bad_words_are_told_before_the_file_is_opened(tmp_path):
    path = tmp_path / "file.pth"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        main(["openmixup", str(path), "-o", str(tmp_path / "out")])
    path.write_bytes(b"no checkpoint")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    for words, sentence in (
        ([str(path), "-o", str(full)], "full is not empty: give a new folder"),
        ([str(path), "-o", str(path)], "file.pth is a file: give a new folder"),
        ([str(path), "-o", "x", "--network", "p"], "unknown --network 'p'"),
        ([str(path), "-o", "x", "--mean", "0.1,0.2"], "--mean needs three numbers"),
        ([str(path), "-o", "x", "--std", "0,1,1"], "--std must be a number in"),
        ([str(path), "-o", "x", "--image-size", "1"], "--image-size must be a number in"),
        ([str(path)], "required: -o/--out; samix convert --help"),
    ):
        with pytest.raises(UserError, match=sentence):
            parse_convert(["openmixup", *words])
    with pytest.raises(ConfigError, match="did you mean 'openmixup'"):
        parse_convert(["openmix", str(path), "-o", "x"])
    with pytest.raises(CheckpointError, match="is not a checkpoint or a file of weights"):
        main(["openmixup", str(path), "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert "samix convert openmixup <file.pth> -o <folder>" in main(["--help"])


class Code:
    def __reduce__(self):
        return (eval, ("1",))


def test_file_that_would_run_code_is_refused_in_one_sentence(tmp_path):
    state, _, _ = checkpoint()
    sentence = refused(tmp_path, state, meta={"loss": Code()})
    assert "is refused: loading it would run code (eval)" in sentence
    assert "\n" not in sentence


def test_a_numpy_scalar_beside_the_weights_is_let_be(tmp_path):
    state, _, _ = checkpoint()
    out, _ = converted(tmp_path, state, meta={"loss": np.float64(1.5)})
    assert (out / "encoder.safetensors").exists()


def test_text_of_a_configuration(tmp_path):
    more = "a = {'b c': (1, -2.5), **img_norm_cfg}\nd = dict(e=a, **a)\nf = a['b c']"
    found = read_text(CONFIG + more, tmp_path)
    assert found["a"] == {"b c": [1, -2.5], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert found["d"] == {"e": found["a"], **found["a"]}
    assert repr(found["f"]) == "a['b c']"
    assert found["model"]["mix_block"]["lam_mul"] is True
    assert side(found) == 40
    assert side({}) is None
