"""The command on tar shards: killed and resumed, on two processes, and with bad input."""

from __future__ import annotations

import io
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.conftest import samix_here
from tests.test_resume import finish, here, interrupt_after, rows, start  # noqa: F401 - a fixture

WORDS = [
    "pretrain", "data=webdataset", "data.root=shards/train-{000..019}.tar", "data.image_size=16",
    "data.batch_size=32", "data.memory_gb=0", "backbone.width=8", "mixup=none",
    "callbacks.knn.every_n_epochs=5",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with 20 shards of 8 digits each, with their numbers."""
    monkeypatch.setenv("SSL_SAMIX_CACHE", str(tmp_path / "cache"))
    digits = load_digits()
    (tmp_path / "shards").mkdir()
    for k in range(20):
        with tarfile.open(tmp_path / "shards" / f"train-{k:03}.tar", "w") as archive:
            for i in range(8 * k, 8 * k + 8):
                picture = io.BytesIO()
                pixels = np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)
                Image.fromarray(pixels).save(picture, "PNG")
                number = str(digits.target[i]).encode()
                for name, content in ((f"{i}.png", picture.getvalue()), (f"{i}.cls", number)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return tmp_path


@pytest.mark.timeout(600)  # three starts, each with worker processes
def test_a_killed_run_goes_on_as_the_uninterrupted_one(folder, here):  # noqa: F811
    words = [*WORDS, "trainer.max_epochs=5", "data.workers=1"]
    assert "144 images at 16 px, 10 classes" in here(*words, "out=whole", cwd=folder)
    run = folder / "run"
    interrupt_after(start(folder, *words, "out=run"), run, 1, signal.SIGKILL)
    assert len(rows(run)) < 5, "the run was over before it was interrupted"
    assert "resumed from last.ckpt" in here(*words, "out=run", cwd=folder)
    assert rows(run) == rows(folder / "whole")
    ours, theirs = (
        torch.load(folder / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "whole")
    )
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def test_two_processes(folder):
    out = finish(
        start(
            folder, *WORDS, "trainer.max_epochs=2", "trainer.devices=2", "trainer.accelerator=cpu",
            "data.workers=0", "out=run",
        )
    )  # fmt: skip
    assert "2 x cpu" in out
    assert len(rows(folder / "run")) == 2
    assert torch.load(folder / "run" / "last.ckpt", weights_only=True)["global_step"] == 8


def test_a_run_on_shards_is_measured_shown_and_embedded(folder):
    samix_here(*WORDS[:-2], "mixup=samix", "trainer.max_epochs=1", "out=run", cwd=folder)
    assert samix_here("knn", "run=run", "k=[5]", cwd=folder).strip()
    samix_here("show-mixing", "run=run", cwd=folder)
    samix_here("embed", "run=run", "out=features", cwd=folder)
    assert np.load(folder / "features" / "features.npy").shape[0] == 144
    assert f"{folder}/shards/train-000.tar/" in (folder / "features" / "paths.csv").read_text()


def test_a_url_is_kept_as_it_is(folder):
    url = f"file://{folder}/shards/*.tar"
    words = [word for word in WORDS if not word.startswith("data.root=")]
    samix_here(*words, f"data.root={url}", "trainer.max_epochs=1", "out=run", cwd=folder)
    assert f"root: {url}" in (folder / "run" / "config.yaml").read_text()
    samix_here("pretrain", "resume=run", "trainer.max_epochs=2", cwd=folder)
    assert len(rows(folder / "run")) == 2


def test_bad_input_is_one_sentence(folder, fails):
    def said(root, *words):
        return fails("pretrain", "data=webdataset", f"data.root={root}", *words)

    shards = folder / "shards"
    assert "needs a folder" in fails("pretrain", "data=webdataset")
    assert "no shard matches" in said(f"{shards}/val-*.tar")
    assert "train-020.tar does not exist" in said(f"{shards}/train-{{000..020}}.tar")
    assert "did you mean 'memory'" in said("memry://shards/*.tar")
    twice = said(shards / "train-000.tar", f"data.root={shards}/train-001.tar")
    assert "data.root is given 2 times: put a pattern with braces in quotes" in twice
    whole = (shards / "train-003.tar").read_bytes()
    (shards / "train-003.tar").write_bytes(whole[:3000])
    assert "train-003.tar is truncated or not an uncompressed tar file" in said(shards)
    (folder / "b.tar").write_bytes(bytes(10240))
    assert "no image in the 1 shards" in said(folder / "b.tar")
    assert "unknown key" in said(shards, "data.rot=x")
