"""``samix outliers``: what is alone, and what is there twice."""

from __future__ import annotations

import csv

import numpy as np
import pandas
import pytest
from PIL import Image

import ssl_samix
from ssl_samix.errors import DataError
from ssl_samix.evaluation import embedding
from ssl_samix.evaluation.outliers import ranked
from tests.conftest import samix_here


def names(count):
    return pandas.DataFrame({"row": range(count), "id": [f"{i}.png" for i in range(count)]})


@pytest.mark.parametrize("cosines", [2**25, 100])
def test_the_lonely_one_is_first_and_so_are_the_copies(monkeypatch, cosines):
    monkeypatch.setattr(embedding, "MOST_COSINES", cosines)
    generator = np.random.default_rng(0)
    features = generator.normal([5, 0, 0, 0], 0.3, size=(40, 4)).astype(np.float32)
    features[7] = [0, 0, -3, 0]
    features[30] = 3 * features[12]
    isolated, alike = ranked(features, names(40), neighbours=5)
    assert isolated["row"].tolist()[0] == 7
    assert len(isolated) == 40
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = 1 - np.sort(unit @ unit.T - 3 * np.eye(40), axis=1)[:, -5:].mean(axis=1)
    assert isolated.sort_values("row")["distance"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert (alike["id"][0], alike["other_id"][0]) == ("12.png", "30.png")
    assert alike["cosine"][0] == pytest.approx(1, abs=1e-6)
    assert alike["cosine"].is_monotonic_decreasing
    assert not alike.duplicated(["row", "other_row"]).any()
    assert {*alike["row"], *alike["other_row"]} == {*range(40)}, "each with its nearest neighbour"


def test_two_images_are_a_pair_and_one_is_an_error():
    isolated, alike = ranked(np.eye(2, dtype=np.float32), names(2), neighbours=10)
    assert isolated["distance"].tolist() == [1, 1]
    assert alike[["cosine", "row", "other_row"]].to_numpy().tolist() == [[0, 0, 1]]
    with pytest.raises(DataError, match="only one image can be read"):
        ranked(np.eye(1, dtype=np.float32), names(1), neighbours=10)


def test_the_command_lists_both_and_python_returns_them(trained, tmp_path):
    run = trained("moco none", tmp_path / "run")
    photos = tmp_path / "photos"
    photos.mkdir()
    for shade in range(6):
        Image.new("RGB", (8, 8), (40 * shade, 10, 250 - 40 * shade)).save(photos / f"{shade}.png")
    (photos / "a\x1b[31m.png").write_bytes((photos / "3.png").read_bytes())
    words = ["run=run", "images=photos", "out=found", "shown=1", "device=cpu"]
    said = samix_here("outliers", *words, cwd=tmp_path).splitlines()
    assert said[2] == "most alike: cosine, ids"
    assert said[3] == r"1.0000  3.png  a\x1b[31m.png"
    assert said[4:] == ["found"]
    with (tmp_path / "found" / "outliers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["distance", "row", "path", "id"]
    assert said[1] == f"{float(rows[0]['distance']):.4f}  {rows[0]['id']}"
    own = ssl_samix.outliers(run, neighbours=3, device="cpu")
    assert own.folder.parent == run
    assert len(own.isolated) == 64
    assert {*own.alike} >= {"cosine", "label", "other_label"}


def test_mistakes(trained, tmp_path, fails):
    run = trained("moco none", tmp_path / "run")
    assert "outliers needs an encoder: run=<run folder" in fails("outliers")
    assert "neighbours must be a number at least 1" in fails(
        "outliers", f"run={run}", "neighbours=0"
    )
    assert "did you mean 'neighbours'" in fails("outliers", f"run={run}", "neighbors=5")
