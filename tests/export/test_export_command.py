"""The words of ``samix export``, and what it leaves behind."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys

import pytest
import torch

from ssl_samix.artifacts import export_formats as same
from ssl_samix.artifacts.encoder import load_encoder, save_encoder
from ssl_samix.artifacts.export import parse_export
from ssl_samix.artifacts.export_formats import check_same
from ssl_samix.errors import CheckpointError, ConfigError, UserError
from tests.conftest import samix_here
from tests.export.conftest import backbone_and_meta, exported, saved


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "needs an encoder: run=<run folder, checkpoint or encoder.safetensors>"),
        (["run={run}"], "format=<torchvision or timm or onnx or torch_export>"),
        (["run={run}", "format=onx"], "unknown format 'onx': did you mean 'onnx'?"),
        (["run={run}", "format=torch_vision"], "did you mean 'torchvision'?"),
        (["run={run}", "format=7"], "format needs a name or null, got '7'"),
        (["run={run}", "format=torchscript"], "deprecated it: choose format=torch_export"),
        (["run={run}", "fromat=timm"], "unknown key 'fromat': did you mean 'format'"),
        (["run={run}", "method=moco"], "export takes no method: choose from format, out, run"),
        (["run=nowhere", "format=timm"], "run=nowhere does not exist: give a run folder"),
        (["run=empty", "format=timm"], "empty holds no encoder.safetensors and no last.ckpt"),
        (["run={run}", "format=timm", "out=a.onnx"], "format=timm a name that ends in .pth"),
        (["run={run}", "format=timm", "out=no/a.pth"], "out=no/a.pth: there is no folder no"),
        (["run=model.pth", "format=timm"], "out=model.pth is the encoder itself"),
    ],
)
def test_bad_words(words, sentence, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pth").write_text("weights")
    before = digests(run)
    with pytest.raises(UserError) as caught:
        parse_export([word.replace("{run}", f"'{run}'") for word in words])
    assert sentence in str(caught.value)
    assert digests(run) == before
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "model.pth", run.name}


def test_the_file_lies_beside_what_was_exported(run, tmp_path, monkeypatch):
    def out(*words):
        return parse_export([f"run='{words[0]}'", *words[1:]]).out

    (run / "best.ckpt").touch()
    assert out(run, "format=torch_export") == run / "encoder.pt2"
    assert out(run / "encoder.safetensors", "format=timm") == run / "encoder.pth"
    assert out(run / "best.ckpt", "format=torchvision") == run / "best.pth"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert out(run, "format=timm", "out='~/A.PTH'") == tmp_path / "A.PTH"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_way_to_install_it(run, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        exported(run, "onnx")
    assert str(caught.value) == f"format=onnx needs {package}: pip install 'ssl_samix[export]'"
    parse_export([f"run='{run}'", "format=torch_export"])  # others do not need it


def test_a_mistake_is_told_before_heavy_imports(run, tmp_path):
    code = (
        "import sys\nfrom ssl_samix.artifacts.export import parse_export\n"
        "try:\n    parse_export(sys.argv[1:])\n"
        "except ValueError as error:\n    print(error)\n"
        "print([m for m in ('torch', 'timm', 'onnx', 'onnxruntime') if m in sys.modules])\n"
    )
    words = [f"run='{run}'", "format=torch_export", "out=a.pth"]
    shown = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert shown.stdout.splitlines() == [
        "out=a.pth: give the file of format=torch_export a name that ends in .pt2",
        "[]",
    ]


def test_the_start_of_a_run_names_the_format_that_it_cannot_have(tmp_path):
    words = ["pretrain", "data.limit=32", "data.batch_size=16", "trainer.max_epochs=1"]
    vit = "backbone.options={patch_size:8,embed_dim:24,depth:4,num_heads:2}"
    printed = samix_here(*words, "backbone=vit_tiny", vit, "out=vit", cwd=tmp_path)
    assert "export    every format of samix export but torchvision, which has no" in printed
    assert "\nexport " not in samix_here(*words, "backbone.width=4", "out=resnet", cwd=tmp_path)


def test_a_checkpoint_is_exported_as_its_run_is(tmp_path):
    backbone, meta = backbone_and_meta("small")
    weights = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    torch.save({"state_dict": weights, "ssl_samix": meta}, tmp_path / "last.ckpt")
    path = exported(tmp_path, "timm").path
    given = torch.load(path, weights_only=True)
    assert path == tmp_path / "encoder.pth"
    assert all(
        torch.equal(given[k.removeprefix("trunk.")], v) for k, v in backbone.state_dict().items()
    )


def test_a_file_that_was_there_is_replaced_and_the_encoder_is_never_touched(tmp_path):
    run = saved(tmp_path / "run", "small")
    (run / "encoder.pth").write_text("old")
    before = digests(run)
    for name in ("torchvision", "timm", "torch_export"):
        exported(run, name)
    after = digests(run)
    assert set(after) == {"encoder.safetensors", "encoder.pth", "encoder.pt2"}
    assert after["encoder.safetensors"] == before["encoder.safetensors"]
    assert after["encoder.pth"] != before["encoder.pth"]


@pytest.mark.parametrize("content", [b"", b"no weights at all", None])
def test_a_damaged_encoder_is_told(run, content):
    path = run / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        exported(run, "torch_export")
    assert [p.name for p in run.iterdir()] == ["encoder.safetensors"]


def test_a_full_or_forbidden_place_is_told(run, tmp_path):
    (tmp_path / "taken.pt2").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*taken\.pt2"):
        exported(run, "torch_export", out=tmp_path / "taken.pt2")
    assert {p.name for p in tmp_path.iterdir()} == {"taken.pt2", run.name}


def test_features_that_differ_are_refused_and_nothing_is_written(run, monkeypatch):
    monkeypatch.setattr(same, "TOLERANCE", -1.0)
    (run / "encoder.pt2").write_text("old")
    before = digests(run)
    with pytest.raises(UserError, match=r"format=torch_export would not give .* nothing was writ"):
        exported(run, "torch_export")
    assert digests(run) == before


def test_how_much_features_may_differ(run):
    encoder = load_encoder(run)
    check_same(encoder, lambda images: encoder(images) + 1e-7, "onnx")
    wrong = {
        "1.0e-03 away": lambda images: encoder(images) + 1e-3,
        "nan away": lambda images: encoder(images) * float("nan"),
        r"of shape \(1, 32\), not \(1, 64\)": lambda images: encoder(images)[:, :32],
        "of shape": lambda images: encoder(images)[:1],  # a batch that was fixed
        " away": copy.deepcopy(encoder).train(),  # statistics of the batch
    }
    for sentence, exported_ in wrong.items():
        with pytest.raises(UserError, match=sentence):
            check_same(encoder, exported_, "onnx")


def test_an_encoder_that_diverged_is_told(run):
    backbone, meta = backbone_and_meta("narrow")
    backbone.trunk.conv1.weight.data.fill_(float("nan"))
    save_encoder(run / "encoder.safetensors", backbone, meta)
    with pytest.raises(CheckpointError, match="features are not finite"):
        exported(run, "torch_export")
