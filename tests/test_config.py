"""Configurations: every choice composes and builds, every mistake has a sentence."""

from __future__ import annotations

import re

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from ssl_samix.cli.commands import SUBCOMMANDS, Subcommand
from ssl_samix.config.compose import (
    CONFIG_DIR,
    check,
    compose,
    dotted,
    groups,
    in_hydras_grammar,
    parse,
    plain,
    quote_paths,
)
from ssl_samix.config.key_types import SET_HERE, TYPES
from ssl_samix.errors import ConfigError
from ssl_samix.trainer import build_trainer

PRETRAIN = groups("pretrain")
CHOICES = [(group, name) for group, names in PRETRAIN.items() for name in names]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_and_names_a_class_that_exists(group, name):
    config, choices = compose("pretrain", [f"{group}={name}"])
    assert choices[group] == name
    targets = [v for k, v in _flat(OmegaConf.to_container(config)) if k == "_target_"]
    assert targets
    for target in targets:
        assert callable(get_object(target))


def _flat(node):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value


def test_the_defaults():
    config, choices = compose("pretrain", [])
    assert choices["method"] == "simclr"
    assert (choices["data"], choices["mixup"]) == ("digits", "samix")
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
        (["trainer.max_epochs=ten"], "needs a whole number or auto, got 'ten'"),
        (["trainer.max_epochs=1.5"], "needs a whole number or auto, got '1.5'"),
        (["optimizer.lr=high"], "needs a number or auto, got 'high'"),
        (["data.flip=perhaps"], "needs true or false, got 'perhaps'"),
        (["mixup=null"], "unknown mixup"),
        (["callbacks.knn=null"], "holds keys of its own"),
        (["lr=0.1"], "unknown key 'lr': did you mean 'mixup.lr', 'optimizer.lr' or"),
        (["max_epoch=5"], "did you mean 'trainer.max_epochs', 'optimizer.warmup_epochs' or"),
        (
            ["data=cifar11"],
            "is neither a folder nor a data set: did you mean 'cifar10'",
        ),
        (
            ["trainer.extra=5"],
            "trainer.extra holds keys of its own: write trainer.extra.<key>",
        ),
        (["trainer.extra.deterministc=1"], "Trainer 'deterministc': did you mean 'deterministic'"),
        (["trainer.extra={max_stepps:1}"], "did you mean 'max_steps'"),
        (["trainer.extra.max_epochs=3"], "cannot be set: write trainer.max_epochs=<value>"),
        (["trainer.extra.default_root_dir=x"], "cannot be set: write out=<value>"),
        (["trainer.extra.plugins=x"], "ssl_samix sets this argument itself"),
        (["trainer.extra.profiler={a:1}"], "trainer.extra.profiler needs a number, a text, or a"),
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


@pytest.mark.parametrize(
    ("command", "word", "sentence"),
    [
        ("knn", "k=[2.5]", "k needs a list of whole numbers, got '[2.5]'"),
        ("knn", "image_size=16.5", "image_size needs a whole number or null, got '16.5'"),
        ("knn", "model=5", "model needs a name or null, got '5'"),
        ("knn", "mean=red", "mean needs a list of numbers or null, got 'red'"),
        ("semi", "per_class=2.5", "per_class needs a whole number or null, got '2.5'"),
        ("pretrain", "data.limit=100.5", "data.limit needs a whole number or null"),
        ("pretrain", "data.workers=0.5", "data.workers needs a whole number or auto, got '0.5'"),
        ("pretrain", "callbacks.knn.k=[2.5]", "callbacks.knn.k needs a list of whole numbers"),
        ("pretrain", "callbacks.knn={k:[2.5]}", "callbacks.knn.k needs a list of whole numbers"),
        ("pretrain", "callbacks.knn={kk:2}", "unknown key 'callbacks.knn.kk': did you mean"),
        ("pretrain", "mixup.mask=null", "mixup.mask needs a name, got 'null'"),
        ("pretrain", "seed=${data.flip}", "seed needs a whole number, got 'false'"),
        ("pretrain", "optimizer.lr=inf", "optimizer.lr needs a number or auto, got 'inf'"),
        ("pretrain", "data.root=???", "data.root needs a path or null, got '???'"),
        ("pretrain", "out=", "out needs a path or null, got ''"),
        ("pretrain", f"seed={2**32}", f"seed must be at most {2**32 - 1}, got {2**32}"),
        ("pretrain", f"trainer.max_epochs={2**63}", f"max_epochs must be at most {2**63 - 1}"),
    ],
)
def test_a_value_has_the_type_of_its_key(command, word, sentence):
    data = ["data=digits"] if "data" in groups(command) else []
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        compose(command, [*data, *quote_paths([word])])


@pytest.mark.parametrize(
    ("command", "word", "expected"),
    [
        ("knn", "k=5", [5]),
        ("knn", "temperature=1", [1]),
        ("semi", "finetune.backbone_lr=0.1", [0.1]),
        ("semi", "finetune.head_factor=0.5", [0.5]),
        ("linear", "preset.lr=0.1", [0.1]),
        ("show_mixing", "lams=0.5", [0.5]),
        ("pretrain", "callbacks.knn.k=20", [20]),
    ],
)
def test_one_value_is_a_list_of_one(command, word, expected):
    choices = {"linear": ["preset=moco"]}.get(command, [])
    config, _ = compose(command, [*choices, word])
    assert OmegaConf.select(config, word.partition("=")[0]) == expected


