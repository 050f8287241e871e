"""Run folders and files from somebody else are data: nothing in them is run, fetched or resolved.

Every ``_target_`` here would make the file ``witness``, and so would every pickle.
"""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file

import ssl_samix
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.cli.main import main
from ssl_samix.config.compose import build, compose, parse, plain
from ssl_samix.errors import CheckpointError, ConfigError, UserError
from ssl_samix.evaluation.results import append_rows
from tests.test_old_runs import OLD

TOP1 = {
    "time": "2026-01-01 00:00:00 +0000", "protocol": "knn", "variant": "chosen", "weights": "own",
    "data": "digits", "test_images": 359, "seed": 0, "data_fingerprint": "d", "settings": "{}",
    "folder": "results/1", "encoder": "e", "top1": 90,
}  # fmt: skip
OPENS = {"_target_": "builtins.open", "file": "{witness}", "mode": "w"}


def inside(key, value):
    """Put a value at a dotted key of a configuration."""

    def change(config):
        node = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        both = isinstance(value, dict) and isinstance(node.get(last), dict)
        node[last] = {**node[last], **value} if both else value

    return change


def without(key):
    return lambda config: config.pop(key)


# What a file says -> what the one sentence says of it.
CHANGES = {
    "another class": (inside("data", OPENS), "data._target_ is builtins.open, where ssl_samix."),
    "another optimizer": (
        inside("optimizer.optimizer", OPENS),
        "optimizer.optimizer._target_ is builtins.open, where torch.optim.SGD is built",
    ),
    "a class for plain keys": (
        inside("views.a", OPENS), "views.a._target_ is builtins.open, where nothing is built",
    ),
    "a class for a value": (inside("data.root", OPENS), "data.root needs a value"),
    "a class in a list": (inside("mixup.during", [OPENS, 1.0]), "mixup.during needs a value"),
    "a class for a new key": (inside("data.more", OPENS), "unknown key 'data.more'"),
    "a class among options": (
        inside("backbone.options", OPENS), "backbone.options._target_ is builtins.open",
    ),
    "arguments": (inside("data", {"_args_": ["x"]}), "data._args_ is ['x']"),
    "a partial": (inside("data", {"_partial_": True}), "data._partial_ is True"),
    "a file of weights": (
        inside("backbone.options", {"checkpoint_path": "{witness}"}),
        "backbone.options cannot have checkpoint_path",
    ),
    "an environment variable": (
        inside("data.root", "${oc.env:HOME}"), "data.root is ${oc.env:HOME}",
    ),
    "one in a list": (inside("mixup.during", ["${seed}", 1.0]), "mixup.during is ${seed}"),
    "a gap": (inside("data.root", "???"), "data.root is ???"),
    "an unknown key": (inside("method.temprature", 1.0), "did you mean 'method.temperature'"),
    "an unknown part": (inside("metod", {}), "did you mean 'method'"),
    "keys for a value": (inside("seed", {"a": 1}), "seed needs a value"),
    "a value for keys": (inside("method", None), "method holds keys of its own"),
    "a text for a number": (inside("data.batch_size", "many"), "batch_size needs a whole number"),
    "a number for a path": (inside("data.root", 5), "data.root needs a path"),
    "an unknown choice": (inside("choices.method", "simcrl"), "did you mean 'simclr'"),
    "a list for a choice": (inside("choices.method", ["simclr"]), "unknown method"),
    "an unknown group": (inside("choices.hydra", "x"), "unknown group 'hydra'"),
    "an unnamed part": (
        lambda config: config["choices"].pop("optimizer"), "it has no choices.optimizer",
    ),
    "no choices": (without("choices"), "it has no choices"),
    "no data": (without("data"), "it has no data"),
    "no method": (without("method"), "it has no method"),
    "no seed": (without("seed"), "it has no seed"),
    "data without a name": (lambda config: config["data"].pop("name"), "it has no data.name"),
}  # fmt: skip
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
TEXTS = {
    "aliases in aliases": (LAUGHS, "it has an anchor or alias in line 1"),
    "aliases in a text": (json.dumps(LAUGHS), "it does not consist of keys and values"),
    "a tag": ("a: !!python/object/apply:os.system [ls]", "it has a tag in line 1"),
    "depth": ("a: " + "[" * 3000 + "]" * 3000, "it is nested too deeply in line 1"),
    "a large file": ("a: 1\n#" + "x" * 70_000, "it is too large"),
    "nothing": ("", "it does not consist of keys and values"),
    "a list": ("- a\n- b", "it does not consist of keys and values"),
    "a value": ("5", "it does not consist of keys and values"),
    "half a list": ("- [", "damaged"),
    "one key twice": ("a: 1\na: 2", "damaged"),
    "two documents": ("a: 1\n---\nb: 1", "damaged"),
    "other characters": ("a: \0", "damaged"),
}


