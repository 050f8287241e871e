"""The command as people meet it: real processes, real exit statuses."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ssl_samix.artifacts.run_folder import RunFolder, default_out
from ssl_samix.cli.main import job_name
from ssl_samix.errors import UserError
from tests.conftest import RUNS, samix, samix_here

TINY = RUNS["moco samix"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg")
    return folder


def test_help_lists_the_subcommands(tmp_path):
    shown = samix("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert re.search("pretrain +learn an encoder from images without labels", shown.stdout)
    assert re.search("show-mixing +paint what a trained Mixer makes of images", shown.stdout)


def test_pretrain_help_shows_groups_and_choices(tmp_path):
    shown = samix_here("pretrain", "--help", cwd=tmp_path)
    assert re.search("method: .*byol, .*moco, .*simclr", shown)
    assert re.search("mixup: .*none, .*samix", shown)
    assert "max_epochs: auto" in shown
    assert "hydra:" not in shown


def test_a_run_in_another_folder_leaves_what_it_should(tmp_path):
    done = samix("pretrain", *TINY, "out=here/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "here" / "run"
    names = {p.name for p in run.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "metrics.csv", "tensorboard", "last.ckpt", "best.ckpt",
        "encoder.safetensors", "mixer.safetensors", "mixing", "views",
    }  # fmt: skip
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"epoch", "loss", "knn/top1", "knn/top5", "rankme", "alignment", "uniformity"} <= set(
        header
    )
    assert "kNN top-1" in done.stdout
    assert "images/s" in done.stdout
    assert str(Path("here/run/encoder.safetensors")) in done.stdout
    assert len(done.stdout.splitlines()) <= 20
    assert "Warning" not in done.stderr
    assert set(os.listdir(tmp_path)) == {"here"}, "nothing is left beside the run folder"


def test_a_sweep_runs_every_job_in_a_folder_of_its_own(tmp_path):
    words = ["--multirun", "method=simclr,byol", "seed=0,1", *TINY[1:-1], "out=sweep"]
    printed = samix_here("pretrain", *words, cwd=tmp_path)
    header, _, *rows, _, note = printed.split("\n\nrun ")[1].strip().split("\n")
    assert header.split() == ["method", "seed", "state", "epochs", "kNN", "top-1", "%"]
    cells = [[cell for cell in row.split() if cell != "*"] for row in rows]
    assert [row[1:5] for row in cells] == [
        [method, seed, "finished", "1/1"] for method in ("simclr", "byol") for seed in "01"
    ]
    assert all((tmp_path / row[0] / "encoder.safetensors").exists() for row in cells)
    assert note == "*: the highest of runs on the same images"
    runs = [p for p in (tmp_path / "sweep").iterdir() if p.is_dir()]
    assert len(runs) == 4
    assert all((run / "encoder.safetensors").exists() for run in runs)
    assert len({(run / "encoder.safetensors").read_bytes() for run in runs}) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", run.name) for run in runs)


def test_names_of_jobs_need_no_quotes_and_stay_short():
    assert job_name(["method=moco", "seed=0"]) == "method-moco_seed-0"
    long = [f"data.root='/{'deep/' * 60}{end}'" for end in "ab"]
    names = [job_name([word]) for word in long]
    assert names[0] != names[1]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) for name in names)


def test_a_folder_with_any_name_is_typed_as_it_is(photos, tmp_path):
    folder = photos.rename(tmp_path / "jörg's photos, 50% (a=b)")
    words = ["data=folder", f"data.root={folder}", "data.batch_size=8", "backbone.width=8"]
    out = tmp_path / "out, too"
    samix_here("pretrain", *words, "trainer.max_epochs=1", f"out={out}", cwd=tmp_path)
    again = samix_here("pretrain", f"resume={out}", cwd=tmp_path)
    assert f"{out}, resumed from last.ckpt" in again


def test_mistakes_are_told_before_heavy_imports(tmp_path):
    """Each in one sentence, and all of them in one process."""
    old = Path(__file__).parent / "old_run"
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    run = shutil.copytree(old, tmp_path / "run")
    rows = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("\n".join([*rows, "1" + rows[1][1:], ""]))
    mistakes = {
        "pretrain methd=moco": "unknown key 'methd': did you mean 'method'?",
        "pretrain data=flats": "data=flats is neither a folder nor a data set: choose from cifar10",
        "pretrain trainer.extra.benchmrk=1": "Trainer 'benchmrk': did you mean 'benchmark'?",
        f"knn run={old} data=flat": "this protocol needs labelled images to train and to test on",
        f"linear run={old} data=flat": "this protocol needs labelled images",
        "pretrain resume=run trainer.max_epochs=1": "run is finished after 2 epochs",
    }
    code = (
        "import sys\nfrom ssl_samix.cli.main import main\n"
        f"for line in {[*mistakes]!r}:\n"
        "    try:\n        main(line.split())\n"
        "    except SystemExit as stop:\n        print(stop.code, 'torch' in sys.modules)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert shown.stdout.split() == ["2", "False"] * len(mistakes)
    for told, sentence in zip(shown.stderr.splitlines(), mistakes.values(), strict=True):
        assert sentence in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pretrian"], "unknown subcommand 'pretrian': did you mean 'pretrain'"),
        (["pretrain", "data=folder"], "data.root=<folder of images>"),
        (["pretrain", "data=folder", "data.root=nowhere"], "does not exist"),
        (["pretrain", "data=cifar10"], "data.download=true"),
        (["pretrain", "backbone.name=resnet19"], "did you mean 'resnet18'"),
        (["pretrain", "data.batch_size=2000"], "larger than the data set (1438 images)"),
        (["pretrain", "data.batch_size=1"], "at least 2"),
        (["pretrain", "data.limit=0"], "data.limit"),
        (["pretrain", "backbone=any", "backbone.name=vgg11", "data.image_size=8"], "cannot take"),
        (["pretrain", "resume=nowhere"], "is not a run folder"),
        (["pretrain", "trainer.precision=12"], "precision"),
        (["pretrain", "trainer.accelerator=gpu"], "settings do not work here"),
        (["pretrain", "method.temperature=0"], "temperature"),
        (["pretrain", "method.momentum=2"], "momentum"),
        (["pretrain", "views.a.crop_min=0"], "crop_min"),
        (["pretrain", "callbacks.knn.every_n_epochs=0"], "every_n_epochs"),
        (["pretrain", "data.limit=ten"], "data.limit"),
        (["pretrain", "seed=0,1"], "seed has several values: a list is seed=[0,1], --multirun"),
        (["pretrain", "data.workers=-1"], "data.workers"),
        (["pretrain", "seed=-1"], "seed"),
        (["pretrain", "optimizer.optimizer.momentum=-1"], "the optimizer rejects"),
        (["pretrain", "trainer.precision=bf16-true"], "trainer.precision"),
        (["pretrain", "trainer.max_epochs=0"], "max_epochs"),
        (["pretrain", "trainer.gradient_clip_val=-1"], "must be a number at least 0, got -1"),
        (["pretrain", "trainer.accumulate_grad_batches=0"], "in [1, 1000000], got 0"),
        (["pretrain", "callbacks.pictures.rows=100000"], "in [1, 64], got 100000"),
        (["pretrain", "method.hidden_dim=0"], "method.hidden_dim must be a number in [1, 65536]"),
        (
            ["pretrain", "method=moco", f"method.queue_size={10**11}"],
            f"method.queue_size={10**11} takes 47,683.7",
        ),
        (["pretrain", "backbone.width=1000000"], "backbone.width of resnet18 must be a number in"),
        (
            ["pretrain", "backbone.width=60000"],
            "backbone.width=60000 takes 36,531.8 GiB",
        ),
        (["pretrain", f"seed={10**20}"], f"seed must be at most 4294967295, got {10**20}"),
        (["pretrain", "data=folder", "data.root=~no-such-user/x"], "~no-such-user/x does not"),
    ],
)
def test_bad_input(words, sentence, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = [] if words[0] != "pretrain" or "resume=nowhere" in words else ["out=run"]
    assert sentence in fails(*words, *extra)
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_empty_folder(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is an empty folder" in fails("pretrain", "data=folder", f"data.root={tmp_path}/empty")


def test_too_many_unreadable_images_stop_at_the_start(photos, fails, tmp_path):
    for name in ("04.jpg", "05.jpg", "06.jpg", "07.jpg"):
        (photos / name).write_text("no picture")
    sentence = fails("pretrain", "data=folder", f"data.root={photos}", f"out={tmp_path}/run")
    assert "07.jpg" in sentence


def test_out_that_holds_other_things(fails, tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    assert "not a run folder" in fails("pretrain", f"out={tmp_path}")
    assert (tmp_path / "thesis.tex").read_text() == "all my work"


def test_out_that_cannot_be_made(fails):
    assert "cannot use out=/dev/null/run" in fails("pretrain", "out=/dev/null/run")
    assert "cannot make the run folder" in fails("pretrain", *TINY, "out=/proc/none/run")


def test_bounds_that_are_used_instead_are_said(tmp_path, caplog):
    words = [*TINY, "data.limit=90", "method.bn_groups=7", "callbacks.knn.k=[5000]"]
    samix_here("pretrain", *words, "out=run", cwd=tmp_path)
    assert "method.bn_groups=7: BatchNorm sees 7 groups of 4 or 5 images" in caplog.messages
    assert "callbacks.knn.k=5000: the bank has 90 images, so all of them vote" in caplog.messages


def test_nothing_left_to_do_is_said(tmp_path, fails):
    """``old_run`` has done one epoch, and does a second one."""
    folder, words = tmp_path / "run", ["pretrain", f"resume={tmp_path}/run"]
    shutil.copytree(Path(__file__).parent / "old_run", folder)
    one, two = ([*words, f"trainer.max_epochs={epochs}"] for epochs in (1, 2))
    sentence = "nothing is left to do: 1 epochs are done and trainer.max_epochs=1"
    assert sentence in samix_here(*one, cwd=tmp_path)
    assert "nothing is left" not in samix_here(*two, cwd=tmp_path)
    before = (folder / "metrics.csv").read_bytes()
    assert "is finished after 2 epochs and trainer.max_epochs=1: give a larger" in fails(*one)
    assert (folder / "metrics.csv").read_bytes() == before


def test_slurm_variables_that_do_not_fit(fails, tmp_path, monkeypatch):
    job = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0"}
    for name, value in {**job, "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)
    sentence = fails("pretrain", *TINY, f"out={tmp_path}/run")
    assert "SLURM started 4 tasks" in sentence
    assert "start them with --ntasks-per-node" in sentence
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    sentence = fails("pretrain", *TINY, "trainer.devices=2", f"out={tmp_path}/run")
    assert "SLURM started 4 processes, 4 of them here" in sentence
    assert "trainer.devices=2" in sentence


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    return trained("moco samix", tmp_path_factory.mktemp("finished") / "run")


def test_out_of_another_run(finished, fails):
    before = (finished / "last.ckpt").read_bytes()
    sentence = fails("pretrain", *TINY, "seed=3", f"out={finished}")
    assert "belongs to another run (seed is 0 there, 3 here)" in sentence
    assert (finished / "last.ckpt").read_bytes() == before


def test_a_run_from_before_a_key_existed_goes_on(finished):
    folder = RunFolder(finished)
    config, choices = folder.load_config()
    text = folder.config.read_text()
    try:
        now = OmegaConf.merge(config, {"mixup": {"during": [0.0, 1.0]}})
        folder.check_same_run(now)
        OmegaConf.set_struct(config, False)
        del config.mixup["during"]
        folder.create(config, choices)
        folder.check_same_run(now)
        now.mixup.during = [0.0, 0.5]
        with pytest.raises(UserError, match=r"mixup.during is \[0.0, 1.0\] there, \[0.0, 0.5\]"):
            folder.check_same_run(now)
    finally:
        folder.config.write_text(text)


def test_a_resume_changes_no_network(finished, fails):
    assert "cannot be changed by a resume" in fails(
        "pretrain", f"resume={finished}", "backbone.width=8"
    )
    assert "cannot be changed by a resume" in fails("pretrain", f"resume={finished}", "method=byol")


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "width"])
def test_damaged_and_foreign_checkpoints(damage, finished, fails, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    whole = (finished / "last.ckpt").read_bytes()
    witness = tmp_path / "witness"
    if damage == "cut":
        (run / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        (run / "last.ckpt").write_text("this is no checkpoint")
    elif damage == "pickle":
        torch.save({"state_dict": Trap(str(witness))}, run / "last.ckpt")
    else:
        checkpoint = torch.load(finished / "last.ckpt", weights_only=True)
        checkpoint["ssl_samix"]["backbone"]["width"] = 64
        torch.save(checkpoint, run / "last.ckpt")
    sentence = fails("pretrain", f"resume={run}", "trainer.max_epochs=3")
    expected = {
        "cut": "damaged", "text": "damaged", "pickle": "would run code",
        "width": "holds the backbone resnet18 of width 64",
    }  # fmt: skip
    assert expected[damage] in sentence
    assert not witness.exists()


class Trap:
    """A pickle that leaves a trace when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_space_is_one_sentence_and_the_last_checkpoint_stays(finished, fails, tmp_path):
    """Files above the limit cannot be written: the write really fails, half-way."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "last.ckpt", "metrics.csv"):
        (run / name).write_bytes((finished / name).read_bytes())
    limit = (finished / "last.ckpt").stat().st_size // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        sentence = fails("pretrain", f"resume={run}", "trainer.max_epochs=3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in sentence
    assert (run / "last.ckpt").read_bytes() == (finished / "last.ckpt").read_bytes()
    assert not list(run.glob(".*.partial"))


def test_a_damaged_image_is_named_counted_and_skipped(photos, tmp_path, caplog):
    for i in range(40, 120):
        (photos / f"{i}.jpg").write_bytes((photos / f"{i % 40:02}.jpg").read_bytes())
    whole = (photos / "05.jpg").read_bytes()
    (photos / "05.jpg").write_bytes(whole[: len(whole) // 2])
    words = ["data=folder", f"data.root={photos}", *TINY, "data.limit=null", "out=run"]
    printed = samix_here("pretrain", *words, cwd=tmp_path)
    assert "05.jpg" in caplog.text
    assert "119 images at 32 px, no labels" in printed
    assert "RankMe" in printed
    assert not (tmp_path / "run" / "best.ckpt").exists()


def test_threads_wait_in_short_loops(tmp_path, monkeypatch):
    """On a busy machine a step would otherwise take many times as long."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")  # libgomp prints what it runs with
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    done = samix("pretrain", "data.batch_size=2000", cwd=tmp_path)  # torch is there, no more
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's threads here are not libgomp's")
    assert "GOMP_SPINCOUNT = '10000'" in done.stderr


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda pattern: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        choices = {"data": "digits", "method": "moco", "mixup": "none"}
        folders = list(pool.map(lambda seed: default_out(choices, 0), range(8)))
    assert len(set(folders)) == 8
    assert all(folder.is_dir() for folder in folders)


def test_nothing_is_left_of_a_run_that_could_not_begin(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails("pretrain", "data.batch_size=2000")
    assert list((tmp_path / "runs").iterdir()) == []
