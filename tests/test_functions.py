"""The subcommands as Python functions."""

import json

import numpy as np
import pytest
from PIL import Image

import ssl_samix
from ssl_samix.training.logging import Run


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Run(trained("moco none", tmp_path / "run"), {})


def test_a_protocol_returns_its_table_and_its_folder(run, capsys):
    measured = ssl_samix.knn(run, k=[5, 10], temperature=[0.1])
    record = json.loads((measured.folder / "results.json").read_text())
    assert measured.table["variant"].tolist() == ["chosen", "k5-T0.1", "k10-T0.1"]
    assert measured.top1 == record["results"][0]["numbers"]["top1"]
    assert np.sum(measured.details["confusion"]) == record["data"]["test_images"]
    assert "<table" in measured._repr_html_()
    capsys.readouterr()
    untrained = ssl_samix.knn(str(run.out), weights="random", k=[5], temperature=[0.1])
    table = ssl_samix.compare(run, run.out)  # one run, given twice
    assert table["encoder"].tolist() == ["trained", "untrained"]
    assert [float(x) for x in table.filter(like="top-1").iloc[:, 0]] == pytest.approx(
        [measured.top1, untrained.top1], abs=0.05
    )


def test_features_of_a_folder_are_an_array_with_a_row_per_image(run, tmp_path):
    (tmp_path / "photos").mkdir()
    for shade in (0, 120, 250):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / "photos" / f"{shade}.png")
    found = ssl_samix.embed(run, "photos", sheet=0, device="cpu")
    assert found.features.shape == (3, run.encoder.feature_dim)
    assert len(found.paths) == 3
    assert found.folder.parent == run.out


def test_an_export_returns_its_file(run):
    assert ssl_samix.export(run, "torch_export").suffix == ".pt2"


def test_mistakes_have_the_message_of_the_command_line(run):
    with pytest.raises(ssl_samix.UserError, match="did you mean 'temperature'"):
        ssl_samix.knn(run, temprature=[0.1])
    with pytest.raises(ssl_samix.UserError, match="photo"):
        ssl_samix.embed(run, "photo")
