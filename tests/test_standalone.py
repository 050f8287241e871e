"""A trained Mixer on its own: what its file holds, and what it does in another loop."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ssl_samix
from ssl_samix.artifacts.checkpoints import META
from ssl_samix.artifacts.mixer import Frozen
from ssl_samix.config.compose import build, compose
from ssl_samix.errors import CheckpointError, ConfigError
from ssl_samix.models.backbone import Backbone
from ssl_samix.training.pretrain import Pretraining
from ssl_samix.training.run import build_mixing
from ssl_samix.types import MixPlan
from tests.conftest import mixed_method

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "data.limit": 128, "data.batch_size": 64, "backbone.width": 8, "trainer.max_epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    return trained("moco samix", tmp_path_factory.mktemp("standalone") / "runs" / "samix")


@pytest.fixture
def images():
    return torch.randn(6, 3, 16, 16)


def test_it_mixes(run, images):
    mixer = ssl_samix.load_mixer(run)
    mixed = mixer(images)
    assert mixed.images.shape == images.shape
    assert mixed.mask.shape == (6, 1, 16, 16)
    assert not (mixed.partner == torch.arange(6)).any()
    expected = images + mixed.mask * (images[mixed.partner] - images)
    torch.testing.assert_close(mixed.images, expected, rtol=1e-5, atol=1e-6)
    assert mixed.lam.unique().numel() == 6
    assert not mixed.images.requires_grad


def test_ratios_and_partners_can_be_given(run, images):
    mixer = ssl_samix.load_mixer(run)
    partner = torch.arange(6).roll(1)
    mixed = mixer(images, lam=0.3, partner=partner)
    assert torch.equal(mixed.partner, partner)
    assert torch.equal(mixed.lam, torch.full((6,), 0.3))
    assert torch.equal(mixer(images, lam=mixed.lam, partner=partner).images, mixed.images)


def test_file_and_checkpoint_hold_the_same_mixer(run, images):
    partner, lam = torch.arange(6).roll(1), torch.linspace(0.1, 0.9, 6)
    first, *others = [
        ssl_samix.load_mixer(path)(images, lam, partner).mask
        for path in (run, run / "mixer.safetensors", run / "last.ckpt")
    ]
    for mask in others:
        assert torch.equal(mask, first)


def test_the_file_holds_what_the_mixer_reads_and_nothing_more(run):
    names = set(load_file(run / "mixer.safetensors"))
    assert any(name.startswith("policy.block.") for name in names)
    stages = {name.split(".")[2] for name in names if name.startswith("backbone.")}
    assert stages == {"conv1", "bn1", "layer1", "layer2", "layer3"}


def test_it_stays_frozen_inside_another_model(run, images):
    mixer = ssl_samix.load_mixer(run)
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    model = torch.nn.ModuleDict({"mixer": mixer}).train()
    model["mixer"](images)
    assert not any(m.training for m in mixer.modules())
    assert not any(p.requires_grad for p in mixer.parameters())
    for key, tensor in mixer.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_can_be_loaded_where_gradients_are_off(run, images, mode):
    partner = torch.arange(6).roll(1)
    expected = ssl_samix.load_mixer(run)(images, 0.3, partner).images
    encoder = ssl_samix.load_encoder(run)
    with mode():
        mixer, second = ssl_samix.load_mixer(run), ssl_samix.load_encoder(run)
        assert not torch.is_grad_enabled()  # as it was
        assert torch.equal(mixer(images, 0.3, partner).images, expected)
        assert mixer.backbone.state_names_for_stage(3) == encoder.backbone.state_names_for_stage(3)
    assert not any(tensor.is_inference() for tensor in mixer.state_dict().values())
    loss = mixer.requires_grad_(True).backbone.stage_map(images, 3).sum()
    loss.backward()  # weights of inference mode would refuse
    torch.nn.functional.mse_loss(second(images), encoder(images) + 1).backward()
    assert all(p.grad is not None for p in second.parameters())


def test_a_backbone_made_in_inference_mode_names_what_is_read(run):
    with torch.inference_mode():
        backbone = Backbone("resnet18", image_size=16, width=8)
        names = backbone.state_names_for_stage(3)
    assert names == ssl_samix.load_mixer(run).backbone.state_names_for_stage(3)


def test_it_mixes_as_the_run_would(run, images):
    """The teacher's maps of the whole backbone and of the part in the file are the same."""
    mixer, encoder = ssl_samix.load_mixer(run), torch.load(run / "last.ckpt", weights_only=True)
    method = mixed_method("moco", "samix")
    assert mixer.stage == method.mixing.stage
    weights = {
        k.removeprefix("twin.module.0."): v
        for k, v in encoder["state_dict"].items() if k.startswith("twin.module.0.")
    }  # fmt: skip
    whole = ssl_samix.load_encoder(run).backbone
    whole.load_state_dict(weights)
    torch.testing.assert_close(whole.stage_map(images, 3), mixer.backbone.stage_map(images, 3))


