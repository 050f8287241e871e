"""Jobs by Hydra's submitit launcher: SLURM's commands are stand-ins, all the rest is real."""

from __future__ import annotations

import os
import stat

import pytest

from tests.conftest import samix

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="no extra [slurm]")

TINY = [
    "--multirun", "data.limit=96", "data.batch_size=32", "backbone.width=8",
    "trainer.max_epochs=1", "trainer.accelerator=cpu", "method=moco", "method.queue_size=64",
]  # fmt: skip
SBATCH = """#!/bin/sh
cp "$1" "{here}/submitted"
export SLURM_JOB_ID=4711 SLURM_JOB_NAME=samix
sh "$1" > "{here}/printed" 2>&1 &
echo Submitted batch job 4711
"""
# Two tasks of one machine, as srun would start them.
SRUN = """#!/bin/sh
while true; do
    case "$1" in
        --output|--error) shift 2 ;;
        --*) shift ;;
        *) break ;;
    esac
done
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1
export SLURM_JOB_NODELIST=localhost
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
wait
"""
SACCT = """#!/bin/sh
printf 'JobID|State|NodeList\\n4711|RUNNING|localhost\\n'
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (folder / name).write_text(text.replace("{here}", str(tmp_path)))
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_job_of_two_tasks_makes_one_run(slurm, tmp_path):
    words = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=7", "trainer.devices=2"]
    done = samix("pretrain", *TINY, *words, "out=all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "print to all/.submitit" in done.stdout
    submitted = (tmp_path / "submitted").read_text().splitlines()
    for option in ("nodes=1", "ntasks-per-node=2", "gpus-per-node=2", "time=7", "job-name=samix"):
        assert f"#SBATCH --{option}" in submitted
    assert "export SLURM_KILL_BAD_EXIT=1" in submitted, "one task that fails ends the others"
    (run,) = (p for p in (tmp_path / "all").iterdir() if p.is_dir() and p.name[0] != ".")
    assert (run / "encoder.safetensors").exists()
    assert "2 x cpu" in (tmp_path / "printed").read_text()


def test_a_job_that_fails_is_a_sentence_and_so_is_its_reason(tmp_path):
    words = ["hydra/launcher=submitit_local", "optimizer.lr=1e30", "out=all"]
    done = samix("pretrain", *TINY, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2, "samix: a job ended before its run did: see all/.submitit\n"
    )  # fmt: skip
    (log,) = (tmp_path / "all" / ".submitit").glob("*/*.err")
    assert log.read_text().splitlines()[-1].startswith("samix: ")
    assert "NaN" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hydra/launcher=slurm"], "starts jobs with --multirun only"),
        (["-m", "hydra/launcher=slurm"], "sbatch and srun, which are not on this machine"),
    ],
)
def test_a_launcher_that_cannot_work_here(words, sentence, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fails("pretrain", *words)
    assert said.startswith("samix: hydra/launcher=slurm ")
    assert sentence in said
    assert not list(tmp_path.iterdir())


def test_devices_that_are_no_number_are_told(slurm, tmp_path):
    done = samix("pretrain", *TINY, "hydra/launcher=slurm", cwd=tmp_path)
    assert done.returncode == 2
    assert "'auto' of type 'str' could not be converted to Integer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "submitted").exists()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("hydra/launcher=slum", "unknown hydra/launcher 'slum': did you mean 'slurm'?"),
        ("hydra/lancher=slurm", "unknown key 'hydra/lancher': did you mean 'hydra/launcher'?"),
        ("hydra.sweep.dri=x", "unknown key 'hydra.sweep.dri': did you mean 'hydra.sweep.dir'?"),
        ("hydra.launcher=4", "hydra.launcher is not a key: write hydra/launcher=<name>"),
    ],
)
def test_a_mistake_in_hydras_own_words_is_one_sentence(word, sentence, fails):
    assert sentence in fails("pretrain", "--multirun", "seed=0,1", word)
