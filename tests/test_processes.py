"""Who started the processes of a run, and what follows from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssl_samix import processes
from ssl_samix.errors import ConfigError
from ssl_samix.processes import cores, fit_to_launcher, is_main_process, started_by
from ssl_samix.trainer import before_a_fork, build_trainer
from tests.conftest import samix_here

NAMES = (
    "TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)  # fmt: skip
BATCH_SHELL = {"SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}
SHELL = {"SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
TASK = {**BATCH_SHELL, "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "1"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1",
    "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
}  # fmt: skip
TINY = [
    "data.limit=64", "data.batch_size=32", "backbone.width=4", "trainer.accelerator=cpu",
    "mixup=none", "trainer.max_epochs=1",
]  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """Return a function that sets the variables of a launcher, and no others."""

    def put(variables):
        for name in [*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))]:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    put({})
    return put


@pytest.mark.parametrize(
    ("variables", "starter", "main"),
    [
        ({}, None, True),
        ({"LOCAL_RANK": "1"}, None, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, None, False),
        (BATCH_SHELL, None, True),
        ({**BATCH_SHELL, "LOCAL_RANK": "1"}, None, False),
        ({**BATCH_SHELL, "SLURM_NTASKS": "1", "LOCAL_RANK": "1"}, None, False),
        ({**SHELL, "LOCAL_RANK": "1"}, None, False),
        ({"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4"}, None, True),  # salloc's shell
        (TASK, "SLURM", False),
        ({**TASK, "SLURM_PROCID": "0"}, "SLURM", True),
        (TORCHRUN, "torchrun", False),
        ({**TORCHRUN, "RANK": "0"}, "torchrun", True),
        ({**TASK, **TORCHRUN, "RANK": "0"}, "torchrun", True),
    ],
)
def test_one_process_is_the_main_one(variables, starter, main, started):
    started(variables)
    assert (started_by(), is_main_process()) == (starter, main)


@pytest.mark.parametrize("variables", [TASK, TORCHRUN])
@pytest.mark.parametrize(
    ("devices", "nodes", "expected"),
    [
        ("auto", 1, (2, 2)), (-1, 2, (2, 2)), (2, 1, (2, 2)), ([4, 5], 2, ([4, 5], 2)),
        ("4,5", 1, ("4,5", 2)), (4, 1, None), ("auto", 3, None), (1, 4, None),
    ],
)  # fmt: skip
def test_devices_are_the_processes_that_were_started(variables, devices, nodes, expected, started):
    started(variables)
    if expected is None:
        with pytest.raises(ConfigError, match="started 4 processes, 2 of them here, which does"):
            fit_to_launcher(devices, nodes)
    else:
        assert tuple(fit_to_launcher(devices, nodes).values()) == expected


def test_lightning_starts_the_processes_where_slurm_has_not(started):
    expected = {"devices": 8, "num_nodes": 1}
    for variables in (BATCH_SHELL, SHELL, {**BATCH_SHELL, "SLURM_NTASKS": "1"}):
        started(variables)
        assert fit_to_launcher(8, 1) == expected


@pytest.mark.parametrize("variables", [{**BATCH_SHELL, "SLURM_NTASKS": "1"}, SHELL])
def test_lightnings_trainer_agrees(variables, started):
    started({**variables, "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    trainer = build_trainer(
        precision="32", accelerator="cpu", devices=2, sync_batchnorm=False, logger=False,
        wants_sync_batchnorm=False, max_epochs=1, enable_checkpointing=False,
    )  # fmt: skip
    assert not trainer.strategy.cluster_environment.creates_processes_externally


def test_mistakes_are_told_before_anything_is_made(started, fails, tmp_path):
    started(TORCHRUN)
    sentence = fails("pretrain", *TINY, "trainer.devices=3", f"out={tmp_path}/run")
    assert "torchrun started 4 processes, 2 of them here" in sentence
    assert "a run of several processes needs a run folder" in fails("pretrain", *TINY)
    assert not list(tmp_path.iterdir())


def test_an_interactive_shell_of_several_tasks_trains_in_one_process(started, tmp_path):
    started(SHELL)
    assert "1 x cpu" in samix_here("pretrain", *TINY, "out=run", cwd=tmp_path)


def test_workers_are_for_the_cores_of_a_process(started, monkeypatch):
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert [cores(), cores(4), cores(16)] == [12, 3, 1]
    started({**TASK, "SLURM_CPUS_PER_TASK": "7"})
    assert cores(2) == 7, "SLURM has divided them already"
    started({**SHELL, "SLURM_CPUS_PER_TASK": "7"})
    assert cores(2) == 6


@pytest.mark.parametrize("name", ["fsdp", "deepspeed_stage_2", "dpp"])
def test_strategies_that_cannot_work_are_a_sentence(name, fails):
    sentence = fails("pretrain", *TINY, f"trainer.strategy={name}")
    assert ("did you mean 'ddp'" if name == "dpp" else "splits weights between devices") in sentence


def test_graphs_and_accumulated_gradients_are_refused(fails):
    words = ["trainer.compile=reduce-overhead", "trainer.accumulate_grad_batches=2"]
    assert "overwrites the outputs of a step" in fails("pretrain", *TINY, *words)


# Counts what Lightning and DDP send in each step; starts a run as a user's script does.
SCRIPT = """
import sys
import pytorch_lightning as pl
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import ssl_samix
from ssl_samix.methods.base import BaseMethod

