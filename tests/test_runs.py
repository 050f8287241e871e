"""``samix runs``: hand-made run folders, and the table that they must give."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import compose
from ssl_samix.reporting.runs import listed, main, run_folders


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Make a run folder under runs that has done some epochs."""
    monkeypatch.chdir(tmp_path)

    def make(name, command, words, metric, values, finished=True):
        folder = RunFolder(tmp_path / "runs" / name)
        folder.path.mkdir(parents=True)
        folder.create(*compose(command, ["trainer.max_epochs=3", *words]))
        rows = [f"{epoch},{value}" for epoch, value in enumerate(values)]
        folder.metrics.write_text("\n".join([f"epoch,{metric}", *rows, ""]))
        if finished:
            folder.encoder.write_text("")

    return make


@pytest.fixture
def several(run, tmp_path):
    run("a", "pretrain", ["mixup=none"], "knn/top1", [50.0, 60.0, 70.0])
    run("b", "pretrain", ["method=byol"], "knn/top1", [50.0, "", 80.25])
    run("s/c", "pretrain", ["method=moco"], "knn/top1", [90.0, ""], finished=False)
    run("d", "pretrain", ["data=folder", "data.root=photos"], "rankme", [1.0, 2.0, 3.0])
    run("e", "supervised", ["mixup=cutmix"], "val/top1", [50.0, 60.0, 65.0])
    run("f", "pretrain", [], "knn/top1", [99.0])
    (tmp_path / "runs" / "f" / "config.yaml").write_text("- [")
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "config.yaml").write_text("a: 1")


def test_states_epochs_and_the_best(several):
    assert main([]).split("\n") == [
        "run       data    method      mixup    state       epochs      kNN top-1 %    top-1 %",
        "--------  ------  ----------  -------  ----------  --------  -------------  ---------",
        "runs/a    digits  simclr      none     finished    3/3               70.00          –",
        "runs/b    digits  byol        samix    finished    3/3               80.25          –",
        "runs/d    folder  simclr      samix    finished    3/3                   –          –",
        "runs/e    digits  supervised  cutmix   finished    3/3                   –      65.00",
        "runs/f    –       –           –        broken      –                     –          –",
        "runs/s/c  digits  moco        samix    unfinished  2/3             * 90.00          –",
        "",
        "*: the highest of runs on the same images",
        "runs/f/config.yaml is damaged or not the configuration of a run: it does not consist of "
        "keys and values",
    ]


def test_a_run_that_is_continued_is_unfinished(run):
    run("a", "pretrain", ["trainer.max_epochs=5"], "knn/top1", [1.0, 2.0, 3.0])
    assert "unfinished  3/5" in main(["runs/a"])


def test_columns_are_the_keys_that_are_asked_for(several, tmp_path):
    found = run_folders(tmp_path / "runs")[:2]
    table = listed([*found, tmp_path / "none"], ["trainer.max_epochs", "data.root"])
    rows = [line.split()[1:5] for line in table.splitlines()[2:5]]
    assert rows == [["3", "–", "finished", "3/3"]] * 2 + [["–", "–", "not", "started"]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "runs is not a folder: give folders of runs"),
        (["empty"], "no run folder is in empty"),
        (["--csv"], "runs takes folders only, not --csv"),
    ],
)
def test_mistakes(words, sentence, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert sentence in fails("runs", *words)


def test_it_needs_neither_torch_nor_pandas(several, tmp_path):
    code = (
        "import sys\nfrom ssl_samix.cli.main import main\nmain(['runs'])\n"
        "print([name for name in ('torch', 'pandas', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"
