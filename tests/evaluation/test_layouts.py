"""Files laid out as other projects leave them: the features are those of the network saved."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers import resample_abs_pos_embed
from torch import nn

from ssl_samix.artifacts.checkpoints import load_plain
from ssl_samix.artifacts.foreign import flatten, from_file
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.models.backbone import Backbone
from ssl_samix.models.resnet import ResNetTrunk
from tests.evaluation.test_source import shaken, with_prefix

WIDTH = 4


@pytest.fixture(scope="module")
def resnet():
    """torchvision's ResNet-18, narrow, and as its children in a row, which needs no name."""
    model = shaken(ResNetTrunk("resnet18", WIDTH))
    return model, nn.Sequential(*model.children(), nn.Flatten()).eval()


def other(state):
    """The same names with other values: a network that must not be taken."""
    return {k: v + 1 for k, v in state.items()}


def head(*names):
    return {name: torch.ones(3, 2) for name in names}


def save(content, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


# Each is what the project's own code hands to torch.save, of (named, by position): SwAV's
# main_swav.py, VISSL's log_hooks.py, lightly's examples and benchmarks, PyTorch-BYOL's trainer.py,
# byol-pytorch, MoCo's and MoCo v3's builder.py, DINO's main_dino.py.
RESNETS = {
    "swav": lambda s, _: {
        "epoch": 400,
        "state_dict": with_prefix(
            {**s, **head("projection_head.0.weight", "prototypes.weight")}, "module."
        ),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    },
    "swav_several_prototypes": lambda s, _: {**s, **head("prototypes.prototypes0.weight")},
    "vissl": lambda s, _: {
        "phase_idx": 99,
        "loss": {},
        "classy_state_dict": {
            "base_model": {
                "model": {
                    "trunk": with_prefix(s, "_feature_blocks."),
                    "heads": head("0.clf.0.weight"),
                },
                "meta": {"trunk": {}, "heads": {}},
            },
            "optimizer": {},
        },
        "type": "consolidated",
    },
    "vissl_feature_extractor": lambda s, _: {
        "model_state_dict": with_prefix(s, "trunk.base_model._feature_blocks.")
    },
    "lightly_example": lambda _, p: {
        "state_dict": {
            **with_prefix(p, "backbone."),
            **head("projection_head.layers.0.weight"),
            **with_prefix(other(p), "backbone_momentum."),
        },
        "hyper_parameters": {},
    },
    "lightly_benchmark": lambda s, _: {
        "state_dict": {**with_prefix(other(s), "key_backbone."), **with_prefix(s, "backbone.")}
    },
    "lightly_dino": lambda _, p: {
        "state_dict": {
            **with_prefix(other(p), "student_backbone."),
            **with_prefix(p, "teacher_backbone."),
        }
    },
    "pytorch_byol": lambda _, p: {
        "online_network_state_dict": {**with_prefix(p, "encoder."), **head("projetion.net.0.bias")},
        "target_network_state_dict": with_prefix(other(p), "encoder."),
        "optimizer_state_dict": {},
    },
    "byol_pytorch": lambda s, _: {
        **with_prefix(s, "net."),
        **with_prefix(s, "online_encoder.net."),
        **with_prefix(other(s), "target_encoder.net."),
    },
    "moco_v1": lambda s, _: {
        "arch": "resnet18",
        "state_dict": {
            **with_prefix({**s, **head("fc.weight")}, "module.encoder_q."),
            **with_prefix(other(s), "module.encoder_k."),
            **head("module.queue", "module.queue_ptr"),
        },
    },
    "moco_v3": lambda s, _: {
        "state_dict": {
            **with_prefix({**s, **head("fc.0.weight", "fc.1.bias")}, "module.base_encoder."),
            **with_prefix(other(s), "module.momentum_encoder."),
            **head("module.predictor.0.weight"),
        },
    },
    "dino": lambda s, _: {
        "student": {**with_prefix(other(s), "module.backbone."), **head("module.head.mlp.0.bias")},
        "teacher": {**with_prefix(s, "backbone."), **head("head.last_layer.weight_g")},
        "args": argparse.Namespace(arch="resnet18", output_dir=Path("there"), lr=0.1),
        "dino_loss": {"center": torch.zeros(1, 5)},
    },
    "without_counters": lambda s, _: {
        k: v for k, v in s.items() if not k.endswith("num_batches_tracked")
    },
}


@pytest.mark.parametrize("layout", RESNETS)
def test_resnets_as_other_projects_save_them(layout, resnet, tmp_path):
    model, in_a_row = resnet
    path = save(RESNETS[layout](model.state_dict(), in_a_row.state_dict()), tmp_path)
    backbone = from_file(path, "resnet18", None, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), in_a_row(images), rtol=0, atol=0)


