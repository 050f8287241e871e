"""The benchmarks run, and print what they promise; how fast anything is, is not tested."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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


def step_times(*words):
    """Run step_time.py on something tiny; return its header and its table's rows as dicts."""
    tiny = ["--width", "8", "--size", "16", "--batch", "8", "--rounds", "1"]
    lines = benchmark("step_time.py", *tiny, *words).stdout.splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    head, rule, *rows = table
    assert set(rule) == {"---"}
    assert all(len(row) == len(head) == len(rule) for row in rows)
    header = "\n".join(line for line in lines if not line.startswith("|"))
    return header, [dict(zip(head, row, strict=True)) for row in rows]


def test_step_time_has_a_row_per_method():
    header, rows = step_times()
    for part in ("torch ", " on cpu (", "threads 1", "precision ", "batch 8"):
        assert part in header
    labels = [row["method"] for row in rows]
    assert labels == ["moco, bn_groups=1", "moco, bn_groups=4", "simclr", "byol"]
    for row in rows:
        for column in ("lightly ms", "ours ms", "lightly images/s", "ours images/s"):
            assert float(row[column]) > 0
        assert row["target"] == "2.2"
        assert float(row["measured"]) > 0
        assert row["met"] in ("yes", "no")
        assert 0 <= float(row["wait %"]) + float(row["views %"]) < 100
        assert row["lightly peak MiB"] == row["ours peak MiB"] == "n/a"  # on a CPU
    # The times that both rows are compared with are those of the same steps.
    assert rows[0]["lightly ms"] == rows[1]["lightly ms"]


def test_step_time_takes_a_precision_and_some_methods():
    header, rows = step_times("--methods", "byol", "--precision", "bf16-mixed", "--threads", "1")
    assert "precision bf16-mixed (lightly 32-true)" in header
    assert [row["method"] for row in rows] == ["byol"]


@pytest.mark.parametrize("words", [("--methods", "moco,dino"), ("--rounds", "0")])
def test_step_time_refuses_what_it_cannot_measure(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step_time.py", *words])
    with pytest.raises(
        SystemExit
    ) as caught:  # before anything is measured, so no process is needed
        runpy.run_path(str(BENCHMARKS / "step_time.py"), run_name="__main__")
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


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


def test_mixing_cost():
    sizes = ["--batch", "8", "--size", "16", "--width", "4", "--rounds", "1", "--methods", "byol"]
    lines = benchmark("mixing_cost.py", *sizes, "--no-memory").stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[1] for row in rows][:4] == ["none", "mixup", "mixup, replace", "samix as published"]
    assert rows[0][2:4] == ["1.00", "1.00"]
    assert all(float(row[2]) > 0 for row in rows)
    assert float(benchmark("mixing_cost.py", *sizes, "--memory-of", "byol", "samix").stdout) > 100


def test_eval_time():
    sizes = ["--train", "600", "--test", "300", "--dim", "256", "--classes", "3"]
    lines = benchmark("eval_time.py", *sizes).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[0].split(",")[0] for row in rows] == ["kNN", "heads", "L-BFGS"]
    assert all(50 < float(row[3]) <= 100 for row in rows)
