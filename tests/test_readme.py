"""Every command and line of code in the README runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssl_samix.cli.commands import SUBCOMMANDS, PlainSubcommand
from ssl_samix.config.compose import check
from tests.conftest import samix_here

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands(text):
    """The lines of all blocks of commands."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.strip().splitlines()]


COMMANDS = commands(README)
PRETRAINING = [line for line in COMMANDS[2:] if line.startswith("samix pretrain")]
(LABELLED,) = (b for b in re.findall(r"```bash\n(.*?)```", README, re.S) if "supervised" in b)
MEASURING = [line for line in COMMANDS[2:] if line not in PRETRAINING and line not in LABELLED]
# fewer digits, and a single try, of what would take minutes
LESS = {"semi": ["data.limit=300", "finetune=barlow_1", "finetune.epochs=1"]}
SMALL = ["trainer.max_epochs=1", "backbone.width=8", "data.batch_size=32"]
PROTOCOLS = commands((ROOT / "docs" / "protocols.md").read_text())
MIXING = commands((ROOT / "docs" / "samix.md").read_text())
QUICK = ("samix pretrain data=folder data.root=photos out=runs/photos", "samix pretrain --help")
# Understood in every run of the tests, and run by ``pytest -m slow``.
SLOW = sorted({*COMMANDS[2:], *PROTOCOLS, *MIXING} - set(QUICK))


@pytest.fixture
def folder(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(300):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(photos / f"{i:02}.jpg")
    return tmp_path


def test_the_set_up_commands_are_those_that_ci_runs():
    assert COMMANDS[0] == "pip install -e . && samix pretrain"
    assert COMMANDS[1] == "pip install -e '.[dev]' && python -m pytest -n auto"
    script = (ROOT / ".ci" / "run").read_text()
    for part in ("-e '.[dev]'", "samix pretrain", "python -m pytest -n"):
        assert part in script


@pytest.mark.parametrize("command", SLOW)
def test_its_keys_and_choices_exist(command):
    samix, name, *words = shlex.split(command, comments=True)
    assert samix == "samix"
    entry = SUBCOMMANDS[name]
    if not isinstance(entry, PlainSubcommand):
        assert check(entry.config, [word for word in words if word != "--multirun"])


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in PRETRAINING],
)
def test_commands(command, folder):
    words = shlex.split(command)
    assert words[:2] == ["samix", "pretrain"]
    small = [] if "--help" in words else [w for w in SMALL if w.split("=")[0] not in command]
    if "data=folder" not in words and small:
        small.append("data.limit=64")
    if "backbone=resnet18" in words:
        small.append("data.image_size=8")  # full width, small images
    samix_here(*words[1:], *small, cwd=folder)


@pytest.mark.slow
def test_commands_with_labels(folder):
    for command in LABELLED.strip().splitlines():
        words = shlex.split(command)
        small = [*SMALL, "data.limit=64"] if words[1] == "supervised" else []
        assert samix_here(*words[1:], *small, cwd=folder).strip(), command
    assert (folder / "runs" / "digits" / "classifier.safetensors").exists()


@pytest.mark.slow
def test_commands_that_measure(folder):
    """The README's and those of the page on protocols, in their order, on one run."""
    pretrain = ["pretrain", "data=folder", "data.root=photos", "out=runs/photos", *SMALL]
    samix_here(*pretrain, cwd=folder)
    for command in dict.fromkeys([*MEASURING, *PROTOCOLS]):
        words = shlex.split(command)
        assert words[0] == "samix"
        out = samix_here(*words[1:], *LESS.get(words[1], []), cwd=folder)
        assert out.strip(), command
    home = folder / "runs" / "photos"
    protocols = {path.name.split("-")[0] for path in (home / "results").iterdir()}
    assert protocols == {"linear", "knn", "semi", "measures", "robustness"}
    assert {"encoder.pt2", "encoder.onnx"} <= {path.name for path in home.iterdir()}


@pytest.mark.slow
def test_commands_of_the_page_on_mixing(folder):
    for line in MIXING:
        words = shlex.split(line, comments=True)
        assert words[0] == "samix"
        small = SMALL if words[1] == "pretrain" else []
        if words[1] == "pretrain" and "data=folder" not in words:
            small = [*small, "data.limit=64"]
        samix_here(*words[1:], *small, cwd=folder)
    assert (folder / "runs" / "photos" / "mixing.png").exists()


def test_the_code(folder, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(folder)
    exec(code, {"__name__": "__main__"})
    assert "torch.Size([1, 128]) 16 (0.485, 0.456, 0.406)" in capsys.readouterr().out


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^a-z0-9_ -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_and_names_exist():
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        page, _, anchor = target.partition("#")
        assert (ROOT / page).exists(), target
        assert not anchor or anchor in anchors((ROOT / page).read_text()), target
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors(README)
    from ssl_samix.config.compose import groups

    for group, row in re.findall(r"^\| `(\w+)=` \| (.*) \|$", README, re.M):
        for name in re.findall(r"`(\w+)`", row):
            assert name in groups()[group], (group, name)