sent, steps = [], []
send, step = dist.broadcast, BaseMethod.training_step
sync = DistributedDataParallel._sync_buffers
def broadcast(*given, **named):
    sent.append("flag")
    return send(*given, **named)
def sync_buffers(self):
    sent.append("buffers")
    return sync(self)
def training_step(self, *given):
    steps.append(list(sent))
    return step(self, *given)
dist.broadcast, BaseMethod.training_step = broadcast, training_step
DistributedDataParallel._sync_buffers = sync_buffers
ssl_samix.pretrain("digits", "moco", "run", mixup="none", backbone={"width": 4},
    trainer={"max_epochs": 1, "accelerator": "cpu"},
    **{"data.limit": 96, "data.batch_size": 16})
assert len(steps) == 6, len(steps)
print("sent within the epoch:", steps[-1][len(steps[0]):])
"""


@pytest.mark.slow
def test_torchrun_makes_one_run_whose_steps_send_no_flags(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "script.py"], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x cpu") == 1
    assert done.stdout.count("sent within the epoch: []") == 2
    words = ["data.limit=96", *TINY[1:], "method=moco", "backbone.width=4", "out=words"]
    done = subprocess.run(
        [*command, "-m", "ssl_samix", "pretrain", *words], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x cpu") == 1
    assert torch.load(tmp_path / "words" / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_another_rank_ends_all_and_leaves_a_checkpoint(number, tmp_path):
    words = [*TINY, "trainer.max_epochs=4000", "callbacks.knn.every_n_epochs=5000", "out=run"]
    run = subprocess.Popen(
        [sys.executable, "-m", "ssl_samix", "pretrain", *words, "trainer.devices=2"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 200
        while not (tmp_path / "run" / "last.ckpt").exists() and time.monotonic() < until:
            time.sleep(0.2)
        (child,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(child), number)
        said, _ = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode in (2, -signal.SIGKILL), said  # Lightning kills it if it is faster
    assert "Traceback" not in said
    assert "resume with samix pretrain resume=run" in said
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] > 0


def asked_in() -> int:
    return os.getpid()


@pytest.mark.parametrize("notebook", [False, True])
def test_cuda_is_asked_in_another_process_before_a_notebook_forks(notebook, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if notebook:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert (before_a_fork(asked_in) == os.getpid()) is not notebook