def test_another_image_size_works_with_a_warning(run, caplog):
    mixer = ssl_samix.load_mixer(run)
    for _ in range(2):
        assert mixer(torch.randn(4, 3, 32, 32)).mask.shape == (4, 1, 32, 32)
    assert [r.message for r in caplog.records] == [
        "the Mixer was trained on images of 16 px and mixes images of 32 px"
    ]


def test_samix_p_trains_with_it_and_leaves_it_alone(run, tmp_path):
    before = load_file(run / "mixer.safetensors")
    out = tmp_path / "p"
    ssl_samix.pretrain(method="byol", mixup="samix_p", out=out, **SMALL, **{"mixup.mixer": run})
    state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    kept = {k.removeprefix("mixing.policy.mixer."): v for k, v in state.items()}
    for key, tensor in before.items():
        assert torch.equal(kept[key], tensor), key


def test_a_run_without_a_mixer_says_so(trained, tmp_path):
    unmixed = trained("moco none", tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds no Mixer: it is of a run with mixup=none"):
        ssl_samix.load_mixer(unmixed)


def test_samix_p_needs_a_file(tmp_path):
    with pytest.raises(ConfigError, match="needs a trained Mixer"):
        ssl_samix.pretrain(mixup="samix_p", out=tmp_path / "p", **SMALL)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        ssl_samix.pretrain(
            mixup="samix_p", out=tmp_path / "p", **SMALL, **{"mixup.mixer": tmp_path / "no.ckpt"}
        )


def changed(source, target, change):
    with safe_open(source, framework="pt") as file:
        meta = json.loads(file.metadata()[META])
    tensors = load_file(source)
    change(meta, tensors)
    save_file(tensors, target, metadata={META: json.dumps(meta)})


def test_a_mixer_of_another_channel_count_is_refused(run, tmp_path):
    path = tmp_path / "mixer.safetensors"

    def wider(meta, _tensors):
        meta["mixer"]["settings"]["channels"] = 64

    changed(run / "mixer.safetensors", path, wider)
    with pytest.raises(CheckpointError, match=r"reads maps of 64 channels, stage 3 .* gives 32"):
        ssl_samix.load_mixer(path)


def test_a_file_with_a_hole_is_refused(run, tmp_path):
    path = tmp_path / "mixer.safetensors"
    changed(run / "mixer.safetensors", path, lambda _meta, t: t.pop("policy.block.gamma"))
    with pytest.raises(CheckpointError, match=r"no block\.gamma in it"):
        ssl_samix.load_mixer(path)


def test_the_documented_loop_learns(run, monkeypatch, capsys):
    text = (ROOT / "docs" / "samix.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 36
    monkeypatch.chdir(run.parent.parent)
    exec(code, {"__name__": "__main__"})
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)[1])
    assert accuracy > 80


MEAN, STD = (0.3, 0.5, 0.7), (0.2, 0.3, 0.25)


def test_a_frozen_mixer_reads_images_of_another_norm_as_its_own(run):
    mixer = ssl_samix.load_mixer(run)
    torch.nn.init.normal_(mixer.policy.block.value[3].weight, std=50.0)  # masks far from flat
    pixels, partner = torch.rand(6, 3, 16, 16), torch.arange(6).roll(1)
    own, given = (
        (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in ((mixer.mean, mixer.std), (MEAN, STD))
    )
    plan = MixPlan(torch.linspace(0.1, 0.9, 6), partner, torch.arange(6))
    expected, policy = mixer.mix(own, own, plan).mask, Frozen(mixer)
    assert (policy(given, given, plan, None).mask - expected).abs().max() > 0.01
    policy.set_normalisation(MEAN, STD)
    mixed = policy(given, given, plan, None)
    torch.testing.assert_close(mixed.mask, expected, rtol=1e-4, atol=1e-4)
    between = given + mixed.mask * (given[partner] - given)
    torch.testing.assert_close(mixed.images, between, rtol=1e-4, atol=1e-5)


def test_a_run_tells_a_frozen_mixer_how_its_images_are_normalised(run, tmp_path):
    path = tmp_path / "mixer.safetensors"
    norm = {"mean": list(MEAN), "std": list(STD)}
    changed(run / "mixer.safetensors", path, lambda meta, _tensors: meta.update(norm))
    config, _ = compose("pretrain", ["mixup=samix_p", f"mixup.mixer={path}"])
    data = build(config.data, views=Pretraining().views(config), seed=0, labelled=False)
    backbone = build(config.backbone, image_size=data.splits.image_size)
    policy = build_mixing(config, backbone, data).policy
    pixel = torch.tensor([0.2, 0.4, 0.6])
    mean, std = torch.tensor(data.splits.mean), torch.tensor(data.splits.std)
    seen = ((pixel - mean) / std).view(3, 1, 1) * policy.scale + policy.shift
    wanted = (pixel - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(seen.flatten(), wanted)