def test_a_prefix_may_be_the_end_of_the_whole_one(resnet, tmp_path):
    state = resnet[0].state_dict()
    path = save(RESNETS["dino"](state, None), tmp_path)
    for prefix in ("student.module.backbone.", "module.backbone.", "module.backbone"):
        taken = from_file(path, "resnet18", prefix, 32).trunk.state_dict()
        assert torch.equal(taken["conv1.weight"], other(state)["conv1.weight"])
    with pytest.raises(CheckpointError, match=r"no resnet18 under prefix=encoder\.: give prefix="):
        from_file(path, "resnet18", "encoder.", 32)


def test_a_network_whose_state_has_a_version(tmp_path):
    """torchvision's MNASNet refuses a state without one, as a plain dict is."""
    model = shaken(torchvision.models.mnasnet0_5(num_classes=3))
    path = save(dict(model.state_dict()), tmp_path)
    model.classifier[1] = nn.Identity()
    assert_same_features(from_file(path, "mnasnet0_5", None, 64), model, 64)


def test_nested_names_are_joined():
    inner = {"w": torch.ones(1), 3: {"x": torch.zeros(2)}, "epoch": 5}
    inner["self"] = {"again": inner}  # which a pickle may hold
    assert list(flatten({"a.b": inner})) == ["a.b.w", "a.b.3.x"]


@pytest.fixture
def vit(monkeypatch):
    """Make timm's ViTs small, under their names; returns one with weights of its own."""
    real = timm.create_model
    size = {"embed_dim": 24, "depth": 3, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **given: real(name, **{**size, **given}))

    def create(name, side, **given):
        return shaken(timm.create_model(name, num_classes=0, img_size=side, **given))

    return create


def renamed(state, pattern, new):
    return {re.sub(pattern, new, name): tensor for name, tensor in state.items()}


def with_registers(state):
    """DINOv2's own place for what timm adds up: the class token has a position."""
    place = torch.randn_like(state["cls_token"])
    mine = {k: v for k, v in state.items() if k != "reg_token"}
    return mine | {
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - place,
        "pos_embed": torch.cat([place, state["pos_embed"]], dim=1),
        "mask_token": torch.ones(1, 24),
    }


MAE_DECODER = (
    "mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight",
    "decoder_norm.weight", "decoder_pred.bias",
)  # fmt: skip
DINOV2 = "vit_small_patch14_dinov2"
# MAE's models_mae.py and misc.py, iBOT's main_ibot.py and extract_backbone_weights.py, DINOv2's
# vision_transformer.py (as published, and as train.py leaves its teacher), lightly, VISSL.
VITS = {
    "mae": (
        "vit_base_patch16_224",
        lambda s: {
            "model": {**s, **head(*MAE_DECODER)},
            "optimizer": {"state": {}},
            "epoch": 799,
            "scaler": {"scale": 1.0},
            "args": argparse.Namespace(model="mae_vit_base_patch16", resume=""),
        },
    ),
    "ibot": (
        "vit_small_patch16_224",
        lambda s: {
            "student": with_prefix({**other(s), **head("masked_embed")}, "module.backbone."),
            "teacher": {**with_prefix(s, "backbone."), **head("head.mlp.0.weight")},
            "args": argparse.Namespace(arch="vit_small"),
            "ibot_loss": {"center": torch.zeros(1, 5)},
        },
    ),
    "ibot_extracted": (
        "vit_small_patch16_224", lambda s: {"state_dict": {**s, **head("masked_embed")}}
    ),
    "dinov2": (DINOV2, lambda s: {**s, "mask_token": torch.ones(1, 24)}),
    "dinov2_of_timm": (DINOV2, lambda s: s),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", with_registers),
    "dinov2_swiglu": (
        "vit_giant_patch14_dinov2",
        lambda s: renamed(renamed(s, "fc1", "w12"), "mlp.fc2", "mlp.w3") | head("mask_token"),
    ),
    "dinov2_teacher": (
        DINOV2,
        lambda s: {
            "teacher": {
                **with_prefix(renamed(s, r"^blocks\.(\d)", r"blocks.0.\1"), "backbone."),
                **head("backbone.mask_token", "dino_head.mlp.0.weight"),
            }
        },
    ),
    "lightly_mae": (
        "vit_base_patch32_224",
        lambda s: {
            "state_dict": {
                **with_prefix(s, "backbone.vit."),
                **head("backbone.mask_token", "decoder.mask_token", "decoder_embed.weight"),
            }
        },
    ),
    "vissl_ibot": (
        "vit_small_patch16_224",
        lambda s: {
            "classy_state_dict": {
                "base_model": {"model": {"trunk": {**s, **head("patch_masking.masked_embed")}}}
            }
        },
    ),
    "moco_v3": (
        "vit_base_patch16_224",
        lambda s: {
            "state_dict": {
                **with_prefix({**s, **head("head.0.weight")}, "module.base_encoder."),
                **with_prefix(other(s), "module.momentum_encoder."),
            }
        },
    ),
}  # fmt: skip


