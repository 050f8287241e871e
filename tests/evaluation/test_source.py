"""Encoders from anywhere: ours, somebody else's files, published weights, untrained networks."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import timm
import torch
import torchvision
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ssl_samix.artifacts.encoder import load_encoder, save_encoder
from ssl_samix.errors import CheckpointError, ConfigError, UserError
from ssl_samix.evaluation.request import find_origin, parse_protocol
from ssl_samix.evaluation.source import fingerprint, load_source
from ssl_samix.models.backbone import Backbone

HALF = [0.5, 0.5, 0.5]
BASE = {
    "weights": "own", "model": None, "prefix": None, "image_size": None, "mean": None, "std": None,
    "seed": 0,
}  # fmt: skip
KNOWN = {"image_size": 64, "mean": HALF, "std": HALF}


def load(given, **settings):
    config = OmegaConf.create({**BASE, **settings})
    origin = find_origin(str(given), config.weights)
    return load_source(origin, config, image_size=32, mean=HALF, std=HALF)


def shaken(model):
    """Give every weight and statistic a value of its own, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -0.1
            tensor.uniform_(low, low + 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def resnet():
    return shaken(torchvision.models.resnet18(num_classes=7))


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64)


@torch.no_grad()
def pooled(model, images):
    body = torch.nn.Sequential(*list(model.children())[:-1])
    return body(images).flatten(1)


def with_prefix(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"state_dict": with_prefix(s, "module.encoder_q."), "arch": "resnet18"},
        lambda s: {"model": with_prefix(s, "backbone.")},
        lambda s: {"teacher": with_prefix(s, "module.")},
    ],
)
def test_a_state_dict_of_torchvision(wrap, resnet, images, tmp_path):
    torch.save(wrap(resnet.state_dict()), tmp_path / "weights.pth")
    encoder = load(tmp_path / "weights.pth", model="resnet18", **KNOWN)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), pooled(resnet, images))
    assert (encoder.image_size, encoder.mean, encoder.std) == (64, tuple(HALF), tuple(HALF))


def test_of_an_encoder_and_its_average_the_encoder_is_taken(resnet, images, tmp_path):
    average = {k: v + 1 for k, v in resnet.state_dict().items()}
    state = {
        **with_prefix(average, "module.encoder_k."),
        **with_prefix(resnet.state_dict(), "module.encoder_q."),
    }
    torch.save({"state_dict": state}, tmp_path / "moco.pth.tar")
    encoder = load(tmp_path / "moco.pth.tar", model="resnet18", **KNOWN)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), pooled(resnet, images))
    other = load(tmp_path / "moco.pth.tar", model="resnet18", prefix="module.encoder_k.", **KNOWN)
    assert fingerprint(other) != fingerprint(encoder)


def test_two_encoders_of_equal_right_need_a_prefix(resnet, tmp_path):
    other = {k: v + 1 for k, v in resnet.state_dict().items()}
    state = {**with_prefix(resnet.state_dict(), "a."), **with_prefix(other, "b.")}
    torch.save(state, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"several encoders: give prefix=<a\. or b\.>"):
        load(tmp_path / "two.pth", model="resnet18", **KNOWN)


def test_safetensors_and_the_old_format_of_torch(resnet, images, tmp_path):
    save_file(resnet.state_dict(), tmp_path / "weights.safetensors")
    torch.save(resnet.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("weights.safetensors", "old.pth"):
        encoder = load(tmp_path / name, model="resnet18", **KNOWN)
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), pooled(resnet, images))


def test_a_narrow_resnet_with_the_small_stem_is_recognised(tmp_path):
    backbone = shaken(Backbone("resnet18", image_size=32, width=8))
    state = {k.removeprefix("trunk."): v for k, v in backbone.state_dict().items()}
    torch.save(state, tmp_path / "small.pth")
    encoder = load(tmp_path / "small.pth", model="resnet18", image_size=32, mean=HALF, std=HALF)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), backbone(x))


def test_a_file_of_timm(tmp_path):
    model = shaken(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5))
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    encoder = load(tmp_path / "vit.pth", model="vit_tiny_patch16_224", **KNOWN)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), model.forward_head(model.forward_features(x), True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("layer4.1.bn2.running_mean"), "it lacks layer4.1.bn2.running_mean"),
        (lambda s: s.update(extra=torch.ones(1)), "it also has extra"),
        (
            lambda s: s.update({"layer1.0.conv1.weight": torch.ones(64, 64, 1, 1)}),
            "it has another layer1.0.conv1.weight",
        ),
        (lambda s: s.clear(), "holds no weights"),
        (lambda s: s.pop("conv1.weight"), "holds no ResNet"),
    ],
)
def test_weights_that_do_not_fit(change, sentence, resnet, tmp_path):
    state = dict(resnet.state_dict())
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=sentence):
        load(tmp_path / "weights.pth", model="resnet18", **KNOWN)