def named(value, witness):
    """Fill in where the witness would be."""
    if isinstance(value, dict):
        return {key: named(part, witness) for key, part in value.items()}
    if isinstance(value, list):
        return [named(part, witness) for part in value]
    return value.replace("{witness}", str(witness)) if isinstance(value, str) else value


@pytest.fixture
def witness(tmp_path):
    return tmp_path / "witness"


@pytest.fixture
def folder(tmp_path):
    """A run folder of pretraining, with results."""
    run = shutil.copytree(OLD, tmp_path / "run")
    append_rows(run / "results.csv", [TOP1])
    return run


@pytest.fixture
def spoil(witness):
    """Change what a run's configuration says."""

    def change(run, how):
        config = yaml.safe_load((run / "config.yaml").read_text())
        how(config)
        (run / "config.yaml").write_text(yaml.safe_dump(named(config, witness)))

    return change


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Run the command in this process and return what it prints, which is one line."""

    def run(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["samix", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        error = capsys.readouterr().err
        assert caught.value.code == 2, error
        assert error.startswith("samix: "), error
        assert error.count("\n") == 1, error
        return error

    return run


@pytest.mark.parametrize("what", CHANGES)
def test_a_configuration_gives_values_alone(what, folder, spoil, witness):
    how, sentence = CHANGES[what]
    spoil(folder, how)
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged or not") as caught:
        RunFolder(folder).load_config()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not witness.exists()


@pytest.mark.parametrize("what", TEXTS)
def test_a_configuration_is_plain_yaml(what, folder):
    text, sentence = TEXTS[what]
    (folder / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged") as caught:
        RunFolder(folder).load_config()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


READERS = {
    "pretrain": ["pretrain", "resume=run"],
    "pretrain out": ["pretrain", "out=run"],
    "linear": ["linear", "run=run"],
    "knn": ["knn", "run=run"],
    "knn of a file": ["knn", "run=run/last.ckpt"],
    "semi": ["semi", "run=run"],
    "measures": ["measures", "run=run"],
    "measures of other data": ["measures", "run=run", "data=digits"],
    "robustness": ["robustness", "run=run"],
    "embed": ["embed", "run=run"],
    "show-mixing": ["show-mixing", "run=run"],
    "compare": ["compare", "run"],
    "push": ["push", "run=run", "repo=ada/run"],
}  # fmt: skip


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_no_command_builds_what_a_configuration_names(words, folder, spoil, refused, witness):
    spoil(folder, inside("views", OPENS))
    assert "views._target_ is builtins.open" in refused(*words)
    assert not witness.exists()
    (folder / "config.yaml").write_text(LAUGHS)
    assert "it has an anchor or alias" in refused(*words)


def test_nor_does_supervised_training(tmp_path, spoil, refused, witness):
    run = tmp_path / "run"
    run.mkdir()
    RunFolder(run).create(*compose("supervised", []))
    spoil(run, inside("classifier", OPENS))
    assert "classifier._target_ is builtins.open" in refused("supervised", "resume=run")
    assert not witness.exists()


def test_a_class_that_has_moved_is_the_installed_one(folder, spoil):
    """It may not even be there, or be another module's."""
    for moved in ("ssl_samix.older.place.SAMixObjective", "ssl_samix.config.compose.os.system"):
        spoil(folder, inside("mixup._target_", moved))
        config, _ = RunFolder(folder).load_config()
        assert config.mixup._target_ == "ssl_samix.mixup.samix_objective.SAMixObjective"
        assert config.mixup.eta == 0.5


def test_a_run_reads_what_it_wrote(tmp_path):
    """Options and lists that a recipe sets, and a text that looks like a number."""
    words = ["experiment=imagenet/vit_small", "data.root='1e3'", "init='null'"]
    config, choices = compose("supervised", words)
    RunFolder(tmp_path).create(config, choices)
    again, theirs = RunFolder(tmp_path).load_config()
    assert plain(again) == plain(config)
    assert theirs == choices
    assert again.backbone.options == {"patch_size": 16, "drop_path_rate": 0.1}