def features(model, images):
    with torch.no_grad():
        return model(images)


def assert_same_features(backbone, model, side):
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(features(backbone.eval(), images), features(model, images))


@pytest.mark.parametrize("layout", VITS)
def test_transformers_as_other_projects_save_them(layout, vit, tmp_path, caplog):
    name, content = VITS[layout]
    side = 56 if "dinov2" in name else 64
    model = vit(name, side)
    path = save(content(model.state_dict()), tmp_path)
    assert_same_features(from_file(path, name, None, side), model, side)
    assert "interpolated" not in caplog.text


def test_moco_v3s_small_transformer_has_its_own_number_of_heads(vit, tmp_path):
    model = vit("vit_small_patch16_224", 32, num_heads=12)
    path = save(VITS["moco_v3"][1](model.state_dict()), tmp_path)
    backbone = from_file(path, "vit_small_patch16_224", None, 32)
    assert_same_features(backbone, model, 32)
    again = Backbone(image_size=32, **backbone.settings)
    again.load_state_dict(backbone.state_dict())
    assert_same_features(again, model, 32)


@pytest.mark.parametrize("layout", ["mae", "dinov2", "dinov2_registers"])
def test_a_position_table_of_another_size_is_interpolated(layout, vit, tmp_path, caplog):
    name, content = VITS[layout]
    patch = 14 if "dinov2" in name else 16
    model, larger = vit(name, 4 * patch), vit(name, 6 * patch)
    state = model.state_dict()
    path = save(content(state), tmp_path)
    table = resample_abs_pos_embed(
        state["pos_embed"], [6, 6], num_prefix_tokens=0 if "reg" in name else 1
    )
    larger.load_state_dict({**state, "pos_embed": table})
    assert_same_features(from_file(path, name, None, 6 * patch), larger, 6 * patch)
    assert f"{path}: pos_embed of 4x4 places is interpolated to 6x6" in caplog.text


def test_patches_of_another_size_are_not_interpolated(vit, tmp_path):
    path = save(vit("vit_small_patch16_224", 64).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"it has another patch_embed\.proj\.weight"):
        from_file(path, "vit_small_patch8_224", None, 32)


def test_what_was_found_and_which_model_it_is(resnet, vit, tmp_path):
    state = vit("vit_small_patch14_reg4_dinov2", 56).state_dict()
    path = save({"model": with_registers(state)}, tmp_path)
    fits = r"file has model\.\w+, .* more, which fit model=vit_small_patch14_reg4_dinov2$"
    with pytest.raises(CheckpointError, match=rf"it also has register_tokens \(\d+ .* {fits}"):
        from_file(path, "vit_small_patch14_dinov2", None, 56)
    with pytest.raises(CheckpointError, match=rf"holds no ResNet.* {fits}"):
        from_file(path, "resnet18", None, 56)
    with pytest.raises(ConfigError, match=rf"give model=<name>; the {fits}"):
        from_file(path, None, None, 56)
    path = save(with_prefix(resnet[0].state_dict(), "net."), tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks .* \(.* found\).* which fit model=resnet18$"):
        from_file(path, "resnet34", None, 32)
    with pytest.raises(CheckpointError, match=r"no resnet18 under prefix=a\.: give prefix=<net\.>"):
        from_file(path, "resnet18", "a.", 32)
    path = save(head("a", "b"), tmp_path)
    with pytest.raises(CheckpointError, match=r"\(0 of 42 found\); the file has a, b$"):
        from_file(path, "vit_small_patch16_224", None, 32)


def test_values_that_are_not_needed_are_not_read(resnet, tmp_path):
    model, in_a_row = resnet
    extras = {
        "best": np.float64(0.5),
        "history": np.arange(3, dtype=np.int32),
        "args": argparse.Namespace(out=Path("there"), seed=np.int64(3)),
    }
    path = save({**extras, "state_dict": model.state_dict()}, tmp_path)
    assert_same_features(from_file(path, "resnet18", None, 32), in_a_row, 32)
    found = load_plain(path)
    real = (np.generic, np.ndarray, argparse.Namespace, Path)
    assert not any(isinstance(found[key], real) for key in extras)


class Calls:
    """A pickle that calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(eval, "eval"), (np.load, "numpy.load"), (exec, "exec"), (os.remove, "posix.remove")],
)
def test_code_beside_or_inside_them_is_refused(function, name, tmp_path):
    witness = tmp_path / "witness"
    code = Calls(function, f"open({str(witness)!r}, 'w')")
    for content in (
        {"args": argparse.Namespace(a=1), "state_dict": code},
        {"args": argparse.Namespace(a=code)},
        {"args": Calls(argparse.Namespace, code)},
        {"args": Calls(type(tmp_path), code)},
    ):
        with pytest.raises(CheckpointError, match=rf"would run code \(.*{name}.*\)"):
            load_plain(save(content, tmp_path))
    assert not witness.exists()
