"""A row of metrics.csv is of its epoch, whatever others measured."""

from __future__ import annotations

import pytest

import ssl_samix
from ssl_samix.callbacks.metrics_csv import read_metrics

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