def test_every_key_has_a_type():
    """Of a default that is null or auto nothing follows: the table must say it."""
    for command in SUBCOMMANDS.values():
        if isinstance(command, Subcommand):
            for key, value in _defaults(command.config):
                assert value not in (None, "auto") or key in TYPES, key


def _defaults(command):
    for group, names in [*groups(command).items(), ("", [""])]:
        for name in names if group != "experiment" else []:
            folder, prefix = (CONFIG_DIR / group, f"{group}.") if group else (CONFIG_DIR, "")
            read = OmegaConf.load(folder / f"{name or command}.yaml")
            whole = OmegaConf.to_container(read) or {}
            whole = {k: v for k, v in whole.items() if k not in ("hydra", "defaults")}
            for key, value in dotted(whole).items():
                yield prefix + key, value


def test_whole_numbers_are_numbers_and_null_stays_open():
    config, _ = compose("pretrain", ["optimizer.lr=1", "data.limit=500", "data.image_size=24"])
    assert (config.optimizer.lr, config.data.limit, config.data.image_size) == (1, 500, 24)


def test_every_combination_of_a_sweep_is_checked():
    assert len(check("pretrain", ["method=moco,simclr,byol", "seed=0,1"])) == 6
    with pytest.raises(ConfigError, match="did you mean 'simclr'"):
        check("pretrain", ["method=moco,simclrr", "seed=0,1"])


def test_an_unknown_key_is_told_in_a_line():
    with pytest.raises(ConfigError) as caught:
        compose("pretrain", ["zzz=1"])
    assert str(caught.value).count("'") == 8  # it, and three others
    assert len(str(caught.value)) < 150


def test_any_argument_of_lightnings_trainer():
    config, _ = compose("pretrain", ["trainer.extra.limit_train_batches=2"])
    assert config.trainer.extra == {"limit_train_batches": 2}
    assert compose("supervised", ["trainer.extra={benchmark:true}"])[0].trainer.extra.benchmark
    assert compose("pretrain", [])[0].trainer.extra == {}


def test_arguments_that_the_package_sets_are_listed(monkeypatch):
    given = {}
    monkeypatch.setattr("pytorch_lightning.Trainer", lambda **arguments: given.update(arguments))
    settings = plain(compose("pretrain", ["trainer.max_epochs=1"])[0].trainer)
    settings |= {"extra": {"benchmark": True}, "wants_sync_batchnorm": False}
    del settings["_target_"]
    build_trainer(**settings, callbacks=[], logger=None, plugins=[], default_root_dir="")
    assert given.pop("benchmark") is True
    assert set(given) == set(SET_HERE)


def test_a_folder_may_be_given_as_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "a b, c", "digits", "d,e"):
        (tmp_path / name).mkdir()
    for typed in ("photos", "a b, c", str(tmp_path / "photos"), "'a b, c'", "d,e"):
        for sweeping in (False, True):
            config = check("pretrain", quote_paths([f"data={typed}", "seed=1"], sweeping))[0]
            assert (config.data.name, config.data.root) == ("folder", typed.strip("'"))
    assert quote_paths(["data=digits"]) == ["data=digits"]
    swept = check("pretrain", quote_paths([f"data=photos,{tmp_path}"], sweeping=True))
    assert [config.data.root for config in swept] == ["photos", str(tmp_path)]
    with pytest.raises(ConfigError, match="folders and data sets: sweep over one of the two"):
        quote_paths(["data=photos,digits"], sweeping=True)
    with pytest.raises(ConfigError, match="data=nowhere is neither a folder nor a data set"):
        quote_paths(["data=photos,nowhere"], sweeping=True)
    with pytest.raises(ConfigError, match=r"is a folder, and so is data.root: give one"):
        quote_paths(["data=photos", "data.root=x"])


PATHS = [
    "photos", "my photos", "a,b", "k=v", "jörg's (1)", "x#y&z", "[x]{y}", "back\\slash",
    "quote\\'", "end\\", "123", "null photos", "~/photos", 'say "x"',
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_any_path_can_be_typed_and_passed(path):
    for words in (quote_paths([f"data.root={path}"]), [f"data.root={in_hydras_grammar(path)}"]):
        assert parse(words)[0].value() == path
        assert compose("pretrain", ["data=folder", *words])[0].data.root == path


def test_a_sweep_over_folders_splits_at_commas_but_in_names_that_exist(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert quote_paths(["data.root=a,b"], sweeping=True) == ["data.root='a','b'"]
    whole = quote_paths([f"data.root={tmp_path}/a,b"], sweeping=True)
    assert parse(whole)[0].value() == f"{tmp_path}/a,b"
    assert quote_paths(["out=null", "out='x y'", "seed=0,1"], True) == [
        "out=null", "out='x y'", "seed=0,1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "word"),
    [(3, "3"), (0.1, "0.1"), (True, "true"), (None, "null"), ([1, "a"], "[1,'a']"),
     ({"patch_size": 4}, "{patch_size:4}")],
)  # fmt: skip
def test_python_values_in_hydras_grammar(value, word):
    assert in_hydras_grammar(value) == word


def test_what_no_configuration_holds():
    with pytest.raises(ConfigError, match="cannot hold a object"):
        in_hydras_grammar(object())


def test_options_of_a_library_take_any_key():
    words = ["backbone=any", "backbone.options={patch_size:4,depth:2}"]
    assert compose("pretrain", words)[0].backbone.options == {"patch_size": 4, "depth": 2}
    assert check("pretrain", words)[0].backbone.options.depth == 2
    with pytest.raises(ConfigError, match="holds keys of its own"):
        compose("pretrain", ["backbone=any", "backbone.options=4"])