@pytest.mark.parametrize(
    "word",
    [
        "data.limit={_target_:builtins.open,file:witness,mode:w}",
        "data={_target_:builtins.open,file:witness,mode:w}",
        "data._target_=os.system",
        "optimizer.optimizer._args_=[1]",
        "backbone.options={_target_:os.system}",
        "backbone.options={a:[{_target_:os.system}]}",
        "mixup.during=[{_target_:os.system},1]",
        "hydra.sweeper._target_=os.system",
    ],
)
def test_no_word_names_code(word, refused, tmp_path):
    assert "cannot be set, the choices say what is built" in refused("pretrain", word)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("data.root={a:1}", "data.root needs a value or a list of values"),
        ("mixup.during=[{a:1},1]", "mixup.during needs a value or a list of values"),
        ("callbacks.knn={temprature:1}", "did you mean 'callbacks.knn.temperature'"),
        ("data.name=[digits]", "data.name needs a name"),
        ("backbone.options={a:{b:1}}", "backbone.options.a needs a number, a text, or a list"),
        ("backbone.options={checkpoint_path:x}", "backbone.options cannot have checkpoint_path"),
        ("backbone.options={pretrained_cfg:x}", "backbone.options cannot have pretrained_cfg"),
    ],
)
def test_keys_where_a_value_belongs(word, sentence):
    with pytest.raises(ConfigError) as caught:
        compose("pretrain", ["backbone=any", word])
    assert sentence in str(caught.value)


def test_keys_of_a_part_are_set_together():
    config, _ = compose("pretrain", ["optimizer.optimizer={momentum:0.5}"])
    assert (config.optimizer.optimizer.momentum, config.optimizer.optimizer.fused) == (0.5, True)
    assert parse(["out=a/_target_/b"])[0].value() == "a/_target_/b"  # a path is no key


@pytest.mark.parametrize(
    "node",
    [
        OPENS,
        {"_target_": "ssl_samix.config.compose.os.mkdir", "path": "{witness}"},
        {"_target_": "torch.optim.lr_scheduler.math.sqrt"},
        {"_target_": "ssl_samix.data.views.Views", "a": OPENS},
        {"_target_": "ssl_samix.data.views.Views", "a": [OPENS]},
        {"_target_": "${name}", "name": "builtins.open"},
    ],
)
def test_only_installed_classes_are_built(node, witness):
    with pytest.raises(ConfigError, match="is not built: no installed configuration names it"):
        build(OmegaConf.create(named(node, witness)))
    assert not witness.exists()


