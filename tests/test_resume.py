"""Interrupted runs, really interrupted: the resumed curve is the uninterrupted one."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.methods.base import BaseMethod
from tests.conftest import samix_here

WORDS = [
    "data.limit=160", "data.batch_size=32", "backbone.width=8", "trainer.max_epochs=12",
]  # fmt: skip
KNN = "callbacks.knn.every_n_epochs=4"
SAMIX = ["mixup=samix", "mixup.update_every=2"]
RUNS = {
    "moco": ["pretrain", "method=moco", "method.queue_size=64", KNN, *SAMIX],
    "byol": ["pretrain", "method=byol", KNN, "mixup=none"],
    "simclr": [
        "pretrain", "method=simclr", KNN, "mixup=samix_c", "mixup.clusters=10",
        "mixup.cluster_every=4",
    ],
    "supervised": ["supervised", "callbacks.accuracy.every_n_epochs=4", *SAMIX],
}  # fmt: skip
# Every way to end a run in one of them, the hardest in all.
WAYS = [(name, signal.SIGKILL) for name in sorted(RUNS)]
WAYS += [("moco", signal.SIGTERM), ("moco", signal.SIGINT)]
TIMING = {
    "seconds", "cpu_seconds", "images_per_second", "data_wait", "knn/seconds", "val/seconds"
}  # fmt: skip


def start(cwd, *words):
    command = [sys.executable, "-m", "ssl_samix", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell lets its background jobs ignore Ctrl-C, and so would everything that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def rows(run):
    if not (run / "metrics.csv").exists():
        return []
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in r.items() if k not in TIMING} for r in csv.DictReader(file)]


def interrupt_after(process, run, epochs, how):
    while len(rows(run)) < epochs or not (run / "last.ckpt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=100)
    return process.returncode, err


@pytest.mark.parametrize("name", ["nnclr", "swav", "dino"])
def test_queue_prototypes_and_centre_are_resumed(name, tmp_path, monkeypatch):
    """A run that breaks off in its third epoch ends with the weights of one that does not."""
    words = [
        f"method={name}", "mixup=samix", "data.limit=64", "data.batch_size=32", "backbone.width=4",
        "trainer.max_epochs=3", "method.hidden_dim=32", "method.output_dim=16",
        "callbacks.knn.every_n_epochs=3", "optimizer.lr=0.1",
    ]  # fmt: skip
    samix_here("pretrain", *words, "out=whole", cwd=tmp_path)
    step = BaseMethod.training_step

    def breaks(method, batch, number):
        if method.global_step == 5:
            raise RuntimeError("power cut")
        return step(method, batch, number)

    with monkeypatch.context() as patched:
        patched.setattr(BaseMethod, "training_step", breaks)
        with pytest.raises(RuntimeError, match="power cut"):
            samix_here("pretrain", *words, "out=cut", cwd=tmp_path)
    assert len(rows(tmp_path / "cut")) == 2
    samix_here("pretrain", "resume=cut", cwd=tmp_path)
    whole, cut = (
        torch.load(tmp_path / run / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "cut")
    )
    wanted = {"nnclr": "queue.keys", "swav": "prototypes.weight", "dino": "center.center"}
    assert wanted[name] in whole
    for key, value in whole.items():
        same(cut[key], value, key)


def same(ours, theirs, name):
    if isinstance(ours, dict):  # extra state: the clusters
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            same(value, theirs[key], f"{name}.{key}")
    else:
        assert torch.equal(ours, theirs), name


@pytest.fixture(scope="module")
def here():
    """Run the command in this process as ``start`` does in one of its own: on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield samix_here
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(here, once):
    """Return a function: the words of a run, and the folder of the whole of it."""

    def make(name):
        words = [*RUNS[name], *WORDS]
        made = once(f"whole {name}", lambda home: here(*words, "out=whole", cwd=home))
        return words, made / "whole"

    return make


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_a_killed_run_goes_on_to_the_same_curve(uninterrupted, here, name, how, tmp_path):
    words, whole = uninterrupted(name)
    run = tmp_path / "run"
    status, error = interrupt_after(start(tmp_path, *words, "out=run"), run, 3, how)
    assert status != 0
    assert "Traceback" not in error
    if how != signal.SIGKILL:
        assert "resume=" in error
    kept = len(rows(run))
    assert kept < 12, "the run was over before it was interrupted"
    if how == signal.SIGTERM:  # a new process, too
        printed = finish(start(tmp_path, words[0], "resume=run"))
    else:
        printed = here(*words, "out=run", cwd=tmp_path)
    assert "resumed from last.ckpt" in printed
    assert rows(run) == rows(whole)
    ours, theirs = (torch.load(r / "last.ckpt", weights_only=True) for r in (run, whole))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in ours["state_dict"].items():
        same(value, theirs["state_dict"][key], key)


def test_a_finished_run_is_left_alone(uninterrupted, here):
    words, whole = uninterrupted("byol")
    before = (whole / "encoder.safetensors").read_bytes()
    out = here(*words, "out=whole", cwd=whole.parent)
    assert "kNN top-1" in out
    assert (whole / "encoder.safetensors").read_bytes() == before
    assert len(rows(whole)) == 12


def test_two_processes_do_not_train_in_one_folder(fails, tmp_path, monkeypatch):
    words = [*RUNS["byol"], *WORDS, "data.workers=1", "out=run"]
    process, run = start(tmp_path, *words), tmp_path / "run"
    while not rows(run):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    monkeypatch.chdir(tmp_path)
    assert "another process trains in run" in fails(*words)
    process.kill()
    process.wait(timeout=100)
    with RunFolder(run).lock():  # at once, though its worker may still be there
        assert len(rows(run)) < 12
