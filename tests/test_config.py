"""Configurations: every choice composes and builds, every mistake has a sentence."""

from __future__ import annotations

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from ssl_samix.config import check, compose, groups
from ssl_samix.errors import ConfigError

CHOICES = [(group, name) for group, names in groups().items() for name in names]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_and_names_a_class_that_exists(group, name):
    config, choices = compose("pretrain", [f"{group}={name}"])
    assert choices[group] == name
    targets = [v for k, v in _flat(OmegaConf.to_container(config)) if k == "_target_"]
    assert targets
    for target in targets:
        if not target.endswith("build_trainer"):
            get_class(target)


def _flat(node):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value


def test_the_defaults():
    config, choices = compose("pretrain", [])
    assert choices["method"] == "moco"
    assert (choices["data"], choices["mixup"]) == ("digits", "none")
    assert config.backbone.width == 16
    assert OmegaConf.is_struct(config)


def test_views_follow_the_method_unless_chosen():
    assert compose("pretrain", ["method=byol"])[1]["views"] == "byol"
    assert compose("pretrain", ["method=byol", "views=moco"])[1]["views"] == "moco"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=moko"], "unknown method 'moko': did you mean 'moco'"),
        (["methd=moco"], "unknown key 'methd': did you mean 'method'"),
        (["backbone=resnet19"], "unknown backbone 'resnet19': did you mean 'resnet1"),
        (["trainer.max_epoch=3"], "did you mean 'trainer.max_epochs'"),
        (["optimizer.weight_deacy=0"], "did you mean 'optimizer.weight_decay'"),
        (["method.queue_size=8", "method=simclr"], "unknown key 'method.queue_size'"),
        (["data.zzz=1"], "unknown key 'data.zzz'"),
        (["trainer.max_epochs=ten"], "needs a whole number, got 'ten'"),
        (["trainer.max_epochs=1.5"], "needs a whole number, got '1.5'"),
        (["optimizer.lr=high"], "needs a number, got 'high'"),
        (["data.flip=perhaps"], "needs true or false, got 'perhaps'"),
        (["+foo=1"], "neither added nor removed"),
        (["~mixup"], "neither added nor removed"),
        (["foo"], "not of the form key=value"),
        (["a=[1,"], "not of the form key=value"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_nearest_name(words, sentence):
    with pytest.raises(ConfigError) as caught:
        compose("pretrain", words)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_numbers_and_null_stays_open():
    config, _ = compose("pretrain", ["optimizer.lr=1", "data.limit=500", "data.image_size=24"])
    assert (config.optimizer.lr, config.data.limit, config.data.image_size) == (1, 500, 24)


def test_every_combination_of_a_sweep_is_checked():
    assert len(check("pretrain", ["method=moco,simclr,byol", "seed=0,1"])) == 6
    with pytest.raises(ConfigError, match="did you mean 'simclr'"):
        check("pretrain", ["method=moco,simclrr", "seed=0,1"])
