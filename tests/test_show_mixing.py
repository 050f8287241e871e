"""``samix show-mixing``: one picture of a run's Mixer, from anywhere, of any images."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_samix
from ssl_samix.cli.main import main
from ssl_samix.cli.show_mixing import parse_show_mixing, show
from ssl_samix.data.views import normalize
from ssl_samix.types import MixPlan
from tests.conftest import samix_here


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    return trained("moco samix", tmp_path_factory.mktemp("trained") / "a run, (1)=x")


@pytest.fixture(scope="module")
def unmixed(trained, tmp_path_factory):
    return trained("moco none", tmp_path_factory.mktemp("unmixed") / "run")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "jörg's photos, 50%"
    (folder / "deep").mkdir(parents=True)
    for i in range(5):
        pixels = torch.randint(256, (40, 30, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / ("deep" if i % 2 else "") / f"{i}.jpg")
    return folder


@pytest.fixture
def shown(monkeypatch, capsys):
    """Run the command in this process and return the picture it names, as an array (h, w, 3)."""

    def paint(*words):
        monkeypatch.setattr(sys, "argv", ["samix", "show-mixing", *map(str, words)])
        main()
        (path,) = capsys.readouterr().out.splitlines()
        return np.array(Image.open(path))

    return paint


def tile(picture, column, row):
    x, y = 12 + column * 132, 12 + 2 * 18 + row * 132
    return torch.from_numpy(picture[y : y + 128 : 8, x : x + 128 : 8]).permute(2, 0, 1)


def test_from_another_folder_it_leaves_one_picture_and_says_where(run, tmp_path, capsys):
    printed = samix_here("show-mixing", f"run={run}", cwd=tmp_path)
    assert printed == f"{run / 'mixing.png'}\n"
    assert capsys.readouterr().err == ""
    assert Image.open(run / "mixing.png").size == (12 + 12 * 132 - 4 + 12, 48 + 8 * 132 - 4 + 12)
    assert not list(tmp_path.iterdir())


def test_paths_are_relative_to_where_it_is_called(run, shown, monkeypatch):
    monkeypatch.chdir(run.parent)
    picture = shown(f"run={run.name}", "out=here/a.png", "lams=0.5")
    assert picture.shape[1] == 12 + 4 * 132 - 4 + 12
    assert (run.parent / "here" / "a.png").exists()


def test_its_tiles_are_what_the_mixer_makes(run, shown, tmp_path):
    picture = shown(f"run={run}", f"out={tmp_path}/a.png", "lams=[0.2,1]", "rows=3")
    mixer = ssl_samix.load_mixer(run)
    mean, std = torch.tensor(mixer.mean), torch.tensor(mixer.std)
    own, other = (torch.stack([tile(picture, c, row) for row in range(3)]) for c in (0, 1))
    every = torch.arange(3)
    for column, lam in ((2, 0.2), (4, 1.0)):
        plan = MixPlan(torch.full((3,), lam), every, every)
        mixed = mixer.mix(normalize(own, mean, std), normalize(other, mean, std), plan)
        pixels = 255 * (mixed.images * std[:, None, None] + mean[:, None, None])
        for row in range(3):
            mask = (255 * mixed.mask[row]).expand(3, -1, -1)
            assert (tile(picture, column, row) - mask).abs().max() < 0.51
            assert (tile(picture, column + 1, row) - pixels[row]).abs().max() < 0.51


def test_the_runs_own_images_are_its_training_images_as_they_are(run, shown, tmp_path):
    picture = shown(f"run={run}", f"out={tmp_path}/a.png", "rows=4")
    from sklearn.datasets import load_digits

    all_ = torch.from_numpy(load_digits().images)  # (1797, 8, 8) in 0..16
    for row in range(4):
        seen = tile(picture, 0, row)[0].double()
        small = seen.reshape(8, 2, 8, 2).mean(dim=(1, 3)) * 16 / 255
        assert (all_ - small).abs().mean(dim=(1, 2)).min() < 1.5


def test_a_seed_repeats_the_picture_and_another_shows_other_images(run, shown, tmp_path):
    words = [f"run={run}", f"out={tmp_path}/a.png", "rows=2"]
    first = shown(*words)
    assert np.array_equal(first, shown(*words))
    assert not np.array_equal(first, shown(*words, "seed=1"))


def test_any_folder_of_images_and_damaged_ones_are_named(run, photos, shown, tmp_path, caplog):
    (photos / "bad.png").write_text("no picture")
    words = [f"images={photos}", f"out={tmp_path}/a.png"]
    picture = shown(f"run={run / 'mixer.safetensors'}", *words)
    assert picture.shape[0] == 48 + 5 * 132 - 4 + 12, "each of the five images has a row"
    assert caplog.messages == [
        f"1 of 6 images cannot be read and are skipped: {photos / 'bad.png'}"
    ]
    assert np.array_equal(picture, shown(f"run={run}", *words))


def test_a_run_that_goes_on_is_read_from_its_checkpoint(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.yaml", "last.ckpt"):
        shutil.copy(run / name, copy / name)
    pictures = [show(parse_show_mixing([f"run='{path}'", "rows=1"])) for path in (run, copy)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "needs a trained Mixer: run=<run with mixup=samix>"),
        (["run=nowhere"], "run=nowhere does not exist"),
        (["runs=x"], "unknown key 'runs': did you mean 'run'"),
        (["lam=[0.5]"], "unknown key 'lam': did you mean 'lams'"),
        (["method=moco"], "show-mixing takes no method: choose from images, lams, out, rows"),
        (["mixup.mask=paper"], "show-mixing takes no mixup.mask"),
        (["-m", "run=a,b"], "takes no --multirun"),
        (["run={run}", "lams=[0.5,1.1]"], "lams must be a number in [0, 1], got 1.1"),
        (["run={run}", "lams=-0.1"], "lams must be a number in [0, 1], got -0.1"),
        (["run={run}", "lams=[]"], "at least one ratio"),
        (["run={run}", "lams=0.1,0.5"], "lams has several values: a list is lams=[0.1,0.5]"),
        (["run={run}", "rows=0"], "rows must be a number in [1, 64]"),
        (["run={run}", "rows=all"], "rows needs a whole number"),
        (["run={run}", "seed=-1"], "seed must be"),
        (["run={run}", "out=picture.jpg"], "ends in .png"),
        (["run={run}", "out=/dev/null/a.png"], "cannot write /dev/null/a.png"),
        (["run={run}", "images=nowhere"], "images=nowhere is not a folder"),
        (["run={run}", "images=empty"], "no image found under images="),
        (["run={run}", "images=one"], "images=one holds one image"),
        (["run={run}", "images=damaged"], "of 2 images 1 can be read: repair"),
        (["run={run}/mixer.safetensors"], "is a file and names no images: give images=<folder>"),
        (["run={run}/config.yaml", "images=two"], "is damaged or no checkpoint"),
        (["run=empty"], "empty is not a run folder"),
        (["run=empty", "images=two"], "empty holds no mixer.safetensors and no last.ckpt"),
        (["run={unmixed}"], "holds no Mixer: it is of a run with mixup=none"),
        (["run={unmixed}", "images=two"], "holds no Mixer: it is of a run with mixup=none"),
        (["run={unmixed}/last.ckpt", "images=two"], "holds no Mixer"),
    ],
)
def test_bad_input(words, sentence, run, unmixed, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in {"empty": 0, "one": 1, "two": 2, "damaged": 1}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 20)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "damaged" / "bad.png").write_text("no picture")
    told = fails("show-mixing", *(word.format(run=run, unmixed=unmixed) for word in words))
    assert sentence in told
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "one", "two", "damaged"}


def test_images_that_are_gone_are_asked_for(run, photos, fails, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    text = (copy / "config.yaml").read_text()
    text = text.replace("name: digits", "name: folder").replace("root: null", "root: /gone")
    (copy / "config.yaml").write_text(text)
    assert "not in /gone any more: give images=<folder>" in fails("show-mixing", f"run={copy}")


def test_help_shows_its_keys_and_no_groups(tmp_path):
    shown = samix_here("show-mixing", "--help", cwd=tmp_path)
    assert "lams:\n- 0.1" in shown
    assert "moco" not in shown
    assert "hydra:" not in shown


def test_a_mistake_is_told_before_heavy_imports(unmixed, tmp_path):
    code = (
        f"import sys; sys.argv = ['samix', 'show-mixing', 'run={unmixed}']\n"
        "from ssl_samix.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert shown.stdout.split() == ["2", "False"]
    assert shown.stderr == f"samix: {unmixed} holds no Mixer: it is of a run with mixup=none\n"
