"""What a run shows and keeps between two epochs, and the picture of its views."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_samix.artifacts.run_folder import read_metrics
from ssl_samix.config.compose import build, compose
from ssl_samix.data.datamodule import StepLoader
from ssl_samix.training import logging
from ssl_samix.training.logging import Pace, Readings, RunProgress
from ssl_samix.training.view_picture import paint_views
from tests.callbacks.test_mixed_pictures import enlarged, tile
from tests.callbacks.test_trackers import train


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    stub = SimpleNamespace(monotonic=lambda: now.seconds, perf_counter=lambda: now.seconds)
    stub.process_time = stub.monotonic
    monkeypatch.setattr(logging, "time", stub)
    return now


class Trainer(SimpleNamespace):
    """As much of a trainer as the callbacks read: steps of 64 images, an epoch of 1,000."""

    def __init__(self, epochs=2):
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}])
        super().__init__(
            global_step=0, max_epochs=epochs, current_epoch=0, num_training_batches=1000,
            estimated_stepping_batches=1000 * epochs, is_global_zero=True, optimizers=[optimizer],
            datamodule=SimpleNamespace(batch_size=64), loggers=[],
            callback_metrics={}, train_dataloader=SimpleNamespace(waited=0.0),
        )  # fmt: skip

    def step(self, callbacks, module=None):
        self.global_step += 1
        for callback in callbacks:
            callback.on_train_batch_end(self, module, None, None, self.global_step - 1)


def test_a_reading_every_five_seconds_is_of_the_last_step(clock):
    trainer, readings, kept = Trainer(), Readings(), []
    trainer.loggers = [SimpleNamespace(log_metrics=lambda v, step: kept.append((step, v)))]
    readings.on_train_epoch_start(trainer, None)
    for number in range(1, 31):
        clock.seconds += 0.5
        trainer.step([readings], SimpleNamespace(last_loss=torch.tensor(float(number))))
    assert [step for step, _ in kept] == [10, 20, 30]
    assert kept[1][1] == {"step/loss": 20.0, "step/lr": 0.25, "step/images_per_second": 128.0}
    assert str(readings) == "loss 30.000  lr 0.25  128 images/s"


def test_a_step_without_a_reading_asks_for_nothing(clock):
    """A loss on the meta device cannot be read: waiting would fail."""
    trainer, readings = Trainer(), Readings()
    readings.on_train_epoch_start(trainer, None)
    clock.seconds += 4.9
    trainer.step([readings], SimpleNamespace(last_loss=torch.ones((), device="meta")))
    clock.seconds += 0.2
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.step([readings], SimpleNamespace(last_loss=torch.ones((), device="meta")))


def test_a_long_run_tells_after_twenty_steps_how_long_it_takes(clock, capsys):
    trainer, progress = Trainer(), RunProgress()
    progress.on_train_start(trainer, None)
    for _ in range(21):
        clock.seconds += 0.5
        trainer.step([progress])
    # 1,980 steps of half a second are left after the twentieth
    assert capsys.readouterr().out == "time      about 16:30 for the run\n"


def test_a_short_run_does_not_tell_how_long_it_takes(clock, capsys):
    trainer, progress = Trainer(), RunProgress()
    progress.on_train_start(trainer, None)
    for _ in range(21):
        clock.seconds += 0.03
        trainer.step([progress])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("epochs", "lines"), [(2, 5), (12, 0)])
def test_long_epochs_are_told_of_without_a_terminal(epochs, lines, clock, capsys):
    """A twelfth of two epochs is 167 steps; twelve epochs have a line each, at their ends."""
    trainer, readings = Trainer(epochs), Readings()
    progress = RunProgress(None, readings)
    progress.on_train_start(trainer, None)
    readings.on_train_epoch_start(trainer, None)
    for _ in range(1000):
        clock.seconds += 1
        trainer.step([readings, progress], SimpleNamespace(last_loss=torch.tensor(0.5)))
    first, *said = capsys.readouterr().out.splitlines()
    assert first.startswith("time")
    assert len(said) == lines
    if said:
        assert said[0] == "epoch 1/2, 17%  loss 0.500  lr 0.25  64 images/s  30:33 left"


def test_the_share_of_waiting_is_of_the_epochs_time(clock):
    trainer, pace, found = Trainer(), Pace(), {}
    module = SimpleNamespace(log_dict=lambda values, **_: found.update(values))
    trainer.train_dataloader.waited = 100.0
    pace.on_train_epoch_start(trainer, module)
    clock.seconds, trainer.train_dataloader.waited = 20.0, 105.0
    pace.on_train_epoch_end(trainer, module)
    assert found["data_wait"] == pytest.approx(0.25)


def test_a_loader_counts_its_own_time_and_not_the_trainings(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    stub = SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr("ssl_samix.data.datamodule.time", stub)

    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            now.seconds += 2
            return index

    loader = StepLoader(Slow(), batch_size=None)
    for _ in loader:
        now.seconds += 10
    assert loader.waited == 6


def test_a_run_shows_its_last_loss_on_the_bar_and_in_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging, "EVERY", 0.0)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    run = train(tmp_path / "run", trainer={"max_epochs": 2})
    board = EventAccumulator(str(run.out / "tensorboard")).Reload()
    losses = board.Scalars("step/loss")
    assert [scalar.step for scalar in losses] == [1, 2, 3, 4]
    rows = read_metrics(run.out / "metrics.csv")
    means = [np.mean([losses[i].value, losses[i + 1].value]) for i in (0, 2)]
    assert [float(row["loss"]) for row in rows] == pytest.approx(means, rel=1e-5)
    assert 0 <= float(rows[0]["data_wait"]) < 1
    bar = screen.getvalue().split("\r")
    assert any("epoch 1/2  loss " in line and " images/s" in line for line in bar)
    end = capsys.readouterr().out
    assert f"loss       {float(rows[-1]['loss']):.3f}" in end
    assert "of the time waiting for data" in end


@pytest.mark.parametrize("device", ["batched", "workers"])
def test_views_are_painted_beside_their_images(device):
    config, _ = compose("pretrain", ["data.batch_size=32", f"views.device={device}"])
    data = build(config.data, views=build(config.views), seed=0)
    state = torch.get_rng_state()
    picture = paint_views(data)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(picture, paint_views(data)), "the same one every time"
    train_images = data.splits.train
    every = train_images.load(range(len(train_images)))
    shown = [[tile(picture, column, row, 5, 6, 128) for column in range(5)] for row in range(6)]
    small = torch.stack([row[0][:, ::8, ::8] for row in shown])
    assert all((every == image).flatten(1).all(dim=1).any() for image in small)
    for row in shown:
        assert len({view.numpy().tobytes() for view in row}) == 5, "no view is another"
        assert torch.equal(row[1], enlarged(row[1][:, ::8, ::8], 8))


def test_a_run_keeps_a_small_picture_of_its_views(trained, tmp_path):
    file = trained("moco samix", tmp_path / "run") / "views" / "views.png"
    assert Image.open(file).size == (12 + 5 * 132 - 4 + 12, 12 + 18 + 6 * 132 - 4 + 12)
    assert file.stat().st_size < 60_000
