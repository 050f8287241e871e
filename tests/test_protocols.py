"""The protocols as people meet them: commands on data with a known answer, and what they leave."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_samix
from ssl_samix.artifacts.encoder import load_encoder, save_encoder
from ssl_samix.cli.main import main
from ssl_samix.evaluation.knn import neighbours
from ssl_samix.models.backbone import Backbone
from tests.conftest import samix_here

SIZE = 16
META = {"image_size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "method": "none"}
QUICK = {
    "linear": ["linear"],
    "knn": ["knn", "k=[5]"],
    "semi": ["semi", "finetune=barlow_1", "finetune.epochs=2"],
}


AUGMENTED = [
    "protocol=augmented", "preset=solo", "preset.epochs=10", "preset.batch_size=16",
    "preset.lr=[3.0,30.0]",
]  # fmt: skip


def paint(folder, count, colour, generator, spread=6):
    """Write images around a colour."""
    folder.mkdir(parents=True)
    for i in range(count):
        noise = torch.randint(-spread, spread + 1, (SIZE, SIZE, 3), generator=generator)
        pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{folder.name}-{i:02}.png")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Classes that any encoder tells apart: red, green and blue."""
    root, generator = tmp_path_factory.mktemp("colours"), torch.Generator().manual_seed(0)
    classes = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}
    for name, colour in classes.items():
        paint(root / "train" / name, 30, colour, generator)
        paint(root / "test" / name, 10, colour, generator)
    return root


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Classes that nobody can tell apart."""
    root, generator = tmp_path_factory.mktemp("noise"), torch.Generator().manual_seed(0)
    for name in ("heads", "tails"):
        paint(root / "train" / name, 100, (128, 128, 128), generator, spread=100)
        paint(root / "test" / name, 100, (128, 128, 128), generator, spread=100)
    return root


@pytest.fixture
def encoder(tmp_path):
    """An untrained encoder, as a file of ours."""
    torch.manual_seed(0)
    backbone = Backbone("resnet18", image_size=SIZE, width=8)
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, backbone, {**META, "backbone": backbone.settings})
    return path


def measured(protocol, run, root, *words, out):
    main([*QUICK[protocol], f"run={run}", "data=folder", f"data.root={root}", f"out={out}", *words])
    return json.loads((out / "results.json").read_text())


def top1(record):
    return {r["variant"]: r["numbers"]["top1"] for r in record["results"]}


@pytest.mark.parametrize(
    ("protocol", "words", "variants"),
    [
        ("linear", [], {"heads", "lbfgs"}),
        ("linear", AUGMENTED, {"augmented"}),
        ("knn", [], {"chosen", "k5-T0.07", "k5-T0.1"}),
        (
            "semi",
            ["per_class=4", "baselines=true"],
            {f"{way} 4 per class" for way in ("fine-tuned", "from random weights", "linear")},
        ),
    ],
)
def test_colours_are_told_apart(protocol, words, variants, encoder, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = encoder.read_bytes()
    record = measured(protocol, encoder, colours, *words, out=tmp_path / "out")
    found = top1(record)
    assert set(found) == variants
    if protocol == "semi":  # two epochs of twelve images tune nothing: what they read is features
        assert found["linear 4 per class"] == 100
        names = (tmp_path / "out" / "split.txt").read_text().split()
        assert len(names) == 12
        assert {name.split("/")[0] for name in names} == {"red", "green", "blue"}
    else:
        assert set(found.values()) == {100}
    assert encoder.read_bytes() == before
    assert record["data"]["train_images"] == 90
    assert record["data"]["test_images"] == 30


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_noise_is_chance(protocol, encoder, noise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = measured(protocol, encoder, noise, out=tmp_path / "out")
    for variant, value in top1(record).items():
        assert 50 - 14 < value < 50 + 14, variant  # four standard errors of 200 coins


def test_a_planted_duplicate_is_the_nearest_neighbour(encoder, noise, tmp_path):
    trained = load_encoder(encoder)
    files = sorted((noise / "train").rglob("*.png"))
    images = torch.stack([trained.prepare(Image.open(f)) for f in files])
    with torch.no_grad():
        bank = trained(images)
        similarity, rows = neighbours(bank, trained(images[[7, 150]]), 1)
    assert rows.flatten().tolist() == [7, 150]
    assert similarity.flatten().tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = {
        "data.limit": 256, "data.batch_size": 64, "backbone.width": 4, "trainer.max_epochs": 1,
        "mixup": "none", "method.queue_size": 64,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("run") / "a run, (1)=x"
    return ssl_samix.pretrain("digits", "moco", folder, **settings).out


def content(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_run_knows_its_data_and_is_not_changed(run, tmp_path):
    before = content(run)
    for protocol, words in QUICK.items():
        printed = samix_here(*words, f"run={run}", cwd=tmp_path)
        assert f"{run}/results/{protocol}-digits-" in printed
        assert "top-1" in printed
    after = content(run)
    assert {name: after[name] for name in before} == before
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"results", "results.csv", ".results.csv.lock"}
    with (run / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["protocol"] for r in rows] == [
        "linear", "linear", "knn", "knn", "knn", "semi", "semi", "semi",
    ]  # fmt: skip
    assert {r["data"] for r in rows} == {"digits"}
    assert len({r["encoder"] for r in rows}) == 1
    assert len({r["data_fingerprint"] for r in rows}) == 1
    for row in rows:
        record = json.loads((tmp_path / row["folder"] / "results.json").read_text())
        assert record["settings"]["data"]["limit"] == 256
        assert record["data"]["train_images"] == 256
        assert record["encoder"]["method"] == "moco"
        assert float(row["top1"]) == pytest.approx(top1(record)[row["variant"]], abs=1e-3)


def test_the_last_checkpoint_is_the_encoder(run, tmp_path):
    records = []
    for number, source in enumerate((run, run / "last.ckpt", run / "encoder.safetensors")):
        main(["knn", "k=[5]", f"run={source}", f"out={tmp_path}/{number}"])
        records.append(json.loads((tmp_path / str(number) / "results.json").read_text()))
    assert len({r["encoder"]["fingerprint"] for r in records}) == 1
    assert len({json.dumps(r["results"]) for r in records}) == 1
    main(["knn", "k=[5]", f"run={run}", "weights=random", f"out={tmp_path}/untrained"])
    untrained = json.loads((tmp_path / "untrained" / "results.json").read_text())
    assert untrained["encoder"]["fingerprint"] != records[0]["encoder"]["fingerprint"]
    assert untrained["data"] == records[0]["data"]


def test_a_named_model_leaves_its_results_under_runs(colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run=resnet18", "weights=random", "data=folder", f"data.root={colours}", "k=[5]"]
    main(["knn", *words, "data.image_size=16"])
    (row, *_) = csv.DictReader((tmp_path / "runs" / "resnet18" / "results.csv").open(newline=""))
    assert (row["protocol"], row["variant"], row["weights"]) == ("knn", "chosen", "random")
    assert float(row["top1"]) == 100


def test_a_sweep_measures_several_runs(run, tmp_path):
    words = [f"run={run}", "k=[5]", "data.limit=100,200"]
    printed = samix_here("knn", "-m", *words, cwd=tmp_path)
    assert len(re.findall(r"chosen +top-1", printed)) == 2
    results = [line for line in printed.splitlines() if line.startswith(str(run))]
    records = [json.loads((Path(folder) / "results.json").read_text()) for folder in results]
    assert [r["data"]["train_images"] for r in records] == [100, 200]


def test_the_pictures_show_what_was_asked_for(encoder, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured("knn", encoder, colours, "show=[0,29]", out=tmp_path / "out")
    with Image.open(tmp_path / "out" / "neighbours.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    # test images are sorted by class: blue first, red last; so are all of their neighbours
    third = len(pixels) // 3
    parts = pixels[:third], pixels[-third:]
    strong = [part[(part.max(-1) - part.min(-1)) > 100] for part in parts]
    assert [s.mean(axis=0).argmax() for s in strong] == [2, 0]
    assert all(
        (s.argmax(axis=-1) == channel).all() for s, channel in zip(strong, (2, 0), strict=True)
    )
    rows = list(csv.reader((tmp_path / "out" / "confusion.csv").open(newline="")))
    assert rows[0] == ["true class", "blue", "green", "red"]
    assert [row[1:] for row in rows[1:]] == [["10", "0", "0"], ["0", "10", "0"], ["0", "0", "10"]]


@pytest.mark.parametrize("protocol", sorted(QUICK))
def test_unlabelled_images_are_refused(protocol, encoder, tmp_path, fails):
    paint(tmp_path / "photos", 12, (9, 9, 9), torch.Generator().manual_seed(0))
    words = [f"run={encoder}", "data=folder", f"data.root={tmp_path / 'photos'}"]
    assert "needs labelled images" in fails(*QUICK[protocol], *words, f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_diverged(colours, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = Backbone("resnet18", image_size=SIZE, width=4)
    with torch.no_grad():
        backbone.trunk.conv1.weight.fill_(float("nan"))
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, backbone, {**META, "backbone": backbone.settings})
    words = [f"run={path}", "data=folder", f"data.root={colours}", f"out={tmp_path}/out"]
    for quick in QUICK.values():
        assert "the encoder has diverged" in fails(*quick, *words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["knn", "k=[91]"], "k=91 needs more than 91 training images, got 90"),
        (["knn", "k=[0]"], "k must be a number at least 1"),
        (["knn", "k=[]"], "k needs at least one value"),
        (["knn", "temperature=[0]"], "temperature must be"),
        (["knn", "k=[5]", "show=[30]"], "show must be a number in [0, 29]"),
        (["knn", "k=[5]", "show=first"], "show needs a list of whole numbers"),
        (["knn", "chunk=0"], "chunk must be"),
        (["knn", "device=cdua"], "device=cdua is not there"),
        (["knn", "preset=moco"], "knn takes no preset"),
        (["knn", "data.limitt=3"], "did you mean 'data.limit'"),
        (["linear", "protocol=cache"], "did you mean 'cached'"),
        (["linear", "protocol=augmented"], "give preset=moco or another"),
        (["linear", "preset=moco"], "give that too"),
        (["linear", "protocol=augmented", "preset=mocov4"], "did you mean 'mocov3'"),
        (["linear", "protocol=augmented", "preset=moco", "preset.lr=[0]"], "lr must be"),
        (["linear", "held_out=0.6"], "held_out must be"),
        (["linear", "weights=pretrained"], "run names a file"),
        (["semi", "percent=0"], "percent must be"),
        (["semi", "percent=1"], "none for"),
        (["semi", "per_class=31"], "class blue has 30 training images, per_class=31"),
        (["semi", "per_class=3", "split=a.txt"], "give one"),
        (["semi", "split=a.txt"], "cannot read split=a.txt"),
        (["semi", "finetune=openmixup"], "did you mean 'openmixup_1'"),
        (["semi", "finetune.head_factor=[]"], "need at least one value"),
        (["knn", "k=[5]", "out=/dev/null/x"], "cannot make /dev/null/x"),
        (["knn", "k=[5]", "out=taken"], "out=taken holds results already"),
    ],
)
def test_bad_input(words, sentence, encoder, colours, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "results.json").write_text("{}")
    words = [*words, f"run={encoder}", "data=folder", f"data.root={colours}"]
    assert sentence in fails(*words)
    assert not (tmp_path / "runs").exists()


def test_a_learning_rate_at_the_edge_of_those_tried_is_told(
    encoder, colours, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    words = [*AUGMENTED, "preset.lr=[1e-9,1e-8,30.0]"]
    record = measured("linear", encoder, colours, *words, out=tmp_path / "out")
    assert record["results"][0]["settings"]["lr"] == 30.0
    assert "lr=30 won and is the highest tried: widen preset.lr" in caplog.text


def test_one_label_per_class_takes_the_middle_of_the_grid(encoder, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["per_class=1", "baselines=false", "finetune.backbone_lr=[0.1,0.01,0.001]"]
    record = measured("semi", encoder, colours, *words, out=tmp_path / "out")
    (result,) = record["results"]
    assert result["settings"]["backbone_lr"] == 0.01
    assert record["details"]["labels"] == 3


def test_classes_that_differ(encoder, tmp_path, fails):
    generator = torch.Generator().manual_seed(0)
    for part, names in (("train", "ab"), ("test", "ac")):
        for name in names:
            paint(tmp_path / "set" / part / name, 3, (9, 9, 9), generator)
    told = fails("linear", f"run={encoder}", "data=folder", f"data.root={tmp_path / 'set'}")
    assert "different classes (only in train: b; only in test: c)" in told


def test_the_protocols_run_as_scripts(run, tmp_path):
    script = Path(__file__).resolve().parent.parent / "eval_protocols" / "knn.py"
    command = [sys.executable, str(script), f"run={run}", "k=[5]", f"out={tmp_path}/out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("name", ["linear", "knn", "semi"])
def test_help(name, tmp_path):
    shown = samix_here(name, "--help", cwd=tmp_path)
    assert f"Usage: samix {name} run=<run folder>" in shown
    assert "weights: own" in shown
    assert "hydra:" not in shown
