"""A row of metrics.csv is of its epoch, whatever others measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ssl_samix
from ssl_samix.artifacts.run_folder import mend_metrics
from ssl_samix.training.logging import read_metrics

SMALL = {
    "data.limit": 128,
    "data.batch_size": 64,
    "backbone.width": 8,
    "trainer.max_epochs": 4,
    "trainer.accelerator": "cpu",
    "mixup": "samix",
    "mixup.during": [0.25, 0.75],
    "mixup.update_every": 4,
}


@pytest.mark.parametrize("mode", ["pretrain", "supervised"])
def test_epochs_that_do_not_mix_have_no_mixer_in_their_rows(mode, tmp_path):
    """Of 8 steps 2 to 5 mix; the Mixer learns in the first of them and in step 4."""
    if mode == "pretrain":
        run = ssl_samix.pretrain("digits", "moco", tmp_path / "run", **SMALL)
    else:
        run = ssl_samix.train_supervised("digits", tmp_path / "run", **SMALL)
    rows = read_metrics(run.out / "metrics.csv")
    measured = {
        name: [row["epoch"] for row in rows if row[name]]
        for name in ("loss", "loss/mix", "loss/mixer", "mixer/mask_std")
    }
    assert measured == {
        "loss": ["0", "1", "2", "3"],
        "loss/mix": ["1", "2"],
        "loss/mixer": ["1", "2"],
        "mixer/mask_std": ["1", "2"],
    }


WHOLE = b"epoch,step,loss,knn/top1\n0,2,3.5,50\n1,4,3.25,\n2,6,nan,60\n"
DAMAGED = {  # -> epochs that are left
    "torn": (WHOLE[:-6], 2),
    "torn within the header": (WHOLE[:12], 0),
    "empty lines": (WHOLE.replace(b"\n", b"\n\n"), 3),
    "zeros at its end": (WHOLE + bytes(40), 3),
    "zeros instead": (bytes(80), 0),
    "junk": (b"\xff\xfe{]\x00\n\x80junk,,\n" * 3, 0),
    "a line of another table": (WHOLE + b"time,protocol,variant,weights\n", 3),
    "an epoch again": (WHOLE + b"1,4,3.25,\n", 3),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_lines_are_left_out_and_kept_beside(damage, tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    held, epochs = DAMAGED[damage]
    path.write_bytes(held)
    lossless = damage in ("empty lines", "torn within the header")
    assert [row["epoch"] for row in read_metrics(path)] == list(map(str, range(epochs)))
    mend_metrics(path)
    assert [row["epoch"] for row in read_metrics(path)] == list(map(str, range(epochs)))
    if not lossless:
        assert (tmp_path / "metrics.damaged.csv").read_bytes() == held
        assert f"{epochs} epochs are kept" in caplog.text
        caplog.clear()
        mend_metrics(path)
    assert not caplog.text


def test_a_run_goes_on_after_a_torn_line(tmp_path, caplog):
    old = Path(__file__).parent.parent / "old_run"
    folder = shutil.copytree(old, tmp_path / "run")
    whole = (folder / "metrics.csv").read_bytes()
    (folder / "metrics.csv").write_bytes(whole + whole.splitlines()[1][:30].replace(b"0", b"1", 1))
    run = ssl_samix.pretrain(resume=folder, trainer={"max_epochs": 2})
    assert [row["epoch"] for row in read_metrics(run.out / "metrics.csv")] == ["0", "1"]
    assert "1 damaged lines are left out, 1 epochs are kept" in caplog.text


def test_a_finished_run_without_its_curves_tells_its_end(tmp_path, capsys):
    old = Path(__file__).parent.parent / "old_run"
    folder = shutil.copytree(old, tmp_path / "run")
    (folder / "metrics.csv").unlink()
    assert ssl_samix.pretrain(resume=folder, trainer={"max_epochs": 1}).metrics == {}
    told = capsys.readouterr().out
    assert "nothing is left to do: 1 epochs are done and trainer.max_epochs=1" in told
