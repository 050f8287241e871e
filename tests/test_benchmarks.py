"""The benchmarks run, and print what they promise; how fast anything is, is not tested."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def benchmark(name, *words):
    return subprocess.run(
        [sys.executable, BENCHMARKS / name, *words],
        cwd=BENCHMARKS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )


TINY = ["--width", "4", "--size", "16", "--batch", "8", "--rounds", "1"]


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run a benchmark in this process, which saves it its imports; return its header and tables."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()

    def run(name, *words):
        importlib.import_module(name).main([str(word) for word in words])
        return read(capsys.readouterr().out)

    yield run
    torch.set_num_threads(threads)


def read(text):
    """Split what a benchmark prints into its header and its tables, rows as dicts."""
    header, *parts = text.split("\n\n")
    header += "\n" + parts[0]
    tables = []
    for part in parts[1:]:
        cells = [line[2:-2].split(" | ") for line in part.strip().splitlines()]
        assert all(len(row) == len(cells[0]) for row in cells), part
        assert set(cells[1]) == {"---"}
        tables.append([dict(zip(cells[0], row, strict=True)) for row in cells[2:]])
    return header, tables


def check_goals(rows):
    for row in rows:
        assert list(row) == ["what", "target", "measured", "met"]
        assert row["met"] in ("yes", "no")


def test_step_time(bench):
    policies = "none,mixup-replace,samix,samix-paper"
    words = ["--methods", "moco,byol", "--policies", policies, "--precision", "auto,32-true"]
    header, (rows, goals) = bench("step_time", *TINY, *words)
    for part in ("torch ", " on cpu (", "threads 1", "precision 32-true", "batch 8", "width 4"):
        assert part in header
    sides = ["lightly as shipped", *policies.split(",")]
    assert [(row["method"], row["side"]) for row in rows] == [
        (method, side) for method in ("moco", "byol") for side in sides
    ]
    for row in rows:
        assert min(float(row["ms"]), float(row["images/s"])) > 0
        if row["side"] != "lightly as shipped":
            # Small Mixers and short passes: what the model leaves out shows, but not by much.
            counted, model = float(row["FLOPs / plain"]), float(row["passes / plain"])
            assert abs(counted / model - 1) < 0.12, row
    assert [row["what"].split()[0] for row in goals] == ["MoCo"] * 3 + ["BYOL"] * 3
    check_goals(goals)


def test_step_time_without_lightly_and_memory_of_a_process(bench, capsys):
    words = ["--methods", "simclr", "--policies", "none", "--no-lightly"]
    _, (rows,) = bench("step_time", *TINY, *words, "--set", "optimizer.lr=0.1")
    assert [row["side"] for row in rows] == ["none"]
    importlib.import_module("step_time").main(
        [*TINY, "--memory-of", "simclr", "samix", "32-true"]  # what its own process prints
    )
    assert float(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    "words", [("--methods", "moco,dino"), ("--rounds", "0"), ("--batch", "4"), ("--policies", "x")]
)
def test_step_time_refuses_what_it_cannot_measure(words, bench, capsys):
    with pytest.raises(SystemExit) as caught:
        bench("step_time", *words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_the_flop_model_says_what_the_design_says(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    model = importlib.import_module("flop_model")
    expected = {"samix": (1.88, 1.58, 1.44), "samix-paper": (2.42, 2.07, 1.62)}
    for policy, ratios in expected.items():
        for method, ratio in zip(("moco", "simclr", "byol"), ratios, strict=True):
            assert model.ratio(method, policy) == pytest.approx(ratio, abs=0.01)


def test_knn_baselines():
    words = [
        "data.limit=64",
        "backbone.width=8",
        "data.batch_size=32",
        "callbacks.knn.val_limit=50",
    ]
    lines = benchmark("knn_baselines.py", *words).stdout.splitlines()
    rows = {line[:20].strip(): [float(cell) for cell in line[20:].split()] for line in lines[1:]}
    assert list(rows) == ["raw pixels", "untrained encoder"]
    for top1, _, rank in rows.values():
        assert 0 <= top1 <= 100
        assert rank >= 1


def test_views():
    lines = benchmark("views.py", "--batch", "8", "--rounds", "1").stdout.splitlines()
    rows = [line.split() for line in lines[2:]]
    assert [row[:2] for row in rows] == [
        [method, size] for method in ("moco", "simclr", "byol") for size in ("32", "64", "96")
    ]
    assert all(float(cell.rstrip("x")) > 0 for row in rows for cell in row[2:])


def test_eval_time():
    sizes = ["--train", "600", "--test", "300", "--dim", "256", "--classes", "3"]
    lines = benchmark("eval_time.py", *sizes).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[0].split(",")[0] for row in rows] == ["kNN", "heads", "L-BFGS"]
    assert all(50 < float(row[3]) <= 100 for row in rows)
