"""Choices of a user's own, outside the package: the page about them, and what is refused."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

import ssl_samix
from eval_protocols.measures import view_maker
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config import compose as composing
from ssl_samix.config.compose import check, compose, groups
from ssl_samix.errors import ConfigError, UserError
from ssl_samix.evaluation.request import parse_protocol
from ssl_samix.models.backbone import Backbone
from tests.conftest import recipe, samix_here
from tests.test_old_runs import OLD

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text("utf-8")
SMALL = [
    "data.image_size=8", "data.limit=64", "data.batch_size=32", "backbone.width=4",
    "trainer.max_epochs=1", "callbacks.pictures.rows=2",
]  # fmt: skip


def block(language):
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return text


COMMANDS = [shlex.split(line)[1:] for line in block("bash").splitlines()]


@pytest.fixture(autouse=True)
def _forgets(monkeypatch):
    """What a process admits and imports is not there in the next test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(composing, "_own_classes", set())
    before = set(sys.modules)
    yield
    for name in {"align_uniform", "own"} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the page, in mycfg."""
    home = tmp_path / "mycfg"
    (home / "method").mkdir(parents=True)
    (home / "method" / "align_uniform.yaml").write_text(block("yaml"))
    (home / "align_uniform.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    return home


def put(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_the_example_is_short():
    assert sum(len(block(kind).splitlines()) for kind in ("yaml", "python", "bash")) <= 60


def test_the_commands_of_the_page(folder, tmp_path, fails):
    pretrain, knn, resume = COMMANDS
    samix_here(*pretrain, *SMALL, cwd=tmp_path)
    run = RunFolder("runs/own")
    said = yaml.safe_load(run.config.read_text())
    assert said["choices"]["method"] == "align_uniform"
    assert (said["choices"]["views"], said["choices"]["mixup"]) == ("simclr", "samix")
    assert said["method"] == {
        "_target_": "align_uniform.AlignUniform", "output_dim": 64, "weight": 0.5,
    }  # fmt: skip
    # In a process that has not been told of the folder, the class is not there.
    composing._own_classes.clear()
    samix_here(*knn, "k=[5]", cwd=tmp_path)
    assert (tmp_path / "runs" / "own" / "results.csv").exists()
    assert "align_uniform" in samix_here("runs", cwd=tmp_path)
    again = ("pretrain", "resume=runs/own", "trainer.max_epochs=2")
    sentence = "give the folder that holds method/align_uniform.yaml, config_dir=<folder>"
    assert sentence in fails(*again)
    printed = samix_here(*[w.replace("=40", "=2") for w in resume], cwd=tmp_path)
    assert "epoch 2/2" in printed
    assert "is finished after 2 epochs and trainer.max_epochs=1" in fails(
        *pretrain, *SMALL, "trainer.max_epochs=1"
    )


def test_the_loss_has_no_parent_among_the_negatives(folder):
    sys.path.append(str(folder))
    from align_uniform import AlignUniform

    backbone = Backbone("resnet18", image_size=16, width=4)
    method = AlignUniform(backbone, output_dim=8, weight=1.0, optimizer=recipe())
    target = torch.nn.functional.normalize(torch.randn(6, 8), dim=1).requires_grad_()
    parents = torch.tensor([[0, 1]])
    loss = method.pair_loss(target[:1].detach(), target, parents)
    assert loss.shape == (1, 2)
    (gradient,) = torch.autograd.grad(loss[0, 0], target)
    assert (gradient[1] == 0).all(), "the other parent"
    assert (gradient[2:] != 0).any(dim=1).all()


def test_python_takes_the_folder_too(folder):
    run = ssl_samix.pretrain(
        method="align_uniform", config_dir=folder, out="run", mixup="none",
        trainer={"max_epochs": 1}, backbone={"width": 4},
        **{"data.limit": 64, "data.batch_size": 32, "data.image_size": 8},
    )  # fmt: skip
    assert run.metrics["epoch"] == 0


def test_views_mixups_and_data_sets_of_ones_own(folder):
    views = (composing.CONFIG_DIR / "views" / "simclr.yaml").read_text("utf-8")
    data = (composing.CONFIG_DIR / "data" / "folder.yaml").read_text("utf-8")
    put(folder, "views/align_uniform.yaml", views.replace("grayscale: 0.2", "grayscale: 0.3"))
    put(folder, "data/shelf.yaml", data.replace("root: null", "root: shelf"))
    put(folder, "mixup/soft.yaml", "defaults: [mixup, _self_]\nalpha: 4.0\n")
    words = ["config_dir=mycfg", "method=align_uniform", "data=shelf", "mixup=soft"]
    config, choices = compose("pretrain", words)
    assert choices["views"] == "align_uniform"
    assert config.views.a.grayscale == 0.3
    assert (config.data.name, config.data.root) == ("folder", "shelf")
    assert (config.mixup.alpha, config.mixup.weight) == (4.0, 1.0)
    assert "shelf" in groups("knn", "mycfg")["data"]
    assert len(check("pretrain", [*words[:1], "method=align_uniform,simclr", "seed=0,1"])) == 4


def test_evaluation_knows_the_data_and_asks_for_the_views(folder, tmp_path):
    views = (composing.CONFIG_DIR / "views" / "byol.yaml").read_text("utf-8")
    data = (composing.CONFIG_DIR / "data" / "folder.yaml").read_text("utf-8")
    put(folder, "views/glance.yaml", views)
    put(folder, "data/shelf.yaml", data.replace("root: null", "root: shelf"))
    (tmp_path / "shelf").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "shelf" / "a.png")
    run = RunFolder(shutil.copytree(OLD, tmp_path / "run"))
    config, choices = compose("pretrain", ["config_dir=mycfg", "data=shelf", "views=glance"])
    run.create(config, choices)
    plainly = parse_protocol("measures", ["run=run"])
    assert (plainly.data, plainly.config.data.root) == ("folder", str(tmp_path / "shelf"))
    task = SimpleNamespace(encoder=SimpleNamespace(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3))
    with pytest.raises(ConfigError, match=r"views=glance of your own: give the folder that holds"):
        view_maker(plainly, task)
    told = parse_protocol("measures", ["run=run", "config_dir=mycfg"])
    assert (told.data, told.config.data.root) == ("shelf", str(tmp_path / "shelf"))
    assert "byol" in view_maker(told, task)[0]


REFUSED = {
    "an unknown name": ([], {}, "unknown method 'mine'"),
    "no folder": (["config_dir=nowhere"], {}, "config_dir=nowhere is not a folder"),
    "no choices": (["config_dir=empty"], {"empty/notes.txt": ""}, "has no <group>/<name>.yaml"),
    "a typo": (
        ["config_dir=mycfg", "method=align_unifrom"], {}, "did you mean 'align_uniform'?",
    ),
    "a name that is taken": (
        ["config_dir=mycfg"], {"mycfg/method/moco.yaml": "a: 1"},
        "mycfg/method/moco.yaml has the name of one of ssl_samix's own files: rename it",
    ),
    "no module": (
        ["config_dir=mycfg", "method=own"], {"mycfg/method/own.yaml": "_target_: own.Own"},
        "own.Own, named by a file in config_dir=mycfg, cannot be imported: there is no module own",
    ),
    "no such class": (
        ["config_dir=mycfg", "method=own"],
        {"mycfg/method/own.yaml": "_target_: own.Own", "mycfg/own.py": "class Owm: ..."},
        "own.py 'Own': did you mean 'Owm'?",
    ),
    "a module that is not Python": (
        ["config_dir=mycfg", "method=own"],
        {"mycfg/method/own.yaml": "_target_: own.Own", "mycfg/own.py": "class Own"},
        "own.py, line 1 is not Python",
    ),
    "a file that is not YAML": (
        ["config_dir=mycfg", "method=own"], {"mycfg/method/own.yaml": "a: [1"}, "own.yaml",
    ),
    "a file that is a list": (
        ["config_dir=mycfg", "method=own"], {"mycfg/method/own.yaml": "- a"},
        "method/own.yaml in config_dir has no _target_",
    ),
    "Hydra's flag": (["--config-dir", "mycfg"], {}, "write config_dir=<folder"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_sentence(what, folder, fails, tmp_path):
    words, files, sentence = REFUSED[what]
    for name, text in files.items():
        put(tmp_path, name, text)
    given = words if any("method=" in word for word in words) else [*words, "method=mine"]
    assert sentence in fails("pretrain", *given)


def test_it_is_told_before_torch_is_imported(folder, tmp_path):
    put(folder, "method/own.yaml", "_target_: own.Own")
    code = (
        "import sys\nfrom ssl_samix.cli.main import main\n"
        "try:\n    main(['pretrain', 'config_dir=mycfg', 'method=own'])\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert shown.stdout.split() == ["2", "False"]


HOSTILE = "_target_: own.Own\n"
WITNESS = "open('witness', 'w').close()\n\n\nclass Own: ...\n"


@pytest.fixture
def hostile(tmp_path, folder):
    """A run folder that says where its own code is, and brings it."""
    run = tmp_path / "run"
    put(run, "method/own.yaml", HOSTILE)
    put(run, "own.py", WITNESS)
    put(tmp_path, "own.py", WITNESS)
    config, choices = compose("pretrain", ["mixup=none", *SMALL])
    RunFolder(run).create(config, {**choices, "method": "own"})
    said = yaml.safe_load((run / "config.yaml").read_text())
    said |= {
        "config_dir": str(run),
        "method": {"_target_": "own.Own", "a": {"_target_": "own.Own"}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(said))
    return run


def test_a_run_folder_brings_no_code(hostile, fails, tmp_path):
    config, choices = RunFolder(hostile).load_config()
    assert choices["method"] == "own"
    assert config.method == {"a": {}}, "values without classes"
    for words in (["resume=run"], ["resume=run", "config_dir=mycfg"]):
        assert "config_dir=<folder>" in fails("pretrain", *words)
    assert "run holds no encoder.safetensors" in fails("knn", "run=run")
    samix_here("compare", "run", cwd=tmp_path)
    with pytest.raises(ConfigError, match=r"own\.Own is not built"):
        composing.build(OmegaConf.create({"_target_": "own.Own"}))
    assert not (tmp_path / "witness").exists()


def test_values_of_unknown_choices_are_still_values(hostile):
    said = yaml.safe_load((hostile / "config.yaml").read_text())
    for part in ("${oc.env:HOME}", 5, ["x"]):
        wrong = {**said, "method": {"a": part} if isinstance(part, str) else part}
        (hostile / "config.yaml").write_text(yaml.safe_dump(wrong))
        with pytest.raises(UserError, match=r"config\.yaml is damaged or not"):
            RunFolder(hostile).load_config()