class Trap:
    """A pickle that leaves a trace when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


VIT = {"name": "vit_tiny_patch16_224", "width": 64, "stem": "standard"}
BACKBONES = {
    "a file": ({**VIT, "options": {"checkpoint_path": "trap.pth"}}, "checkpoint_path"),
    "published weights": ({**VIT, "options": {"pretrained": True}}, "pretrained"),
    "a place of weights": ({**VIT, "options": {"pretrained_cfg": {"file": "trap.pth"}}}, "cfg"),
    "an overlay": ({**VIT, "options": {"pretrained_cfg_overlay": {"url": "x"}}}, "overlay"),
    "a cache": ({**VIT, "options": {"cache_dir": "."}}, "cache_dir"),
    "keys in an option": ({**VIT, "options": {"a": {"b": 1}}}, "backbone.options.a"),
    "options that are none": ({**VIT, "options": "x"}, "backbone.options"),
    "a hub": ({**VIT, "name": "hf-hub:timm/vit_tiny_patch16_224", "options": {}}, "hf-hub:"),
    "a folder": ({**VIT, "name": "local-dir:run", "options": {}}, "local-dir:"),
}


def meta(backbone):
    mixer = {"stage": 3, "settings": {"channels": 192}}
    images = {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    classes = {"classes": ["a", "b"], "method": "supervised"}
    return {"backbone": backbone, "mixer": mixer, **images, **classes, "data": "digits"}


@pytest.fixture
def hostile(tmp_path):
    """Make a run folder whose files all say that their network is this one."""
    torch.save({"state_dict": {"trunk.x": Trap(tmp_path / "witness")}}, tmp_path / "trap.pth")

    def make(backbone):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        shutil.copy(OLD / "config.yaml", run)
        said, one = meta(backbone), torch.zeros(1)
        for name, weight in (
            ("encoder", "trunk.x"), ("mixer", "backbone.trunk.x"), ("classifier", "online.0.x")
        ):  # fmt: skip
            text = {"ssl_samix": json.dumps(said)}
            save_file({weight: one}, run / f"{name}.safetensors", metadata=text)
        names = ["backbone.trunk.x", "twin.module.0.x", "mixing.policy.x", "projector.x"]
        state = {name: one for name in names}
        torch.save({"state_dict": state, "ssl_samix": said}, run / "last.ckpt")
        return run

    return make


@pytest.mark.parametrize("what", BACKBONES)
def test_a_file_names_no_other_weights(what, hostile, witness, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    backbone, sentence = BACKBONES[what]
    run = hostile(backbone)
    loaders = {
        ssl_samix.load_encoder: "encoder", ssl_samix.load_mixer: "mixer",
        ssl_samix.load_classifier: "classifier",
    }  # fmt: skip
    for load, name in loaders.items():
        for file in (run / f"{name}.safetensors", run / "last.ckpt"):
            with pytest.raises(UserError, match=sentence) as caught:
                load(file)
            assert "\n" not in str(caught.value)
    assert not witness.exists()


SMALL = ["data.limit=64", "data.batch_size=32", "backbone.width=4"]
LOADERS = {
    "linear": ["linear", "run=run"],
    "knn": ["knn", "run=run"],
    "semi": ["semi", "run=run"],
    "measures": ["measures", "run=run"],
    "robustness": ["robustness", "run=run"],
    "embed": ["embed", "run=run"],
    "show-mixing": ["show-mixing", "run=run"],
    "export": ["export", "run=run", "format=timm"],
    "init": ["supervised", "init=run", "out=new", *SMALL],
    "mixup.mixer": ["pretrain", "mixup=samix_p", "mixup.mixer=run", "out=new", *SMALL],
}  # fmt: skip


@pytest.mark.parametrize("words", LOADERS.values(), ids=LOADERS)
def test_no_command_loads_what_a_file_names(words, hostile, refused, witness):
    run = hostile(BACKBONES["a file"][0])
    assert "backbone.options cannot have checkpoint_path" in refused(*words)
    for file in run.glob("*.safetensors"):
        file.unlink()
    torch.save({"state_dict": Trap(witness), "ssl_samix": {}}, run / "last.ckpt")
    assert "would run code" in refused(*words)
    assert not witness.exists()


def test_a_checkpoint_that_is_resumed_or_converted_runs_nothing(folder, refused, witness):
    torch.save({"state_dict": Trap(witness), "ssl_samix": {}}, folder / "last.ckpt")
    assert "would run code" in refused("pretrain", "resume=run", "trainer.max_epochs=2")
    assert "would run code" in refused("convert", "openmixup", "run/last.ckpt", "-o", "new")
    assert not witness.exists()


def test_the_text_in_a_converted_checkpoint_cannot_be_endless(tmp_path, refused):
    """Names in names are read as what they stand for; written out these have 2**40 parts."""
    lines = ["a0 = dict(x=1)", *(f"a{i} = [a{i - 1}, a{i - 1}]" for i in range(1, 40))]
    weights = {"backbone_q.conv1.weight": torch.zeros(4, 3, 3, 3)}
    for text in ("\n".join(lines), "a = x" + ".y" * 900):
        torch.save({"state_dict": weights, "meta": {"config": text}}, tmp_path / "file.pth")
        assert "has a configuration that cannot be read" in refused(
            "convert", "openmixup", "file.pth", "-o", "new"
        )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"root": "${oc.env:HOME}"}, "data.root is ${oc.env:HOME}"),
        ({"root": OPENS}, "data.root needs a value"),
        ({"_target_": "os.system"}, "data._target_ is os.system"),
        ({"limit": 10, "_args_": [1]}, "data._args_"),
        (["digits"], "data_settings"),
    ],
)
def test_a_classifiers_data_settings_are_values(settings, sentence, hostile, refused, witness):
    run = hostile({**VIT, "options": {}})
    said = {**meta(VIT), "data_settings": named(settings, witness)}
    text = {"ssl_samix": json.dumps(said)}
    save_file({"linear.0.x": torch.zeros(1)}, run / "classifier.safetensors", metadata=text)
    assert sentence in refused("robustness", "run=run/classifier.safetensors")
    assert not witness.exists()
