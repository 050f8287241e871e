"""Trackers: what each of them keeps of a run, offline, and what is said if one is missing."""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.util
import sqlite3

import pytest

import ssl_samix
from ssl_samix.artifacts.run_folder import RunFolder, read_metrics
from ssl_samix.config.compose import compose
from ssl_samix.errors import ConfigError
from ssl_samix.reporting.compare import differing, read_configuration

TINY = {
    "data.limit": 64,
    "data.batch_size": 32,
    "backbone.name": "resnet10",
    "backbone.width": 4,
    "trainer.max_epochs": 1,
    "trainer.accelerator": "cpu",
    "callbacks.knn.val_limit": 20,
}


def train(folder, **settings):
    return ssl_samix.pretrain("digits", out=folder, **{**TINY, **settings})


def numbers(path):
    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_mlflow_keeps_numbers_settings_and_pictures_of_all_starts(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = train(tmp_path / "run", logger="mlflow")
    again = train(tmp_path / "run", logger="mlflow", trainer={"max_epochs": 2})
    assert "tracker   MLflow, sqlite:///" in capsys.readouterr().out
    with sqlite3.connect(run.out / "mlflow" / "mlflow.db") as database:
        ids = database.execute("select run_uuid, status from runs").fetchall()
        losses = database.execute(
            "select step, value from metrics where key = 'loss' order by step"
        ).fetchall()
        settings = dict(database.execute("select key, value from params"))
    assert [status for _, status in ids] == ["FINISHED"]
    rows = read_metrics(again.out / "metrics.csv")
    assert [value for _, value in losses] == pytest.approx([float(row["loss"]) for row in rows])
    assert settings["data.limit"] == "64"
    kept = run.out / "mlflow" / "artifacts" / ids[0][0] / "artifacts"
    pictures = sorted((kept / "mixing").iterdir())
    assert pictures[0].read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in pictures] == ["step-000002.png", "step-000004.png"]


def test_wandb_keeps_files_on_this_machine_unless_it_is_asked(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = train(tmp_path / "run", logger="wandb", **{"logger.wandb.project": "digits"})
    first = capsys.readouterr().out
    assert "tracker   W&B, on this machine; wandb sync" in first
    assert wandb.run is None, "closed, so that the next run is not written into it"
    train(tmp_path / "run", logger="wandb", trainer={"max_epochs": 2})
    starts = sorted((run.out / "wandb").glob("offline-run-*"))
    assert len(starts) == 2
    assert len({path.name.rpartition("-")[2] for path in starts}) == 1, "one run, started twice"
    assert all(list(path.glob("files/media/images/mixing*.png")) for path in starts)
    with pytest.raises(ConfigError, match=r"unknown logger\.wandb\.mode 'onlin': did you mean"):
        train(tmp_path / "other", logger="wandb", **{"logger.wandb.mode": "onlin"})


def test_several_trackers_and_none(tmp_path):
    several = train(tmp_path / "several", logger=["csv", "tensorboard"])
    assert list((several.out / "tensorboard").glob("events*"))
    (kept,) = numbers(several.out / "csv" / "version_0" / "metrics.csv")[-1:]
    (row,) = numbers(several.out / "metrics.csv")
    assert kept["loss"] == pytest.approx(row["loss"])
    _, choices = RunFolder(several.out).load_config()
    assert choices["logger"] == "[csv,tensorboard]"
    none = train(tmp_path / "none", logger="none")
    assert {p.name for p in none.out.iterdir() if p.is_dir()} <= {"mixing", "views"}
    assert numbers(none.out / "metrics.csv")[0]["loss"] == row["loss"]
    again = ssl_samix.pretrain(resume=several.out, trainer={"max_epochs": 2})
    assert len(numbers(again.out / "metrics.csv")) == 2
    assert differing([read_configuration(RunFolder(r.out)) for r in (several, none)]) == [
        "trainer.max_epochs"
    ]


def test_a_name_of_a_tracker_that_is_not_known():
    with pytest.raises(ConfigError, match="unknown logger 'wandbb': did you mean 'wandb'"):
        compose("pretrain", ["logger=[csv,wandbb]"])
    with pytest.raises(ConfigError, match="unknown method"):
        compose("pretrain", ["method=[moco,simclr]"])
    config, choices = compose("supervised", ["logger=[mlflow,csv]", "logger.mlflow.run_name=a"])
    assert choices["logger"] == "[mlflow,csv]"
    assert (sorted(config.logger), config.logger.mlflow.run_name) == (["csv", "mlflow"], "a")


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow"), ("wandb", "wandb")])
@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_package_is_told_before_anything_starts(
    name, package, folder, fails, monkeypatch, tmp_path
):
    """Also if a folder of its name lies here, as W&B's own does."""
    found = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec(package, None) if folder else None
    monkeypatch.setattr(
        "ssl_samix.config.extras.find_spec", lambda n: spec if n == package else found(n)
    )
    sentence = fails("pretrain", f"logger=[tensorboard,{name}]", f"out={tmp_path / 'run'}")
    assert f"logger={name} needs {package}: pip install 'ssl_samix[{name}]'" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "nowhere://a"])
def test_a_tracker_that_does_not_answer(address, fails, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    words = [f"{key}={value}" for key, value in TINY.items()]
    words += ["logger=mlflow", f"logger.mlflow.tracking_uri='{address}'"]
    assert "logger=mlflow cannot start a run: " in fails("pretrain", *words, f"out={tmp_path}/run")