def test_what_a_file_does_not_say_is_asked_for(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="does not say whose weights it holds: give model="):
        load(tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="does not say which images it was trained on: give"):
        load(tmp_path / "weights.pth", model="resnet18", image_size=64)
    with pytest.raises(ConfigError, match="mean needs three numbers"):
        load(tmp_path / "weights.pth", model="resnet18", image_size=64, mean=[0.5], std=HALF)
    with pytest.raises(ConfigError, match="std must be a number"):
        load(tmp_path / "weights.pth", model="resnet18", image_size=64, mean=HALF, std=[0, 1, 1])


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": Bomb()}, tmp_path / "new.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    torch.save(Bomb(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("new.pth", "plain.pth", "old.pth"):
        with pytest.raises(CheckpointError, match=r"is refused|damaged or no checkpoint"):
            load(tmp_path / name, model="resnet18", **KNOWN)
    assert "boom" not in capsys.readouterr().out


def test_published_weights_of_torchvision(resnet, images, tmp_path, monkeypatch):
    """The file where the download leaves it; its name holds its hash, which is checked."""
    published = torchvision.models.resnet18()
    published.load_state_dict(resnet.state_dict() | published.fc.state_dict(prefix="fc."))
    home = tmp_path / "hub" / "checkpoints"
    home.mkdir(parents=True)
    torch.save(published.state_dict(), home / "new.pth")
    digest = hashlib.sha256((home / "new.pth").read_bytes()).hexdigest()[:8]
    (home / "new.pth").rename(home / f"resnet18-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHVISION_WEIGHTS", raising=False)
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    address = f"https://nowhere.invalid/resnet18-{digest}.pth"
    monkeypatch.setattr(weights.value, "__dict__", {**weights.value.__dict__, "url": address})
    encoder = load("resnet18", weights="pretrained")
    assert (encoder.image_size, encoder.mean) == (224, (0.485, 0.456, 0.406))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), pooled(published.eval(), images))


def test_published_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(CheckpointError, match="of resnet18 cannot be fetched: no route to host"):
        load("resnet18", weights="pretrained")


@pytest.mark.parametrize("name", ["resnet10", "resnext101_32x4d"])
def test_a_model_whose_weights_nobody_published(name):
    with pytest.raises(ConfigError, match=f"no published weights are known for '{name}'"):
        load(name, weights="pretrained")


def test_published_weights_of_timm(monkeypatch):
    real = timm.create_model
    asked = []

    def create(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        model = real(name, pretrained=False, **kwargs)
        return shaken(model) if pretrained else model

    monkeypatch.setattr(timm, "create_model", create)
    encoder = load("mobilenetv3_small_050", weights="pretrained")
    assert True in asked
    expected = shaken(real("mobilenetv3_small_050", num_classes=0))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), expected(x))
    assert encoder.std == tuple(expected.pretrained_cfg["std"])


def test_an_untrained_model_takes_the_size_of_the_data():
    encoder, again, other = (load("resnet18", weights="random", seed=s) for s in (0, 0, 1))
    assert encoder.image_size == 32
    assert encoder.backbone.small_stem
    assert fingerprint(encoder) == fingerprint(again) != fingerprint(other)


def test_the_same_network_untrained(tmp_path):
    backbone = shaken(Backbone("resnet18", image_size=32, width=4))
    meta = {"backbone": backbone.settings, "image_size": 32, "mean": HALF, "std": HALF}
    save_encoder(tmp_path / "encoder.safetensors", backbone, meta)
    trained = load(tmp_path / "encoder.safetensors")
    untrained = load(tmp_path / "encoder.safetensors", weights="random")
    assert trained.backbone.settings == untrained.backbone.settings
    assert fingerprint(trained) == fingerprint(load_encoder(tmp_path / "encoder.safetensors"))
    assert fingerprint(trained) != fingerprint(untrained)
    larger = load(tmp_path / "encoder.safetensors", image_size=48, std=[0.1, 0.2, 0.3])
    assert (larger.image_size, larger.std) == (48, (0.1, 0.2, 0.3))
    assert fingerprint(larger.backbone) == fingerprint(trained.backbone)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "knn needs an encoder: run="),
        (["runn=a"], "unknown key 'runn': did you mean 'run'"),
        (["run=nowhere"], "run=nowhere does not exist"),
        (["run=nowhere/x", "weights=random"], "run=nowhere/x does not exist"),
        (["run=resnet18", "weights=randm"], "did you mean 'random'"),
        (["run=resnet18", "weights=random"], "does not say what to measure it on: give data="),
        (["run=resnet18", "weights=random", "data=cifar"], "did you mean 'cifar10'"),
        (["run=resnet18", "weights=random", "data=folder"], "needs a folder: give data.root="),
        (["run=resnet18", "weights=random", "data=digits", "seed=-1"], "seed must be"),
        (["run=empty"], "holds no encoder.safetensors and no last.ckpt"),
        (["run=resnet18", "weights=random", "data=digits", "method=moco"], "takes no method"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=sentence):
        parse_protocol("knn", words)


def test_an_encoder_that_names_its_data_needs_no_more(tmp_path):
    backbone = Backbone("resnet18", image_size=16, width=4)
    meta = {"backbone": backbone.settings, "image_size": 16, "mean": HALF, "std": HALF}
    save_encoder(tmp_path / "encoder.safetensors", backbone, {**meta, "data": "digits"})
    found = parse_protocol("knn", [f"run='{tmp_path}/encoder.safetensors'", "data.limit=100"])
    assert (found.data, found.config.data.limit) == ("digits", 100)
    (tmp_path / "encoder.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        parse_protocol("knn", [f"run='{tmp_path}/encoder.safetensors'"])


def test_a_network_whose_state_has_a_version_is_loaded_back(tmp_path):
    """torchvision's MNASNet refuses a state without one."""
    backbone = shaken(Backbone("mnasnet0_5", image_size=64))
    meta = {"backbone": backbone.settings, "image_size": 64, "mean": HALF, "std": HALF}
    save_encoder(tmp_path / "encoder.safetensors", backbone, meta)
    assert fingerprint(load_encoder(tmp_path / "encoder.safetensors").backbone) == fingerprint(
        backbone
    )
