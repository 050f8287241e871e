"""The package from Python: what the command does, without Hydra in sight."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ssl_samix
from ssl_samix.artifacts.encoder import load_encoder

TINY = {
    "data.limit": 96,
    "data.batch_size": 32,
    "backbone": {"width": 8},
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return ssl_samix.pretrain("digits", "simclr", tmp_path_factory.mktemp("api") / "run", **TINY)


def test_a_run_knows_its_folder_metrics_and_encoder(run):
    assert run.out.name == "run"
    assert {"loss", "knn/top1", "knn/best_top1", "rankme"} <= run.metrics.keys()
    assert run.metrics["epoch"] == 1
    assert run.encoder.feature_dim == 64


def test_the_encoder_is_the_trained_backbone_in_eval_mode(run):
    encoder = load_encoder(run.out)
    assert not encoder.training
    assert encoder.image_size == 16
    assert len(encoder.mean) == len(encoder.std) == 3
    checkpoint = torch.load(run.out / "last.ckpt", weights_only=True)
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"backbone.{name}"])
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        features = encoder(images)
        assert features.shape == (5, 64)
        torch.testing.assert_close(encoder(images[:2]), features[:2])


def test_every_file_of_a_run_gives_the_same_encoder(run):
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        files = [run.out, run.out / "last.ckpt", run.out / "encoder.safetensors"]
        first, *others = [load_encoder(path)(images) for path in files]
    for other in others:
        assert torch.equal(first, other)


def test_the_file_describes_itself(run):
    with safe_open(run.out / "encoder.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["ssl_samix"])
    assert meta["backbone"] == {"name": "resnet18", "width": 8, "stem": "small", "options": {}}
    assert (meta["method"], meta["data"], meta["image_size"]) == ("simclr", "digits", 16)


def test_any_picture_can_be_prepared(run):
    encoder = load_encoder(run.out)
    for picture in (Image.new("RGB", (300, 200)), Image.new("L", (8, 8)), Image.new("P", (16, 40))):
        assert encoder.prepare(picture).shape == (3, 16, 16)
    white = encoder.prepare(Image.new("RGB", (20, 20), "white"))
    expected = (1 - torch.tensor(encoder.mean)) / torch.tensor(encoder.std)
    torch.testing.assert_close(white.mean(dim=(1, 2)), expected)


def test_a_folder_is_a_data_set(tmp_path):
    for i in range(12):
        Image.new("RGB", (24, 24), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
    settings = {**TINY, "data.limit": None, "data.batch_size": 4, "method.queue_size": 8}
    run = ssl_samix.pretrain(tmp_path, "moco", tmp_path / "run", **settings)
    assert "knn/top1" not in run.metrics
    assert run.metrics["rankme"] >= 1
    assert run.encoder.image_size == 24


def test_mistakes_are_user_errors_with_the_commands_sentence(tmp_path):
    with pytest.raises(ssl_samix.UserError, match="did you mean 'simclr'"):
        ssl_samix.pretrain("digits", "simclear", tmp_path / "run")
    with pytest.raises(ssl_samix.UserError, match=r"did you mean 'trainer.max_epochs'"):
        ssl_samix.pretrain("digits", out=tmp_path / "run", trainer={"max_epoch": 1})
    with pytest.raises(ssl_samix.UserError, match="no checkpoint"):
        load_encoder(tmp_path / "nothing.ckpt")
    with pytest.raises(ssl_samix.UserError, match=r"no encoder.safetensors and no last.ckpt"):
        load_encoder(tmp_path)


def test_weights_that_do_not_fit_are_refused(run, tmp_path):
    checkpoint = torch.load(run.out / "last.ckpt", weights_only=True)
    checkpoint["ssl_samix"]["backbone"]["width"] = 16
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ssl_samix.UserError, match="does not fit the backbone it names"):
        load_encoder(tmp_path / "other.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(
        (run.out / "encoder.safetensors").read_bytes()[:5000]
    )
    with pytest.raises(ssl_samix.UserError, match="damaged"):
        load_encoder(tmp_path / "cut.safetensors")


def test_public_names_are_what_they_say():
    for name in ssl_samix.__all__:
        assert getattr(ssl_samix, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = ssl_samix.nothing


def test_a_run_is_resumed_and_prolonged_from_python(run, tmp_path):
    import shutil

    copy = tmp_path / "a copy, of it"
    shutil.copytree(run.out, copy)
    longer = ssl_samix.pretrain(resume=copy, trainer={"max_epochs": 3})
    assert longer.out == copy
    assert longer.metrics["epoch"] == 2
    starts = json.loads((copy / "environment.json").read_text())
    assert len(starts) == 2, "the first start and the resume"
    assert {"torch", "lightly", "ssl_samix"} <= starts[0]["packages"].keys()
    again = ssl_samix.pretrain(resume=copy)
    assert again.metrics == longer.metrics, "a finished run is left alone"
    before = (copy / "metrics.csv").read_bytes()
    with pytest.raises(ssl_samix.UserError, match="is finished after 3 epochs"):
        ssl_samix.pretrain(resume=copy, trainer={"max_epochs": 1})
    assert (copy / "metrics.csv").read_bytes() == before, "nothing is taken back"


def test_a_worse_epoch_after_a_resume_does_not_become_the_best(run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run.out, copy)
    checkpoint = torch.load(copy / "last.ckpt", weights_only=True)
    (key,) = [k for k in checkpoint["callbacks"] if "knn/top1" in k]
    state = checkpoint["callbacks"][key]
    assert state["best_model_score"] is not None, "last.ckpt knows of the best"
    state["best_model_score"] = torch.tensor(99.9)
    state["best_k_models"] = {k: torch.tensor(99.9) for k in state["best_k_models"]}
    torch.save(checkpoint, copy / "last.ckpt")
    before = (copy / "best.ckpt").read_bytes()
    ssl_samix.pretrain(resume=copy, trainer={"max_epochs": 3})
    assert (copy / "best.ckpt").read_bytes() == before


def test_a_failed_start_leaves_the_folder_free(tmp_path):
    with pytest.raises(ssl_samix.UserError, match="larger than the data set"):
        ssl_samix.pretrain("digits", out=tmp_path / "run", **{"data.batch_size": 2000})
    assert not (tmp_path / "run").exists()


def test_other_data_are_another_run(run, tmp_path):
    for i in range(40):
        Image.new("RGB", (16, 16), (i * 6, 0, 0)).save(tmp_path / f"{i}.png")
    settings = {**TINY, "data.limit": None, "data.batch_size": 4, "data.image_size": 16}
    ssl_samix.pretrain(tmp_path, "simclr", tmp_path / "run", **settings)
    (tmp_path / "other").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "0.png")
    with pytest.raises(ssl_samix.UserError, match=r"belongs to another run \(data.root"):
        ssl_samix.pretrain(tmp_path / "other", "simclr", tmp_path / "run", **settings)


def test_a_diverged_run_says_so(tmp_path):
    with pytest.raises(
        ssl_samix.UserError,
        match=r"loss became NaN or infinite at step \d+, .* lower optimizer.lr \(no epoch",
    ):
        ssl_samix.pretrain(
            "digits", "simclr", tmp_path / "run", mixup="none", **{**TINY, "optimizer.lr": 1e30}
        )
    assert not (tmp_path / "run" / "encoder.safetensors").exists()


def test_the_last_epochs_are_saved_whatever_the_interval(tmp_path):
    settings = {**TINY, "callbacks.checkpoint.every_n_epochs": 5}
    run = ssl_samix.pretrain("digits", "simclr", tmp_path / "run", **settings)
    checkpoint = torch.load(run.out / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
