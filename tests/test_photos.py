"""A person's own folder, from the command to the run: nothing is wrong or left out unsaid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import ssl_samix
from ssl_samix.artifacts.checkpoints import NEEDED, AtomicCheckpointIO
from ssl_samix.cli.main import main
from ssl_samix.training.run import as_words
from tests.conftest import samix_here

TINY = [
    "data.batch_size=4", "data.image_size=8", "backbone.width=4", "trainer.max_epochs=1",
    "trainer.accelerator=cpu", "mixup=none",
]  # fmt: skip
PRETRAIN = ["pretrain", "method=simclr", "data=folder", *TINY]


def paint(folder, count, shade=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (20 * i, shade, 0)).save(folder / f"{i}.png")


def classes(root, names, count=6):
    for k, name in enumerate(names):
        paint(root / name, count, 80 * k)
    return root


def lines(printed, name):
    return [line[10:] for line in printed.splitlines() if line.split()[:1] == [name]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch inside its own photographs, and what it said."""
    photos = tmp_path_factory.mktemp("photos")
    paint(photos, 8)
    (photos / "notes.txt").touch()
    printed = samix_here(*PRETRAIN, "data.root=.", "out=runs/first", cwd=photos)
    return photos, printed


@pytest.fixture
def copy(run, tmp_path):
    """The same, to be changed."""
    photos = tmp_path / "photos"
    shutil.copytree(run[0], photos)
    return photos


def test_a_run_does_not_train_on_what_it_wrote(copy, run):
    assert lines(run[1], "note") == ["left out: 1 files that are not images here (.txt 1)"]
    paint(copy / "runs" / "first" / "mixing", 2)
    words = ["resume=runs/first", f"data.root={copy}", "trainer.max_epochs=2"]
    printed = samix_here("pretrain", *words, cwd=copy)
    assert lines(printed, "data") == ["folder: 8 images at 8 px, no labels"]
    assert lines(printed, "note")[1:] == ["left out: what samix wrote in runs/first"]


@pytest.mark.parametrize("change", [1, -1])
def test_another_number_of_images_stops_a_resume(change, copy, fails):
    if change > 0:
        shutil.copy(copy / "0.png", copy / "more.png")
    else:
        (copy / "0.png").unlink()
    run = copy / "runs" / "first"
    said = fails("pretrain", f"resume={run}", f"data.root={copy}", "trainer.max_epochs=2")
    assert f"is of a run on 8 training images, the data now hold {8 + change}" in said
    assert said.endswith("put the images back as they were, or start a new run")


def test_a_checkpoint_that_does_not_say_how_many_goes_on(tmp_path):
    network = {"name": "resnet18", "width": 8, "stem": "small"}
    meta = {"backbone": network, "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    state = {**dict.fromkeys(NEEDED), "state_dict": {}, "epoch": 3}
    AtomicCheckpointIO(meta).save_checkpoint(state, tmp_path / "old.ckpt")
    new = AtomicCheckpointIO({**meta, "train_images": 8})
    assert new.load_checkpoint(tmp_path / "old.ckpt")["epoch"] == 3


def test_a_renamed_class_stops_a_resume(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("Train", "Test"):
        classes(tmp_path / "set" / split, ("bee", "cat", "dog"))
    words = ["supervised", "data=folder", "data.root=set", *TINY, "out=run"]
    printed = samix_here(*words, cwd=tmp_path)
    assert lines(printed, "data") == ["folder: 18 images at 8 px, 3 classes, for training"]
    assert lines(printed, "note") == [
        "the training and validation images are those in Train/ and Test/"
    ]
    for split in ("Train", "Test"):
        (tmp_path / "set" / split / "bee").rename(tmp_path / "set" / split / "wasp")
    said = fails("supervised", "resume=run", "trainer.max_epochs=2")
    assert "bee, cat, dog there, cat, dog, wasp in the data" in said
    assert "start a new run with init=" in said


def test_an_empty_path_is_not_the_current_folder(run, fails, monkeypatch, tmp_path):
    monkeypatch.chdir(run[0])
    encoder = f"run={run[0]}/runs/first"
    assert "images needs a path" in fails("embed", encoder, "images=")
    monkeypatch.chdir(tmp_path)
    paint(tmp_path, 6)
    for data in ("", {"data": "folder", "data.root": ""}):
        given = data if isinstance(data, dict) else {"data": data}
        with pytest.raises(ssl_samix.UserError, match="needs a path"):
            ssl_samix.pretrain(**given)
    assert not (tmp_path / "runs").exists()


def test_a_path_is_a_path_and_a_name_a_name():
    assert as_words("digits", {}) == ["data='digits'"]
    assert as_words(Path("digits"), {}) == ["data='folder'", "data.root='digits'"]


def measured(run, root, out, *more):
    main(
        ["knn", f"run={run[0]}/runs/first", "data=folder", f"data.root={root}", f"out={out}", *more]
    )
    return json.loads((out / "results.json").read_text())


def test_knn_leaves_out_a_k_that_no_image_has(run, tmp_path, caplog, fails):
    for split in ("train", "test"):
        classes(tmp_path / "set" / split, "ab")
    record = measured(run, tmp_path / "set", tmp_path / "out")
    assert {r["variant"] for r in record["results"]} == {"chosen", "k10-T0.07", "k10-T0.1"}
    assert caplog.messages == [
        "the training and validation images are those in train/ and test/",
        "k=20, 100, 200 left out: there are 12 training images",
    ]
    words = ["knn", f"run={run[0]}/runs/first", "data=folder", f"data.root={tmp_path}/set"]
    assert "k=12 needs more than 12 training images, got 12: give k=[11]" in fails(*words, "k=[12]")


def test_one_image_per_class_is_told_as_what_it_is(run, tmp_path, fails):
    classes(tmp_path / "set", "ab", count=1)
    words = ["knn", f"run={run[0]}/runs/first", "data=folder", f"data.root={tmp_path}/set"]
    assert "needs images to test on, and each class has one image" in fails(*words)
