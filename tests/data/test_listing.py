"""Large trees are listed once: the second look opens no folder that has not changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ssl_samix.data import folder, listing
from ssl_samix.data.cache import cache_folder
from ssl_samix.data.folder import class_folders, empty_classes, scan


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """Remember trees of 4 images or more, in a cache of this test's own."""
    monkeypatch.setenv("SSL_SAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "REMEMBERED_FROM", 4)
    return tmp_path / "cache" / "folders"


@pytest.fixture
def listed(monkeypatch):
    """The names of the folders that are opened from now on."""
    names = []
    scandir = os.scandir
    monkeypatch.setattr(
        listing.os, "scandir", lambda path: names.append(os.path.basename(path)) or scandir(path)
    )
    return names


def age(root):
    """Let every folder be one that was last changed a minute ago."""
    for path in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        then = path.stat().st_mtime_ns - 60 * 10**9
        os.utime(path, ns=(then, then))


def tree(root, classes=3, each=4):
    for k in range(classes):
        (root / f"class{k}").mkdir(parents=True)
        for i in range(each):
            (root / f"class{k}" / f"{i}.jpg").touch()
    age(root)
    return root


def test_the_second_look_opens_no_folder(tmp_path, remembered, listed):
    root = tree(tmp_path / "images")
    listed.clear()
    first = scan(root)
    assert sorted(listed) == ["class0", "class1", "class2", "images"]
    listed.clear()
    assert scan(root) == first
    assert scan(root, labels=False).train.paths == first.train.paths
    assert class_folders(root) == (first.train, first.classes)
    assert empty_classes(root) == []
    assert listed == []


def test_only_what_changed_is_listed_again(tmp_path, remembered, listed):
    root = tree(tmp_path / "images")
    scan(root)
    (root / "class1" / "new.jpg").touch()
    (root / "class2" / "0.jpg").unlink()
    listed.clear()
    names = [os.path.relpath(path, root) for path in scan(root).train.paths]
    assert names[4:] == [
        *(f"class1/{n}.jpg" for n in (0, 1, 2, 3, "new")),
        *(f"class2/{n}.jpg" for n in (1, 2, 3)),
    ]
    assert sorted(listed) == ["class1", "class2"]


def test_a_new_class_a_gone_class_and_a_renamed_one(tmp_path, remembered):
    root = tree(tmp_path / "images")
    scan(root)
    (root / "class0").rename(root / "first")
    tree(root / "class2" / "deep", 1, 1)
    for path in (root / "class1").iterdir():
        path.unlink()
    (root / "class1").rmdir()
    index = scan(root)
    assert index.classes == ("class2", "first")
    assert len(index.train.paths) == 9


def test_a_folder_put_in_place_with_the_same_time_is_noticed(tmp_path, remembered):
    root = tree(tmp_path / "images")
    scan(root)
    old = (root / "class0").stat()
    (root / "class0" / "other.jpg").touch()
    os.utime(root / "class0", ns=(old.st_atime_ns, old.st_mtime_ns))  # as tar and rsync do
    assert any(path.endswith("other.jpg") for path in scan(root).train.paths)


def test_folders_changed_a_moment_ago_are_not_trusted(tmp_path, remembered, listed):
    root = tree(tmp_path / "images")
    (root / "class1" / "new.jpg").touch()
    scan(root)
    listed.clear()
    scan(root)
    assert listed == ["class1"]


def test_small_folders_leave_nothing_behind(tmp_path, remembered, listed):
    root = tree(tmp_path / "images", classes=3, each=1)
    listed.clear()
    for _ in range(2):
        scan(root)
    assert len(listed) == 8
    assert not remembered.exists()


def test_links_to_folders_are_looked_at_every_time(tmp_path, remembered):
    tree(tmp_path / "far")
    tree(tmp_path / "images", 2)
    link = tmp_path / "images" / "linked"
    link.symlink_to(tmp_path / "far")
    age(tmp_path / "images")
    assert scan(tmp_path / "images").classes == ("class0", "class1", "linked")
    (tmp_path / "far").rename(tmp_path / "away")
    assert scan(tmp_path / "images").classes == ("class0", "class1")
    (tmp_path / "away").rename(tmp_path / "far")
    assert scan(tmp_path / "images").classes == ("class0", "class1", "linked")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: json.dumps({"format": 0, "folders": {}}),
        lambda text: json.dumps({**json.loads(text), "folders": 3}),
        lambda text: json.dumps({**json.loads(text), "folders": {"": [1], "/class0": None}}),
        lambda text: json.dumps({**json.loads(text), "endings": [".jpg"]}),
    ],
)
def test_a_damaged_cache_is_made_anew(damage, tmp_path, remembered, listed):
    root = tree(tmp_path / "images")
    first = scan(root)
    (file,) = remembered.glob("*.json")
    file.write_text(damage(file.read_text()))
    assert scan(root) == first
    listed.clear()
    assert scan(root) == first
    assert listed == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, remembered):
    (tmp_path / "cache").write_text("a file where the folder should be")
    root = tree(tmp_path / "images")
    assert scan(root) == scan(root)
    assert (tmp_path / "cache").read_text().startswith("a file")


def test_trees_do_not_answer_for_each_other(tmp_path, remembered):
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two", each=5)
    assert [len(scan(root).train.paths) for root in (one, two, one, two)] == [12, 15, 12, 15]
    assert len(list(remembered.glob("*.json"))) == 2


def test_several_processes_at_once(tmp_path, remembered):
    root = tree(tmp_path / "images", classes=40)
    code = (
        "import sys; from ssl_samix.data import folder, listing; listing.REMEMBERED_FROM = 4; "
        "print(len([folder.scan(sys.argv[1]) for _ in range(20)][-1].train.paths))"
    )
    command = [sys.executable, "-c", code, str(root)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["160\n"] * 4
    assert len(folder.scan(root).train.paths) == 160


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_SAMIX_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SSL_SAMIX_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "ssl_samix"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ssl_samix"
