"""Mistakes with mixing on the real command line: a sentence, status 2."""

from __future__ import annotations

import pytest

SMALL = (
    "data.limit=128", "data.batch_size=32", "backbone.width=8", "trainer.max_epochs=3",
    "method=moco", "method.queue_size=64",
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["mixup.stage=7"], "backbone resnet18 has no stage 7; its stages: 1, 2, 3, 4"),
        (["data.batch_size=1"], "need at least 2"),
        (["mixup.alpha=0"], "mixup.alpha must be a number at least 0.001, got 0"),
        (["mixup.mask=anchord"], "unknown mixup.mask 'anchord': did you mean 'anchored'?"),
        (["mixup=samix_p", "mixup.mixer=nowhere.safetensors"], "nowhere.safetensors"),
        (["mixup=samix_c", "mixup.clusters=1000"], "128 images cannot make 1000 clusters"),
        (["mixup.during=[0.95,1]"], "mixup.during=[0.95,1] holds no step of the run's 12: widen"),
        # A Mixer that is driven to NaN: the run stops and names the step.
        (["mixup.lr=1e30"], "the Mixer's mask became NaN in step "),
    ],
)
def test_one_sentence(fails, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in fails("pretrain", *SMALL, *words, "out=run")
