"""What a run's surroundings do to it: scripts that workers import, folders that disappear."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from types import SimpleNamespace

import pytest

import ssl_samix
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.errors import UserError
from ssl_samix.training.logging import Pace
from ssl_samix.training.run import _fit

SMALL = {"data.limit": 64, "data.batch_size": 32, "backbone.width": 4, "mixup": "none"}


def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path, monkeypatch):
    """As multiprocessing marks a spawned worker that still imports the script."""
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_inheriting", True, raising=False)
    with pytest.raises(UserError, match="under if __name__ == '__main__':"):
        ssl_samix.pretrain(out=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sentence", ["DataLoader worker (pid 7) exited", "of another kind"])
def test_a_worker_that_ended_is_a_sentence_and_other_faults_are_not(sentence, tmp_path):
    class Trainer:
        strategy = SimpleNamespace(launcher=None)

        def fit(self, *given, **named):
            raise RuntimeError(sentence)

    expected = UserError if "DataLoader" in sentence else RuntimeError
    with pytest.raises(expected, match=r"of another kind|data.workers=0 uses no workers"):
        _fit("pretrain", Trainer(), None, None, RunFolder(tmp_path))


def test_a_process_that_fails_ends_those_that_wait_for_it(tmp_path):
    killed = []

    class Trainer:
        strategy = SimpleNamespace(launcher=SimpleNamespace(kill=killed.append))

        def fit(self, *given, **named):
            raise RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    with pytest.raises(UserError, match=r"another process of this run ended.*samix pretrain resum"):
        _fit("pretrain", Trainer(), None, None, RunFolder(tmp_path))
    assert killed == [signal.SIGKILL]


def test_a_run_goes_on_without_the_folder_of_tensorboard(tmp_path, monkeypatch):
    started = Pace.on_train_epoch_start

    def remove(self, trainer, module):
        started(self, trainer, module)
        if trainer.current_epoch == 1:
            shutil.rmtree(trainer.logger.log_dir)

    monkeypatch.setattr(Pace, "on_train_epoch_start", remove)
    epochs = {"trainer.max_epochs": 3, "trainer.accelerator": "cpu"}
    ssl_samix.pretrain("digits", "simclr", tmp_path / "run", **SMALL, **epochs)
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert (tmp_path / "run" / "encoder.safetensors").exists()
