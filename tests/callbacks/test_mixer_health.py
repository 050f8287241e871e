"""A Mixer that does nothing useful is told of: once, in words, not too early."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

import ssl_samix
from ssl_samix.optim import MixerOptimizer
from ssl_samix.training.guards import MixerHealth
from ssl_samix.training.logging import RunProgress


def module(update_every=1, form="paper", begin=0.0, end=1.0, optimizer="encoder"):
    policy = SimpleNamespace(block=SimpleNamespace(form=form))
    mixing = {"update_every": update_every, "policy": policy, "begin": begin, "end": end}
    mixing["optimizer"] = MixerOptimizer(optimizer)
    return SimpleNamespace(mixing=SimpleNamespace(**mixing))


def trainer(epoch=5, epochs=20, zero=True, steps=2000, **metrics):
    values = {f"mixer/{name}": torch.tensor(value) for name, value in metrics.items()}
    return SimpleNamespace(
        callback_metrics=values,
        current_epoch=epoch,
        max_epochs=epochs,
        is_global_zero=zero,
        estimated_stepping_batches=steps,
    )


@pytest.fixture
def said(caplog):
    def after(health, *trainers, of=None):
        caplog.clear()
        for one in trainers:
            health.on_train_epoch_end(one, of or module())
        return caplog.messages

    return after


def test_flat_masks_are_told_of_once(said):
    flat = [trainer(epoch, mask_std=0.019, one_sided=0.0) for epoch in (4, 5, 6)]
    (sentence,) = said(MixerHealth(), *flat, of=module(update_every=4))
    assert sentence == (
        "epoch 5: the Mixer's masks are flat (spatial deviation 0.019): it has fallen back to "
        "plain mixup; try in a new run: mixup.update_every=1, "
        "mixup.optimizer=adamw mixup.lr=0.02, a higher mixup.lr"
    )


def test_masks_that_ignore_their_ratio_are_told_of_once(said):
    ignoring = [trainer(epoch, ratio_slope=0.1, mask_std=0.2) for epoch in (1, 2, 3)]
    (sentence,) = said(MixerHealth(), *ignoring)
    assert sentence == (
        "epoch 3: the Mixer's masks ignore the requested ratio (slope 0.10; 1 is correct): "
        "mixtures' loss weights are wrong; try in a new run: mixup.mask=exact"
    )
    assert said(MixerHealth(), trainer(ratio_slope=0.51)) == []


def test_masks_that_are_worse_than_flat_ones_are_told_of_once(said):
    harmful = [trainer(epoch, gain=-0.012, mask_std=0.2, ratio_slope=1.0) for epoch in (4, 5, 6)]
    (sentence,) = said(MixerHealth(), *harmful, of=module(form="exact", optimizer="adamw"))
    assert sentence == (
        "epoch 7: the Mixer's masks have a higher loss than flat masks (gain -0.012): plain "
        "mixup would be cheaper; try in a new run: a lower mixup.lr"
    )
    unclear = [trainer(gain=gain, mask_std=0.2) for gain in (-0.1, 0.001, -0.1)]
    assert said(MixerHealth(), *unclear) == []


def test_a_long_run_has_to_lose_for_a_tenth_of_it(said):
    losing = [trainer(epoch, 100, gain=-0.003, mask_std=0.2) for epoch in range(20, 30)]
    assert said(MixerHealth(), *losing[:9]) == []
    assert len(said(MixerHealth(), *losing)) == 1


def test_what_a_short_run_has_not_learned_is_no_fault(said):
    new = {"mask_std": 0.0}
    assert said(MixerHealth(), trainer(steps=199, **new)) == []
    assert len(said(MixerHealth(), trainer(steps=200, **new))) == 1
    assert len(said(MixerHealth(), trainer(steps=20, ratio_slope=0.0))) == 1


def test_early_is_seen_from_where_mixing_begins(said):
    late = module(begin=0.5)
    flat = {epoch: trainer(epoch, mask_std=0.0, one_sided=0.0) for epoch in (10, 11)}
    assert said(MixerHealth(), flat[10], of=late) == []
    assert len(said(MixerHealth(), flat[11], of=late)) == 1


def test_copies_of_one_parent_are_told_of_once(said):
    copying = [trainer(epoch, mask_std=0.02, one_sided=0.95) for epoch in (0, 1)]
    (sentence,) = said(MixerHealth(), *copying)
    assert sentence.startswith("epoch 1: 95% of the mixtures are a copy of one parent")
    assert "mixup.mask=exact, a lower mixup.lr, a higher mixup.mask_weight" in sentence


def test_both_faults_are_told_of(said):
    assert len(said(MixerHealth(), trainer(mask_std=0.001, one_sided=0.99))) == 2


def test_advice_leaves_out_what_is_set_already(said):
    flat = trainer(mask_std=0.0, one_sided=0.95)
    set_already = module(update_every=1, form="exact", optimizer="adamw")
    sentences = said(MixerHealth(), flat, of=set_already)
    assert len(sentences) == 2
    for sentence in sentences:
        assert not any(word in sentence for word in ("update_every", "exact", "optimizer"))


def test_the_first_tenth_of_a_run_may_be_flat(said):
    early = [trainer(epoch, epochs=30, mask_std=0.0, one_sided=0.0) for epoch in (0, 1, 2)]
    assert said(MixerHealth(), *early) == []
    assert said(MixerHealth(), trainer(3, epochs=30, mask_std=0.0, one_sided=0.0))


@pytest.mark.parametrize(
    "quiet",
    [
        trainer(mask_std=0.021, one_sided=0.89),
        trainer(mask_std=0.2, ratio_slope=0.9, gain=0.0),
        trainer(ratio_slope=float("nan"), gain=float("nan")),
        trainer(mask_std=0.3, one_sided=0.0),
        trainer(mask_std=float("nan"), one_sided=float("nan")),
        trainer(),  # nobody trains a Mixer
        trainer(zero=False, mask_std=0.0, one_sided=1.0),  # another process speaks
    ],
)
def test_nothing_to_say(quiet, said):
    assert said(MixerHealth(), quiet) == []


def test_a_resumed_run_repeats_nothing(said):
    before, after = MixerHealth(), MixerHealth()
    flat = trainer(mask_std=0.0, one_sided=0.0)
    assert len(said(before, flat)) == 1
    after.load_state_dict(before.state_dict())
    assert said(after, flat) == []
    assert len(said(after, trainer(mask_std=0.0, one_sided=1.0))) == 1


def test_a_real_run_says_it_and_remembers(tmp_path, caplog):
    settings = {
        "data.limit": 64, "data.batch_size": 32, "backbone.width": 8, "method.queue_size": 64,
        "trainer.max_epochs": 2, "trainer.accelerator": "cpu", "callbacks.knn.val_limit": 20,
        "mixup": "samix", "mixup.pairs": "same", "mixup.upsampling": "nearest",
        "mixup.alpha": 1000, "mixup.mask": "paper", "mixup.lr": 1e-6, "mixup.update_every": 1,
    }  # fmt: skip
    run = ssl_samix.pretrain("digits", "moco", tmp_path / "run", **settings)
    (said,) = [m for m in caplog.messages if "Mixer" in m]
    assert "the Mixer's masks ignore the requested ratio (slope " in said
    checkpoint = torch.load(run.out / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["MixerHealth"] == {"said": ["ratio"], "losing_epochs": 0}
    caplog.clear()
    ssl_samix.pretrain(resume=run.out, trainer={"max_epochs": 3})
    assert not [m for m in caplog.messages if "Mixer" in m]


def test_a_warning_stands_above_the_bar(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    handlers = logging.root.handlers
    progress = RunProgress()
    progress.on_train_start(
        SimpleNamespace(global_step=0, is_global_zero=True, estimated_stepping_batches=10), None
    )
    logging.getLogger("ssl_samix.somewhere").warning("look here")
    progress.on_train_end(None, None)
    assert any(part.rstrip("\n") == "look here" for part in screen.getvalue().split("\r"))
    assert logging.root.handlers is handlers
