"""``samix robustness`` on what ``samix linear`` leaves, from pretraining to corrupted images."""

from __future__ import annotations

import csv
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import ssl_samix
from ssl_samix.cli.main import main
from ssl_samix.data.datasets import load_splits
from ssl_samix.evaluation.features import extract
from ssl_samix.evaluation.robustness import CIFAR10_C

SIZE = 16
TINY = {
    "data.batch_size": 16, "backbone.width": 8, "trainer.max_epochs": 2, "mixup": "none",
    "method.queue_size": 32, "seed": 0, "trainer.precision": "32-true",
}  # fmt: skip


def samix(*words):
    """Run a command and return what it prints, and the record that it leaves."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        main([str(word) for word in words])
    lines = printed.getvalue().splitlines()
    return lines, json.loads((Path(lines[-1]) / "results.json").read_text())


def textures(root):
    """Two classes of the same colours: even, and a checkerboard, which a strong blur makes even."""
    generator = np.random.default_rng(0)
    sign = np.indices((SIZE, SIZE)).sum(axis=0) % 2 * 2 - 1
    for part, count in (("train", 40), ("test", 20)):
        for i in range(count):
            colour = generator.integers(80, 170, 3)
            for name, amplitude in (("checker", 60), ("even", 0)):
                pixels = colour + amplitude * sign[:, :, None]
                (root / part / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    return ssl_samix.pretrain(textures(folder / "textures"), "moco", folder / "run", **TINY).out


@pytest.fixture(scope="module")
def fitted(run):
    """The results folder of samix linear and its record."""
    lines, record = samix("linear", f"run={run}")
    return Path(lines[-1]), record


def embedded(module, images, splits):
    cpu = torch.device("cpu")
    return extract(module, images, range(len(images)), splits.mean, splits.std, device=cpu)


def test_the_classifier_is_scikit_learns_on_the_encoders_features(run, fitted):
    folder, record = fitted
    classifier, encoder = ssl_samix.load_classifier(folder), ssl_samix.load_encoder(run)
    assert (classifier.network, classifier.classes) == ("linear", ("checker", "even"))
    splits = load_splits("folder", run.parent / "textures", SIZE, None)
    train, test = (embedded(encoder, s, splits).numpy() for s in (splits.bank, splits.val))
    scaler = StandardScaler().fit(train)
    (lbfgs,) = (r for r in record["results"] if r["variant"] == "lbfgs")
    model = LogisticRegression(C=lbfgs["settings"]["C"], max_iter=1000)
    model.fit(scaler.transform(train), splits.bank.labels)
    logits = embedded(classifier, splits.val, splits).numpy()
    expected = model.decision_function(scaler.transform(test))
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], expected, rtol=2e-2, atol=2e-2)
    assert (logits.argmax(axis=1) == model.predict(scaler.transform(test))).all()
    image = Image.open(run.parent / "textures" / "test" / "checker" / "00.png")
    with torch.no_grad():
        assert classifier.classes[int(classifier(classifier.prepare(image)[None]).argmax())] == (
            "checker"
        )


def test_corruptions_from_pretraining_on(run, fitted):
    folder, linear = fitted
    lines, record = samix("robustness", f"run={folder}", "corruptions=true")
    (row,) = record["results"]
    numbers, (found,) = row["numbers"], record["details"]["corruptions"].values()
    assert row["variant"] == "linear"
    assert row["settings"] == {"strength": 8, "corruptions": "CIFAR-10-C"}
    # the same network on the same images as samix linear measured
    assert numbers["top1"] == linear["results"][1]["numbers"]["top1"] == 100
    assert record["data"] == linear["data"]
    assert record["encoder"]["fingerprint"] == linear["encoder"]["fingerprint"]
    # a blurred checkerboard is an even image: both classes get one answer
    assert found["gaussian_blur"]["top1"][0] > found["gaussian_blur"]["top1"][4]
    assert found["gaussian_blur"]["top1"][4] == pytest.approx(50, abs=5)
    assert {k: tuple(v["strengths"]) for k, v in found.items()} == CIFAR10_C
    for name, each in found.items():
        assert numbers[f"{name}_top1"] == pytest.approx(fmean(each["top1"]))
    every = [value for each in found.values() for value in each["top1"]]
    assert len(every) == 20
    assert numbers["corrupted_top1"] == pytest.approx(fmean(every))
    assert f"corrupted top-1 {numbers['corrupted_top1']:.2f}%" in lines[0]
    assert f"blur {numbers['gaussian_blur_top1']:.2f}%" in lines[2]
    assert (
        samix("robustness", f"run={folder}", "corruptions=true", "chunk=7")[1]["details"]
        == (record["details"])
    )


def test_its_results_stand_with_the_runs(run, fitted, monkeypatch):
    folder, _ = fitted
    file = folder / "classifier.safetensors"
    monkeypatch.chdir(folder)  # from inside too
    for source in (folder, file, "classifier.safetensors"):
        lines, record = samix("robustness", f"run={source}")
        assert Path(lines[-1]).parent == run / "results"
        assert "corrupted_top1" not in record["results"][0]["numbers"]
        assert record["details"] == {}
    with (run / "results.csv").open(newline="") as rows:
        last = list(csv.DictReader(rows))[-1]
    assert (last["protocol"], last["variant"], last["corrupted_top1"]) == (
        "robustness", "linear", "",
    )  # fmt: skip


def test_it_is_measured_on_the_data_it_was_fitted_on(run, tmp_path):
    """Which need not be those of the run, and may have been a part of them."""
    other = textures(tmp_path / "other")
    (other / "train" / "even").rename(other / "train" / "plain")
    (other / "test" / "even").rename(other / "test" / "plain")
    words = ["data=folder", f"data.root={other}", "data.limit=20", f"out={tmp_path / 'fitted'}"]
    _, linear = samix("linear", f"run={run}", *words)
    out = tmp_path / "measured"
    _, record = samix("robustness", f"run={tmp_path / 'fitted'}", f"out={out}")
    assert record["data"] == linear["data"]
    assert record["data"]["train_images"] == 20
    assert ssl_samix.load_classifier(tmp_path / "fitted").classes == ("checker", "plain")


@pytest.mark.parametrize("name", ["mnasnet0_5", "vit_tiny_patch16_224"])
def test_encoders_from_elsewhere_have_a_classifier_too(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = run.parent / "textures"
    words = ["data=folder", f"data.root={root}", "image_size=32", "weights=random", "seed=3"]
    lines, linear = samix("linear", f"run={name}", *words)
    lines, record = samix("robustness", f"run={lines[-1]}")
    assert Path(lines[-1]).parent == tmp_path / "runs" / name / "results"
    for key in ("fingerprint", "weights"):
        assert record["encoder"][key] == linear["encoder"][key]
    assert record["encoder"]["weights"] == "random"
    assert record["results"][0]["numbers"]["top1"] == linear["results"][1]["numbers"]["top1"]


def test_the_papers_protocol_leaves_no_classifier(run, tmp_path):
    words = ["protocol=augmented", "preset=solo", "preset.epochs=1", "preset.batch_size=16"]
    samix("linear", f"run={run}", *words, f"out={tmp_path / 'out'}")
    assert not (tmp_path / "out" / "classifier.safetensors").exists()


def test_mistakes(run, fitted, fails, tmp_path):
    folder, _ = fitted
    said = fails("robustness", f"run={run}")
    assert said.startswith(f"samix: {run} holds no classifier: fit one")
    assert f"with samix linear run={run}" in said
    for source in (run / "encoder.safetensors", run / "last.ckpt"):
        assert "holds no classifier" in fails("robustness", f"run={source}")
    assert "needs true or false" in fails("robustness", f"run={folder}", "corruptions=3")
    assert "holds no encoder: give the run" in fails("knn", f"run={folder}", "k=[5]")
    with pytest.raises(ssl_samix.UserError, match="holds no network=ema: it has linear"):
        ssl_samix.load_classifier(folder, "ema")
    (tmp_path / "empty").mkdir()
    assert "holds no" in fails("robustness", f"run={tmp_path / 'empty'}")
