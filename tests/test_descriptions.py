"""What files say of themselves is checked by whoever reads it, in one way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ssl_samix
from ssl_samix.artifacts.checkpoints import META, load_plain
from ssl_samix.artifacts.encoder import save_classifier
from ssl_samix.errors import CheckpointError, UserError
from ssl_samix.models.backbone import Backbone

OLD = Path(__file__).parent / "old_run"


def told(meta, **changed):
    """A description with other values, by dotted keys; ``...`` leaves a key out."""
    meta = json.loads(json.dumps(meta))
    for key, value in changed.items():
        *outer, last = key.split("__")
        node = meta
        for name in outer:
            node = node[name]
        node.pop(last, None)
        if value is not ...:
            node[last] = value
    return json.dumps(meta)


# what is wrong -> (text of the metadata, made of a good description, and what the sentence names)
EVERY = {
    "broken": (lambda meta: "{", "it is not JSON"),
    "nested": (lambda meta: "[" * 100_000, "it is not JSON"),
    "a list": (lambda meta: "[1]", "it has no keys"),
    "no backbone": (lambda meta: told(meta, backbone=...), "backbone is missing"),
    "no mean": (lambda meta: told(meta, mean=...), "mean is missing"),
    "text for mean": (lambda meta: told(meta, mean="grey"), "mean is 'grey'"),
    "two channels": (lambda meta: told(meta, mean=[0.5, 0.5]), "mean needs three numbers"),
    "zero std": (lambda meta: told(meta, std=[0, 0, 0]), "std must be a number in [1e-06, 1]"),
    "NaN": (lambda meta: told(meta, std=[float("nan")] * 3), "std must be a number"),
    "text for a size": (lambda meta: told(meta, image_size="16"), "image_size is '16'"),
    "huge size": (lambda meta: told(meta, image_size=10**9), "image_size must be a number in"),
    "no network": (lambda meta: told(meta, backbone=[]), "backbone is '[]'"),
    "unknown key": (lambda meta: told(meta, backbone__depth=3), "backbone.depth is unknown"),
    "unknown name": (lambda meta: told(meta, backbone__name="resnet19"), "did you mean 'resnet1"),
    "huge width": (lambda meta: told(meta, backbone__width=10**6), "backbone.width of resnet10"),
    "text for width": (lambda meta: told(meta, backbone__width="4"), "backbone.width is '4'"),
}
OF_MIXER = {
    "no channels": (lambda meta: told(meta, mixer__settings={}), "channels is missing"),
    "no settings": (lambda meta: told(meta, mixer={"stage": 3}), "mixer.settings is missing"),
    "no stage": (lambda meta: told(meta, mixer__stage="3"), "mixer.stage is '3'"),
    "another stage": (lambda meta: told(meta, mixer__stage=9), "has no stage 9"),
    "channels": (lambda meta: told(meta, mixer__settings__channels=10**9), "reads maps of"),
    "unknown setting": (lambda meta: told(meta, mixer__settings__colour=1), "'colour'"),
    "unknown form": (lambda meta: told(meta, mixer__settings__form="exakt"), "'exact'"),
}
OF_CLASSIFIER = {
    "classes": (lambda meta: told(meta, classes=[1, 2]), "classes are not names"),
    "number": (lambda meta: told(meta, classes=10), "classes is '10'"),
    "no classes": (lambda meta: told(meta, classes=[]), "holds no classifier"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good file of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    backbone = Backbone("resnet10", 16, width=4)
    meta = {"backbone": backbone.settings, "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    meta |= {"classes": [str(i) for i in range(10)], "data": "digits"}
    network = nn.Sequential(backbone, nn.Linear(backbone.feature_dim, 10))
    save_classifier(folder / "classifier.safetensors", {"linear": network}, meta)
    return {
        "encoder": OLD / "encoder.safetensors",
        "mixer": OLD / "mixer.safetensors",
        "classifier": folder / "classifier.safetensors",
    }


def changed(path, out, change):
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()[META])
    save_file(load_file(path), out / path.name, metadata={META: change(meta)})
    return out / path.name


LOADERS = {
    "encoder": ssl_samix.load_encoder,
    "mixer": ssl_samix.load_mixer,
    "classifier": ssl_samix.load_classifier,
}
CASES = [(kind, wrong) for kind in LOADERS for wrong in EVERY]
CASES += [("mixer", wrong) for wrong in OF_MIXER]
CASES += [("classifier", wrong) for wrong in OF_CLASSIFIER]


@pytest.mark.parametrize(("kind", "wrong"), CASES)
def test_a_description_that_nothing_can_be_built_from(kind, wrong, whole, tmp_path):
    change, named = {**EVERY, **OF_MIXER, **OF_CLASSIFIER}[wrong]
    path = changed(whole[kind], tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        LOADERS[kind](path)
    assert named in str(caught.value)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_whole_is_loaded(kind, whole, tmp_path):
    assert LOADERS[kind](changed(whole[kind], tmp_path, json.dumps)).image_size == 16


@pytest.mark.parametrize("wrong", ["no mean"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("encoder", ["knn", "run={}", "data=digits"]),
        ("encoder", ["linear", "run={}"]),
        ("encoder", ["embed", "run={}", "images=pictures"]),
        ("encoder", ["export", "run={}", "format=timm"]),
        ("encoder", ["supervised", "init={}", "backbone.name=resnet10", "backbone.width=4"]),
        ("mixer", ["pretrain", "mixup=samix_p", "mixup.mixer={}"]),
        ("mixer", ["show-mixing", "run={}", "images=pictures"]),
        ("classifier", ["robustness", "run={}"]),
    ],
)
def test_every_command_tells_it(kind, words, wrong, whole, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    path = changed(whole[kind], tmp_path, EVERY[wrong][0])
    assert EVERY[wrong][1] in fails(*(word.format(path) for word in words))


@pytest.mark.parametrize("settings", [{"limit": "many"}, {"image_size": [16]}, {"root": 5}])
def test_data_settings_of_another_type(settings, whole, fails, tmp_path):
    path = changed(whole["classifier"], tmp_path, lambda m: told(m, data_settings=settings))
    assert f"data.{next(iter(settings))} needs" in fails("robustness", f"run={path}")


def test_files_that_are_something_else(tmp_path, recwarn):
    with pytest.raises(CheckpointError, match="there is no file"):
        ssl_samix.load_encoder(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="is not a checkpoint or a file of weights"):
        load_plain(OLD / "config.yaml")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "cut.pth", pickle_protocol=4)
    old = tmp_path / "old.pth"
    torch.save({"a": [1] * 99}, old, pickle_protocol=4, _use_new_zipfile_serialization=False)
    old.write_bytes(old.read_bytes()[:60])
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        load_plain(old)
    assert not recwarn.list


@pytest.mark.parametrize("kind", LOADERS)
def test_a_path_begins_with_a_home(kind, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    changed(whole[kind], tmp_path, json.dumps)
    assert LOADERS[kind](f"~/{whole[kind].name}").image_size == 16
    with pytest.raises(UserError, match="~no-such-user"):
        LOADERS[kind](f"~no-such-user/{whole[kind].name}")


@pytest.mark.parametrize("key", ["loops", "state_dict", "ssl_samix"])
def test_a_checkpoint_without_a_part(key, fails, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((OLD / "config.yaml").read_bytes())
    checkpoint = torch.load(OLD / "last.ckpt", weights_only=True)
    checkpoint[key] = 5
    if key == "loops":
        del checkpoint[key]
    torch.save(checkpoint, run / "last.ckpt")
    assert "last.ckpt is damaged" in fails("pretrain", f"resume={run}", "trainer.max_epochs=2")


def test_a_list_of_images_at_home(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a=b.txt").write_text("1/nothing.png\n")
    sentence = fails("semi", f"run={OLD}", "data=digits", "split=~/a=b.txt", f"out={tmp_path}/out")
    assert f"split={tmp_path}/a=b.txt names 1 of 1 images that the data set has not" in sentence
