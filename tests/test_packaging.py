"""A plain installation carries everything and runs from any folder."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in files:  # what a clone holds, and no build left-overs
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Built with the setuptools that is here: a test downloads nothing.
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", folder]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, source], check=True, capture_output=True
    )
    return next(folder.glob("*.whl"))


def test_every_module_and_configuration_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for ending in ("*.py", "*.jinja"):
        for path in (ROOT / "ssl_samix").rglob(ending):
            assert str(path.relative_to(ROOT)) in inside
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"ssl_samix/configs/{path.relative_to(ROOT / 'configs')}" in inside
    assert "ssl_samix/py.typed" in inside
    for path in (ROOT / "eval_protocols").glob("*.py"):
        assert f"ssl_samix/eval_protocols/{path.name}" in inside
    assert not [name for name in inside if name.startswith(("tests", "benchmarks"))]


def test_a_wheel_can_be_built_from_the_source_distribution(source, wheel, tmp_path):
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    needed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    moved = ("configs/", "eval_protocols/")  # these stand beside the package in a checkout
    homes = {n.removeprefix("ssl_samix/") if n[10:].startswith(moved) else n for n in needed}
    assert homes <= inside
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= inside


@pytest.mark.slow
def test_an_installed_wheel_runs_from_another_folder(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel],
        check=True,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = ["data.limit=64", "data.batch_size=32", "backbone.width=8", "trainer.max_epochs=1"]
    for command in (["pretrain", *words, "out=run"], ["knn", "run=run", "k=[5]"]):
        done = subprocess.run(
            [sys.executable, "-m", "ssl_samix", *command],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (elsewhere / "run" / "encoder.safetensors").exists()
    assert list((elsewhere / "run" / "results").glob("knn-digits-*/results.json"))
    where = subprocess.run(
        [sys.executable, "-c", "import ssl_samix.config.compose as c; print(c.CONFIG_DIR)"],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True,
        text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert where == str(target / "ssl_samix" / "configs")


def test_the_command_is_declared():
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    scripts = metadata["options.entry_points"]["console_scripts"]
    assert scripts.strip() == "samix = ssl_samix.cli.main:main"
