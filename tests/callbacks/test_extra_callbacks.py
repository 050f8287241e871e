"""callbacks.extra: Lightning's callbacks by name, and nothing else."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl

import ssl_samix
from ssl_samix.artifacts.run_folder import RunFolder, read_metrics
from ssl_samix.config.compose import compose
from ssl_samix.config.key_types import CALLBACKS
from ssl_samix.errors import CheckpointError, ConfigError
from tests.callbacks.test_trackers import TINY, train


def test_every_name_is_one_of_lightning():
    assert all(issubclass(getattr(pl.callbacks, name), pl.Callback) for name in CALLBACKS)


def test_callbacks_of_lightning_take_part(tmp_path):
    extra = {
        "LearningRateMonitor": {},
        "EarlyStopping": {"monitor": "loss", "patience": 1, "min_delta": 1e3},
    }
    run = train(tmp_path / "run", callbacks={"extra": extra}, trainer={"max_epochs": 5})
    rows = read_metrics(run.out / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"], "nothing falls by 1,000: stopped"
    config, _ = RunFolder(run.out).load_config()
    assert config.callbacks.extra == extra


WRONG = {
    "{StochasticWeightAveragin:{swa_lrs:0.1}}": "did you mean 'StochasticWeightAveraging'",
    "{ModelCheckpoint:{dirpath:/tmp}}": "unknown callback in callbacks.extra 'ModelCheckpoint'",
    "{Timer:1}": "callbacks.extra.Timer holds arguments",
    "[Timer]": "callbacks.extra holds keys of its own",
    "{Timer:{duration:{a:1}}}": "callbacks.extra.Timer.duration needs a number, a text",
}


@pytest.mark.parametrize("value", WRONG)
def test_what_is_not_a_callback_of_lightning(value):
    for command in ("pretrain", "supervised"):
        with pytest.raises(ConfigError) as caught:
            compose(command, [f"callbacks.extra={value}"])
        assert WRONG[value] in str(caught.value)


def test_a_single_argument_may_be_set():
    config, _ = compose("pretrain", ["callbacks.extra.Timer.duration='00:01:00:00'"])
    assert config.callbacks.extra == {"Timer": {"duration": "00:01:00:00"}}
    with pytest.raises(ConfigError, match=r"unknown key 'callbacks\.extr\.Timer"):
        compose("pretrain", ["callbacks.extr.Timer.duration=1"])


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"Timer": {"durations": 1}}, "Timer.*durations"),
        ({"EarlyStopping": {"monitor": "nothing"}}, "EarlyStopping.*nothing"),
        ({"StochasticWeightAveraging": {"swa_lrs": "high"}}, "swa_lrs"),
    ],
)
def test_an_argument_that_lightning_refuses_is_told(extra, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        train(tmp_path / "run", **{"callbacks.extra": extra})


SAID = {
    "another class": ("builtins.open: {file: witness, mode: w}", "unknown callback"),
    "a path to a class": ("pytorch_lightning.callbacks.Timer: {}", "unknown callback"),
    "a target": ("_target_: builtins.open", "_target_ is builtins.open, where nothing is built"),
    "a target inside": ("Timer: {_target_: builtins.open}", "Timer._target_ needs"),
    "an interpolation": ("Timer: {duration: '${oc.env:HOME}'}", "is ${oc.env:HOME}"),
}


@pytest.mark.parametrize("what", SAID)
def test_a_run_folder_names_no_other_code(what, tmp_path):
    text, sentence = SAID[what]
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.create(*compose("pretrain", [f"{k}={v}" for k, v in TINY.items()]))
    said = folder.config.read_text()
    callbacks = said.index("callbacks:\n")  # trainer.extra comes before it, or after
    at = said.index("  extra: {}\n", callbacks)
    written = said[:at] + said[at:].replace("  extra: {}\n", f"  extra:\n    {text}\n", 1)
    folder.config.write_text(written)
    with pytest.raises(CheckpointError) as caught:
        ssl_samix.pretrain(resume=folder.path)
    assert sentence in str(caught.value)
