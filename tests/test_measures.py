"""``samix measures``: without labels, and k-means where there are some."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

import ssl_samix
from ssl_samix.cli.main import main
from ssl_samix.data.datasets import load_splits
from ssl_samix.data.views import normalize
from ssl_samix.evaluation.measures import kmeans
from ssl_samix.training.logging import read_metrics

TINY = {
    "data.batch_size": 32,
    "backbone.width": 8,
    "trainer.max_epochs": 1,
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",  # what is measured of a run is measured again in float32
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    small = {"data.limit": 300, "method.queue_size": 64}
    return ssl_samix.pretrain("digits", "moco", folder, mixup="none", **TINY, **small).out


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "photos").mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(256, size=(20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i:02}.png")
    settings = {"data.root": str(folder / "photos"), **TINY}
    return ssl_samix.pretrain("folder", "simclr", folder / "run", mixup="none", **settings).out


@pytest.fixture
def measured(monkeypatch, capsys, tmp_path):
    """Run the command in this process and return its record, its rows by variant, its lines."""

    def measure(*words):
        monkeypatch.setattr(sys, "argv", ["samix", "measures", *map(str, words)])
        main()
        *lines, folder = capsys.readouterr().out.splitlines()
        with open(f"{folder}/results.json", encoding="utf-8") as file:
            record = json.load(file)
        return record, {r["variant"]: r for r in record["results"]}, lines

    return measure


def embedded(run, images):
    encoder = ssl_samix.load_encoder(run)
    mean, std = torch.tensor(encoder.mean), torch.tensor(encoder.std)
    with torch.no_grad():
        return encoder(normalize(images.load(range(len(images))), mean, std))


def test_the_numbers_are_those_of_the_encoders_features(run, measured):
    before = hashlib.sha256((run / "encoder.safetensors").read_bytes()).digest()
    record, rows, lines = measured(f"run={run}")
    splits = load_splits("digits", None, 16, 300)
    train, test = (embedded(run, s).double().numpy() for s in (splits.train, splits.val))
    share = np.linalg.svd(train, compute_uv=False)
    share /= share.sum()
    rank = np.exp(-(share * np.log(share + 1e-12)).sum())
    assert rows["features"]["numbers"]["rankme"] == pytest.approx(rank, rel=1e-3)
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    pairs = (2 - 2 * unit @ unit.T)[np.triu_indices(300, 1)]
    uniform = np.log(np.exp(-2 * pairs).mean())
    assert rows["features"]["numbers"]["uniformity"] == pytest.approx(uniform, abs=1e-4)
    assert rows["features"]["settings"] == {"images": 300}
    found = [kmeans(torch.from_numpy(test), 10, seed)[0].numpy() for seed in range(5)]
    labels = splits.val.labels.numpy()
    mutual = [normalized_mutual_info_score(labels, clusters) for clusters in found]
    adjusted = [adjusted_rand_score(labels, clusters) for clusters in found]
    assert rows["k-means"]["numbers"]["nmi"] == pytest.approx(fmean(mutual), abs=0.02)
    assert rows["k-means"]["numbers"]["ari"] == pytest.approx(fmean(adjusted), abs=0.03)
    assert len(lines) == 3
    assert hashlib.sha256((run / "encoder.safetensors").read_bytes()).digest() == before
    assert record["data"]["test_images"] == 359


def test_k_means_tells_every_start_and_their_spread(run, measured):
    record, rows, _ = measured(f"run={run}", "starts=3", "clusters=7", "sample=50")
    starts = record["details"]["k-means"]
    assert {key: len(values) for key, values in starts.items()} == {
        "nmi": 3, "ari": 3, "cluster_accuracy": 3,
    }  # fmt: skip
    assert all(len(set(values)) > 1 for values in starts.values()), "each from a seed of its own"
    shown = rows["k-means"]
    assert shown["settings"]["clusters"] == 7
    for key, values in starts.items():
        assert shown["numbers"][key] == pytest.approx(fmean(values))
        assert shown["settings"][f"{key}_std"] == pytest.approx(stdev(values))
    # Seven clusters can stand for seven of the ten classes, each about a tenth of the images.
    assert 10 < shown["numbers"]["cluster_accuracy"] < 75
    _, rows, _ = measured(f"run={run}", "starts=1", "sample=50")
    assert rows["k-means"]["settings"] == {"clusters": 10, "starts": 1}


def test_alignment_is_what_the_monitor_saw_of_the_same_views(run, measured):
    _, rows, _ = measured(f"run={run}", "sample=250", "starts=1")
    seen = float(read_metrics(run / "metrics.csv")[-1]["alignment"])
    assert rows["views moco/simsiam"]["numbers"]["alignment"] == pytest.approx(seen, rel=1e-4)


def test_a_seed_draws_other_views_of_the_same_images(run, measured):
    words = [f"run={run}", "starts=1"]
    (_, first, _), (_, second, _) = measured(*words), measured(*words, "seed=1")
    assert first["features"] == second["features"], "all images, whatever the seed"
    first, second = (rows["views moco/simsiam"]["numbers"]["alignment"] for rows in (first, second))
    assert first != second
    assert second == pytest.approx(first, rel=0.2)


def test_other_views_are_named(run, measured, tmp_path, monkeypatch):
    words = [f"run={run}", "sample=50", "starts=1"]
    _, rows, _ = measured(*words, "views=simclr")
    simclr = rows["views simclr"]["numbers"]["alignment"]
    _, rows, _ = measured(*words, "views=simclr", "views.a.jitter=0.0", "views.b.jitter=0.0")
    (own,) = [name for name in rows if name.startswith("views ")]
    assert own != "views simclr"
    assert 0 < rows[own]["numbers"]["alignment"] < simclr, "without jitter, views are more alike"
    monkeypatch.chdir(tmp_path)
    _, rows, _ = measured("run=resnet18", "weights=random", "data=digits", *words[1:])
    assert "views simclr" in rows, "a model without a run has no views of its own"


def test_without_labels_there_is_no_k_means(unlabelled, measured):
    record, rows, lines = measured(f"run={unlabelled}")
    assert set(rows) == {"features", "views simclr"}
    assert lines[0] == "no labels, hence no k-means"
    assert record["data"]["test_images"] == 0
    with (unlabelled / "results.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["variant"] for row in written] == ["features", "views simclr"]
    assert float(written[0]["rankme"]) == pytest.approx(
        rows["features"]["numbers"]["rankme"], rel=1e-5
    )
    assert written[0]["nmi"] == written[0]["top1"] == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "measures needs an encoder: run=<run folder"),
        (["run={run}", "samples=5"], "unknown key 'samples': did you mean 'sample'"),
        (["run={run}", "sample=1"], "sample must be a number in [2, 25600], got 1"),
        (["run={run}", "starts=0"], "starts must be a number in [1, 100], got 0"),
        (["run={run}", "clusters=1"], "clusters must be a number at least 2, got 1"),
        (["run={run}", "clusters=many"], "clusters needs a whole number or auto, got 'many'"),
        (["run={run}", "clusters=500"], "359 test images cannot make 500 clusters"),
        (["run={run}", "views=mocco"], "unknown views 'mocco': did you mean 'moco'"),
        (["run={unlabelled}", "clusters=5"], "clusters=5: there are no labels to compare"),
    ],
)
def test_bad_input(words, sentence, run, unlabelled, fails):
    before = {p for folder in (run, unlabelled) for p in folder.rglob("*")}
    told = fails("measures", *(word.format(run=run, unlabelled=unlabelled) for word in words))
    assert sentence in told
    assert {p for folder in (run, unlabelled) for p in folder.rglob("*")} == before
