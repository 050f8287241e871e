"""``samix embed``: every row is the features of the image that stands beside it."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys

import faiss
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

import ssl_samix
from ssl_samix.cli.main import main
from ssl_samix.config.compose import quote_paths
from ssl_samix.errors import DataError
from ssl_samix.evaluation import embedding as cosine
from ssl_samix.evaluation.embed import embed, parse_embed, read_names
from tests.conftest import samix_here

TINY = {
    "data.limit": 64,
    "data.batch_size": 32,
    "backbone.width": 8,
    "method.queue_size": 64,
    "trainer.max_epochs": 1,
    "trainer.accelerator": "cpu",
    "callbacks.knn.val_limit": 20,
}


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    return trained("moco none", tmp_path_factory.mktemp("trained") / "a run, (1)=x")


@pytest.fixture
def photos(tmp_path):
    """Twelve images in nested folders, one of them a copy; in colours, so that they differ."""
    folder = tmp_path / "jörg's photos, 50%"
    generator = np.random.default_rng(0)
    for i in range(11):
        small = generator.integers(256, size=(4, 3, 3), dtype=np.uint8)
        # Large enough that a JPEG could be decoded at an eighth of its size.
        image = Image.fromarray(small).resize((330, 440), Image.Resampling.BICUBIC)
        path = folder / ("deep/er" if i % 2 else "") / f"{i:02}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    shutil.copy(folder / "00.png", folder / "deep" / "copy.png")
    return folder


@pytest.fixture
def embedded(monkeypatch, capsys):
    """Run the command in this process and return features, paths and the folder."""

    def run_it(*words):
        monkeypatch.setattr(sys, "argv", ["samix", "embed", *map(str, words)])
        main()
        out = capsys.readouterr().out.splitlines()[-1]
        return np.load(f"{out}/features.npy"), paths(out), out

    return run_it


def paths(out):
    with open(f"{out}/paths.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows] == list(range(len(rows)))
    return [row["path"] for row in rows]


def prepared(run, files):
    encoder = ssl_samix.load_encoder(run)
    with torch.no_grad():
        return torch.stack([encoder(encoder.prepare(Image.open(f))[None])[0] for f in files])


def test_rows_are_what_the_encoder_gives_for_the_paths_beside_them(run, photos, embedded, tmp_path):
    before = hashlib.sha256((run / "encoder.safetensors").read_bytes()).digest()
    features, files, out = embedded(
        f"run={run}", f"images={photos}", f"out={tmp_path}/o", "chunk=5"
    )
    assert features.dtype == np.float32
    assert features.shape == (12, ssl_samix.load_encoder(run).feature_dim)
    torch.testing.assert_close(
        torch.from_numpy(features), prepared(run, files), rtol=1e-5, atol=1e-5
    )
    expected = [*sorted(photos.glob("*.*")), photos / "deep" / "copy.png",
                *sorted(photos.glob("deep/er/*"))]  # fmt: skip
    assert files == list(map(str, expected)), "a folder's own images first, sorted"
    assert hashlib.sha256((run / "encoder.safetensors").read_bytes()).digest() == before
    names = {p.name for p in (tmp_path / "o").iterdir()}
    assert names == {"features.npy", "paths.csv", "neighbours.png"}
    assert Image.open(f"{out}/neighbours.png").size[1] == 12 + 18 + 8 * 132 - 4 + 12


def test_damaged_images_have_no_row_and_are_named(run, photos, embedded, tmp_path, caplog):
    for name in ("01.png", "deep/er/a.jpg", "zz.png"):
        (photos / name).write_text("no picture")
    cut = (photos / "02.jpg").read_bytes()
    (photos / "02.jpg").write_bytes(cut[: len(cut) // 2])
    words = [f"run={run}", f"images={photos}", "chunk=2", "workers=1"]
    features, files, out = embedded(*words, f"out={tmp_path}/o")
    assert len(features) == len(files) == 11
    torch.testing.assert_close(
        torch.from_numpy(features), prepared(run, files), rtol=1e-5, atol=1e-5
    )
    damaged = [str(photos / n) for n in ("01.png", "02.jpg", "zz.png", "deep/er/a.jpg")]
    assert not set(damaged) & set(files)
    assert caplog.messages == [
        f"4 of 15 images cannot be read and have no row: {', '.join(damaged)}"
    ]
    with open(f"{out}/damaged.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == damaged


def test_many_damaged_images_leave_an_array_of_the_right_size(run, photos, embedded, tmp_path):
    """From 1,007 pictures to 12 rows the number has fewer digits in the header."""
    for i in range(995):
        (photos / f"x{i}.png").touch()
    features, files, _ = embedded(f"run={run}", f"images={photos}", f"out={tmp_path}/o", "sheet=0")
    assert len(features) == len(files) == 12
    torch.testing.assert_close(
        torch.from_numpy(features), prepared(run, files), rtol=1e-5, atol=1e-5
    )


def test_a_copy_is_the_nearest_neighbour(run, photos, embedded, tmp_path):
    words = [f"run={run}", f"images={photos}", f"out={tmp_path}/o", "index=true"]
    features, files, out = embedded(*words)
    first, copy = (files.index(str(photos / n)) for n in ("00.png", "deep/copy.png"))
    index = faiss.read_index(f"{out}/index.faiss")
    assert index.ntotal == 12
    asked = features[[first]] / np.linalg.norm(features[first])
    near, rows = index.search(asked, 12)
    assert set(rows[0, :2]) == {first, copy}
    assert near[0, :2] == pytest.approx([1, 1], abs=1e-5)
    assert near[0, 2] < 1 - 1e-5
    length = np.linalg.norm(features, axis=1)
    expected = features @ features[first] / length / length[first]
    assert near[0] == pytest.approx(expected[rows[0]], abs=1e-5), "cosines of all rows"
    near, rows = cosine.nearest_rows(features, [copy, first], 1)
    assert rows[:, 0].tolist() == [first, copy]


def test_neighbours_are_exact_over_blocks(monkeypatch):
    monkeypatch.setattr(cosine, "BLOCK", 7)
    features = torch.randn(50, 6).numpy()
    features[33] = 2 * features[4]
    near, rows = cosine.nearest_rows(features, [4, 49, 0], 9)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for i, row in enumerate((4, 49, 0)):
        assert row not in rows[i]
        assert len(set(rows[i].tolist())) == 9
        cosines = unit @ unit[row]
        assert near[i] == pytest.approx(cosines[rows[i]], abs=1e-5)
        assert near[i] == pytest.approx(np.sort(np.delete(cosines, row))[:-10:-1], abs=1e-5)
    assert rows[0, 0] == 33
    copies = np.ones((20, 3), dtype=np.float32)
    _, rows = cosine.nearest_rows(copies, [19, 3], 5)
    assert 19 not in rows[0]
    assert 3 not in rows[1]
    assert rows.shape == (2, 5)


def test_without_a_folder_it_is_the_runs_own_images(run, embedded, monkeypatch):
    monkeypatch.chdir(run.parent)
    features, names, out = embedded(f"run={run.name}", "sheet=2")
    assert out.startswith(f"{run.name}/embeddings-")
    assert len(features) == 64
    assert len(set(names)) == 64
    assert all(name.startswith("digits ") for name in names)
    digit = load_digits().images[int(names[5].split()[-1])]
    image = Image.fromarray((digit * 255 / 16).round().astype(np.uint8))
    own = ssl_samix.load_encoder(run)
    with torch.no_grad():
        expected = own(own.prepare(image)[None])[0]
    assert torch.cosine_similarity(expected, torch.from_numpy(features[5]), dim=0) > 0.999
    monkeypatch.setattr("time.strftime", lambda *given: out.partition("embeddings-")[2])
    _, _, again = embedded(f"run={run.name}", "sheet=0")  # in the same second
    assert again == f"{out}-2"
    for folder in (out, again):
        shutil.rmtree(folder)


def test_a_runs_own_folder_has_rows_for_what_can_be_read(photos, embedded, tmp_path):
    settings = {**TINY, "data.root": str(photos), "data.batch_size": 4, "data.image_size": 32}
    settings |= {"method.queue_size": 8, "data.workers": 0}
    own = ssl_samix.pretrain("folder", "moco", tmp_path / "run", mixup="none", **settings).out
    features, files, _ = embedded(f"run={own}", "sheet=0", "chunk=4", "workers=0")
    assert len(features) == 12
    torch.testing.assert_close(
        torch.from_numpy(features), prepared(own, files), rtol=1e-5, atol=1e-5
    )
    shutil.rmtree(photos)
    with pytest.raises(DataError, match=r"are not in .* any more: give images=<folder>"):
        parse_embed([f"run='{own}'"])


def test_models_and_random_weights(photos, embedded, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"images={photos}", "weights=random", "sheet=0"]
    first, _, out = embedded("run=resnet18", *words, "image_size=32")
    assert first.shape == (12, 512)
    assert out.startswith("runs/resnet18/embeddings-")
    random, _, _ = embedded(f"run={run}", *words, "out=a", "seed=1")
    same, _, _ = embedded(f"run={run}", *words, "out=b", "seed=1")
    other, _, _ = embedded(f"run={run}", *words, "out=c", "seed=2")
    assert np.array_equal(random, same)
    assert not np.allclose(random, other)


def test_a_folder_of_splits_says_which_images_it_takes(photos, embedded, run, tmp_path, caplog):
    (photos / "deep").rename(tmp_path / "moved")
    data = tmp_path / "data"
    data.mkdir()
    photos.rename(data / "train")
    (tmp_path / "moved").rename(data / "val")
    _, files, _ = embedded(f"run={run}", f"images={data}", f"out={tmp_path}/o", "sheet=0")
    assert {f.split("/data/")[1].split("/")[0] for f in files} == {"train"}
    assert caplog.messages == [
        "the images are those in train/, left out beside train/: val/ (6 images)"
    ]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system has no such names")
def test_names_that_are_no_text(photos, embedded, run, tmp_path):
    strange = b"\xff,\"'\n.png"
    target = os.path.join(os.fsencode(photos), strange)
    shutil.copy(photos / "00.png", target)
    words = [f"run={run}", f"images={photos}", f"out={tmp_path}/o"]
    out = embed(parse_embed(quote_paths(words)))
    names = read_names(out)
    assert os.fsdecode(target) in names["path"].tolist()
    assert os.fsdecode(strange) in names["id"].tolist()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "embed needs an encoder: run=<run folder"),
        (["run=nowhere"], "run=nowhere does not exist"),
        (["run={run}", "image=x"], "unknown key 'image': did you mean 'images'"),
        (["run={run}", "images=nowhere"], "images=nowhere is not a folder"),
        (["run={run}", "images=empty"], "no image found under images="),
        (["run={run}", "images=damaged"], "none of 2 images can be read: repair"),
        (["run={run}", "images=one", "out=full"], "out=full holds features already"),
        (["run={run}", "images=one", "out=one/0.png"], "out=one/0.png is a file"),
        (["run={run}", "images=one", "out=/dev/null/a"], "cannot make /dev/null/a"),
        (["run={run}", "images=one", "sheet=100"], "sheet must be a number in [0, 64]"),
        (["run={run}", "images=one", "chunk=0"], "chunk must be a number at least 1"),
        (["run={run}", "images=one", "limit=0"], "limit must be a number at least 1"),
        (["run={run}", "images=one", "table=xls"], "unknown table 'xls': choose from csv, parquet"),
        (["run={run}", "images=one", "workers=-1"], "workers must be a number at least 0"),
        (["run={run}", "images=one", "index=yes please"], "index needs true or false"),
        (["run={run}", "images=one", "device=tpu"], "device=tpu is not there"),
        (["run={run}", "images=one", "weights=good"], "unknown weights 'good'"),
        (["run=resnet18", "weights=random"], "run=resnet18 names no images: give images=<folder>"),
        (["run={run}", "images=one", "-m"], "takes no --multirun"),
    ],
)
def test_mistakes(words, sentence, run, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in {"empty": 0, "one": 1, "damaged": 0, "full": 0}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 20)).save(tmp_path / name / f"{i}.png")
    for name in ("a.png", "b.jpg"):
        (tmp_path / "damaged" / name).write_text("no picture")
    (tmp_path / "full" / "features.npy").touch()
    held = {p for folder in (tmp_path, run) for p in folder.rglob("*")}
    assert sentence in fails("embed", *(word.format(run=run) for word in words))
    assert {p for folder in (tmp_path, run) for p in folder.rglob("*")} == held


def test_ids_are_paths_relative_to_the_images_and_stay_when_the_folder_moves(
    run, photos, embedded, tmp_path
):
    words = [f"run={run}", "sheet=0", "device=cpu"]
    _, files, _ = embedded(*words, f"images={photos}", f"out={tmp_path}/a")
    first = read_names(tmp_path / "a")
    assert [*first] == ["row", "path", "id"]
    assert [str(photos / name) for name in first["id"]] == files
    moved = photos.rename(tmp_path / "NA")
    (moved / "00.png").rename(moved / "007")  # no image any more
    (moved / "deep" / "copy.png").rename(moved / "NA.png")
    embedded(*words, f"images={moved}/", f"out={tmp_path}/b")
    joined = first.merge(read_names(tmp_path / "b"), on="id")
    assert len(joined) == 10
    _, files, _ = embedded(*words, f"images={moved}", f"out={tmp_path}/c", "limit=4")
    assert len(files) == 4


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_scikit_learn_reads_the_table(run, embedded, tmp_path, kind):
    words = [f"run={run}", "sheet=0", "device=cpu", f"out={tmp_path}/o"]
    features, names, out = embedded(*words, "normalise=true", f"table={kind}")
    table = {"csv": pandas.read_csv, "parquet": pandas.read_parquet}[kind](f"{out}/features.{kind}")
    assert [*table][:5] == ["row", "path", "id", "label", "f0"]
    assert table["path"].tolist() == table["id"].tolist() == names
    columns = table.filter(regex=r"^f\d+$")
    assert columns.to_numpy() == pytest.approx(features, abs=1e-6)
    assert np.linalg.norm(features, axis=1) == pytest.approx(1, abs=1e-5)
    digits = load_digits().target[[int(name.split()[-1]) for name in names]]
    assert table["label"].astype(int).tolist() == digits.tolist()
    probe = LogisticRegression(C=100, max_iter=1000).fit(columns, table["label"])
    assert probe.score(columns, table["label"]) > 0.9
    assert PCA(2).fit_transform(features).shape == (64, 2)


def test_tables_of_several_blocks_and_names_that_are_no_text(monkeypatch, tmp_path):
    monkeypatch.setattr(cosine, "BLOCK", 3)
    names = pandas.DataFrame({"row": range(8), "id": ['\udcff,"\n', "b", *"cdefgh"]}, dtype=object)
    features = np.arange(16, dtype=np.float32).reshape(8, 2)
    for kind in ("csv", "parquet"):
        cosine.write_table(tmp_path / f"t.{kind}", names, features)
    table = pandas.read_csv(
        tmp_path / "t.csv", encoding_errors="surrogateescape", dtype={"id": object}
    )
    assert table["id"].tolist() == names["id"].tolist()
    assert table[["f0", "f1"]].to_numpy().tolist() == features.tolist()
    table = pandas.read_parquet(tmp_path / "t.parquet")
    assert table["id"].tolist() == ['\\xff,"\n', *names["id"][1:]]
    assert table[["f0", "f1"]].to_numpy().tolist() == features.tolist()


def test_parquet_without_its_package(run, fails, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "ssl_samix.evaluation.embed.find_spec", lambda n: None if n == "pyarrow" else there(n)
    )
    sentence = "table=parquet needs pyarrow: pip install 'ssl_samix[parquet]'"
    assert sentence in fails("embed", f"run={run}", "table=parquet")


def test_one_image_has_no_neighbours(run, embedded, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "one" / "0.png")
    features, _, _ = embedded(f"run={run}", f"images={tmp_path}/one", f"out={tmp_path}/o")
    assert len(features) == 1
    assert not (tmp_path / "o" / "neighbours.png").exists()


def test_help_shows_its_keys(tmp_path):
    shown = samix_here("embed", "--help", cwd=tmp_path)
    assert "sheet: 8" in shown
    assert "hydra:" not in shown


def test_a_mistake_is_told_before_heavy_imports(run, tmp_path):
    code = (
        "import sys\nfrom ssl_samix.evaluation.embed import parse_embed\n"
        f"try:\n    parse_embed([\"run='{run}'\", 'images=nowhere'])\n"
        "except ValueError as error:\n    print('torch' in sys.modules, error)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert shown.stdout.startswith("False images=nowhere is not a folder")
