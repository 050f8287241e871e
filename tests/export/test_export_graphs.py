"""Files that need neither this package nor the library of the backbone: ONNX and torch.export."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import ssl_samix
from ssl_samix.artifacts import export_formats as graph
from ssl_samix.artifacts import export_formats as onnx_file
from ssl_samix.artifacts.encoder import load_encoder
from ssl_samix.errors import ConfigError, UserError
from tests.export.conftest import ENCODERS, MEAN, STD, backbone_and_meta, exported, saved

KINDS = [
    "narrow",
    "vit",
    pytest.param("narrow_standard", marks=pytest.mark.slow),
    pytest.param("squeezenet", marks=pytest.mark.slow),
]
CODE = [Path(m.__file__).parent.parent for m in (ssl_samix, torch, torchvision)]


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def images_of(kind, count):
    size = ENCODERS[kind]["image_size"]
    return torch.randn(count, 3, size, size)


def close(given, run, images):
    with torch.no_grad():
        wanted = load_encoder(run)(images)
    torch.testing.assert_close(given.detach(), wanted, rtol=0, atol=1e-5)


def says_nothing_of_this_machine(path):
    content = path.read_bytes()
    return not any(str(folder).encode() in content for folder in (*CODE, sys.prefix))


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_gives_the_same_features_for_batches_of_any_size(kind, onnxruntime, tmp_path):
    run = saved(tmp_path / "run", kind)
    done = exported(run, "onnx")
    assert done.path == run / "encoder.onnx"
    session = onnxruntime.InferenceSession(done.path)
    (given,), (taken,) = session.get_outputs(), session.get_inputs()
    backbone, meta = backbone_and_meta(kind)
    size = meta["image_size"]
    assert (taken.name, taken.shape) == ("images", ["batch", 3, size, size])
    assert (given.name, given.shape) == ("features", ["batch", backbone.feature_dim])
    for count in (1, 5):
        images = images_of(kind, count)
        features = session.run(None, {"images": images.numpy()})[0]
        close(torch.from_numpy(features), run, images)
    told = {"images": images.numpy()}
    exec(done.usage, told)
    close(torch.from_numpy(told["features"]), run, images)


def test_onnx_describes_its_images_and_nothing_of_this_machine(onnxruntime, tmp_path):
    import onnx

    run = saved(tmp_path / "run", "narrow")
    path = exported(run, "onnx").path
    onnx.checker.check_model(path, full_check=True)
    said = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    values = {key: json.loads(text) for key, text in said.items()}
    whole = values.pop("ssl_samix")
    assert values == {"image_size": 32, "mean": MEAN, "std": STD, "feature_dim": 64}
    assert whole == {**backbone_and_meta("narrow")[1], **values}
    assert says_nothing_of_this_machine(path)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_export_gives_the_same_features_for_batches_of_any_size(kind, tmp_path):
    run = saved(tmp_path / "run", kind)
    done = exported(run, "torch_export")
    assert done.path == run / "encoder.pt2"
    about = {"ssl_samix.json": ""}
    model = torch.export.load(done.path, extra_files=about).module()
    for count in (1, 5):
        images = images_of(kind, count)
        close(model(images), run, images)
    told = {"images": images}
    exec(done.usage, told)
    close(told["features"], run, images)
    backbone, meta = backbone_and_meta(kind)
    assert json.loads(about["ssl_samix.json"]) == {**meta, "feature_dim": backbone.feature_dim}
    assert says_nothing_of_this_machine(done.path)


def test_weights_larger_than_an_onnx_file_are_refused(run, onnxruntime, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST", 2**10)
    with pytest.raises(ConfigError, match=r"take 0\.0 GiB and an ONNX file holds 2: choose format"):
        exported(run, "onnx")
    assert [p.name for p in run.iterdir()] == ["encoder.safetensors"]


def test_what_cannot_be_captured_is_told_in_one_sentence(run, onnxruntime, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Could not guard\non data-dependent expression")

    for name, module in (("onnx", torch.onnx), ("torch_export", torch.export)):
        monkeypatch.setattr(module, "export", fails)
        with pytest.raises(UserError, match=r"\(Could not guard\): choose format=") as caught:
            exported(run, name)
        assert "\n" not in str(caught.value)
    assert [p.name for p in run.iterdir()] == ["encoder.safetensors"]


def test_what_onnxruntime_does_not_read_is_not_written(run, onnxruntime, monkeypatch):
    class Model:
        def SerializeToString(self):  # noqa: N802 - protobuf's name
            return b"no model"

    monkeypatch.setattr(onnx_file, "_model", lambda _: Model())
    with pytest.raises(UserError, match="onnxruntime does not take resnet18") as caught:
        exported(run, "onnx")
    assert "\n" not in str(caught.value)
    assert [p.name for p in run.iterdir()] == ["encoder.safetensors"]


def test_an_error_without_words_is_named():
    assert graph.first_line(AssertionError()) == "AssertionError"
