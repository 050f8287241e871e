import json
import os
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from ssl_samix.data import image_files
from ssl_samix.data.folder import empty_classes, given_images, scan
from ssl_samix.data.layout import check_layout
from ssl_samix.errors import DataError


def tree(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def shown(files, root):
    paths = [os.path.relpath(path, root) for path in files.paths]
    return list(zip(paths, files.labels, strict=True))


def test_train_and_val_with_class_folders(tmp_path):
    tree(tmp_path, "train/dog/2.jpg", "train/dog/1.JPG", "train/cat/x/3.png", "val/cat/4.bmp")
    tree(tmp_path, "val/dog/5.webp", "test/cat/6.jpg", "train/dog/notes.txt", "train/.git/7.jpg")
    index = scan(tmp_path)
    assert index.classes == ("cat", "dog")
    assert shown(index.train, tmp_path) == [
        ("train/cat/x/3.png", 0),
        ("train/dog/1.JPG", 1),
        ("train/dog/2.jpg", 1),
    ]
    assert shown(index.val, tmp_path) == [("val/cat/4.bmp", 0), ("val/dog/5.webp", 1)]


def test_test_stands_in_for_val(tmp_path):
    tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "test/a/3.jpg", "test/b/4.jpg")
    assert shown(scan(tmp_path).val, tmp_path) == [("test/a/3.jpg", 0), ("test/b/4.jpg", 1)]


def test_class_folders_alone(tmp_path):
    index = scan(tree(tmp_path, "b/1.jpg", "a/2.jpg", "empty/readme.txt"))
    assert index.val is None
    assert index.classes == ("a", "b")
    assert shown(index.train, tmp_path) == [("a/2.jpg", 0), ("b/1.jpg", 1)]


def test_a_class_may_be_called_train(tmp_path):
    index = scan(tree(tmp_path, "bus/1.jpg", "car/2.jpg", "train/3.jpg"))
    assert index.classes == ("bus", "car", "train")


@pytest.mark.parametrize(
    "names",
    [
        ("2.jpg", "1.jpg"),  # flat
        ("1.jpg", "a/2.jpg", "b/3.jpg"),  # images beside folders
        ("day/a/1.jpg", "day/b/2.jpg"),  # a single folder
        ("1.jpg", "train/a/2.jpg", "train/b/3.jpg"),  # images beside train, and no val
        ("train/1.jpg", "train/2.jpg", "val/a/3.jpg", "val/b/4.jpg"),  # train without classes
    ],
)
def test_unlabelled_trees(names, tmp_path):
    index = scan(tree(tmp_path, *names))
    assert index.val is None
    assert index.classes == ()
    expected = sorted(name for name in names if not name.startswith("val"))
    assert shown(index.train, tmp_path) == [(name, -1) for name in expected]


def test_folders_by_date_can_be_declared_unlabelled(tmp_path):
    tree(tmp_path, "2026-01/1.jpg", "2026-02/2.jpg")
    assert scan(tmp_path).train.labels == [0, 1]
    assert scan(tmp_path, labels=False).train.labels == [-1, -1]
    assert scan(tmp_path, labels="false").classes == ()


def test_labels_can_be_demanded(tmp_path):
    tree(tmp_path, "only/1.jpg")
    assert scan(tmp_path).classes == ()
    assert scan(tmp_path, labels=True).classes == ("only",)
    tree(tmp_path, "stray.jpg")
    with pytest.raises(DataError, match=r"1 images lie outside the class folders .*stray\.jpg"):
        scan(tmp_path, labels=True)
    with pytest.raises(DataError, match="must be auto, true or false, not 'yes'"):
        scan(tmp_path, labels="yes")


def test_a_class_that_training_lacks_is_named(tmp_path):
    tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/b/3.jpg", "val/c/4.jpg")
    with pytest.raises(DataError, match=r"only in train: a; only in val: c"):
        scan(tmp_path)


def test_an_unlabelled_test_folder_is_left_out_aloud(tmp_path):
    index = scan(tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "test/3.jpg"))
    assert index.val is None
    assert index.notes == (
        "the images are those in train/, left out beside train/: test/ (1 images)",
        "test/ has no class folders and is not used for validation",
    )


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Test"),
        ("training", "validation"),
        ("train", "dev"),
        ("TRAINING", "testing"),
        ("train2017", "val2017"),
        ("train-1", "valid_1"),
    ],
)
def test_usual_names_of_splits_are_splits(train, val, tmp_path):
    names = [f"{split}/{name}/{split}{name}.jpg" for split in (train, val) for name in "ab"]
    index = scan(tree(tmp_path, *names))
    assert index.classes == ("a", "b")
    assert shown(index.train, tmp_path) == [(names[0], 0), (names[1], 1)]
    assert shown(index.val, tmp_path) == [(names[2], 0), (names[3], 1)]
    assert index.notes == (f"the training and validation images are those in {train}/ and {val}/",)


def test_what_lies_beside_the_splits_is_counted(tmp_path):
    tree(tmp_path, "train2017/1.jpg", "train2017/2.jpg", "val2017/3.jpg", "test2017/4.jpg")
    index = scan(tree(tmp_path, "annotations/a.json", "loose.jpg"))
    assert shown(index.train, tmp_path) == [("train2017/1.jpg", -1), ("train2017/2.jpg", -1)]
    assert index.notes == (
        "the images are those in train2017/, left out beside train2017/: 1 images, "
        "test2017/ (1 images), val2017/ (1 images)",
    )


@pytest.mark.parametrize(
    "folders",
    [
        ("train_images", "test_images"),
        ("trainA", "trainB", "testA", "testB"),
        ("train2014", "train2017"),
        ("val", "test"),
        ("images", "masks"),
        ("cat", "dog", "thumbs"),
        ("JPEGImages", "SegmentationClass"),
    ],
)
def test_folders_that_look_like_parts_of_one_set_are_asked_for(folders, tmp_path):
    tree(tmp_path, *(f"{folder}/1.jpg" for folder in folders))
    with pytest.raises(DataError, match=r"look like parts of one data set.*data.labels=true if"):
        scan(tmp_path)
    assert scan(tmp_path, labels=True).classes == tuple(sorted(folders))
    assert len(scan(tmp_path, labels=False).train.paths) == len(folders)
    tree(tmp_path, "loose.jpg")  # without class folders too
    with pytest.raises(DataError, match="look like parts of one data set"):
        scan(tmp_path)


@pytest.mark.parametrize(
    "folders",
    [("bullet train", "bus"), ("mask", "no mask"), ("label_0", "label_1"), ("valid", "faulty")],
)
def test_classes_whose_names_only_remind_of_splits(folders, tmp_path):
    index = scan(tree(tmp_path, *(f"{folder}/1.jpg" for folder in folders)))
    assert index.classes == tuple(sorted(folders))


def test_what_systems_leave_is_left_out(tmp_path):
    tree(tmp_path, "a/1.jpg", "b/2.jpg", "a/@eaDir/1.jpg/SYNO_THUMB.jpg", "@eaDir/3.jpg")
    tree(tmp_path, "$RECYCLE.BIN/4.jpg", "__MACOSX/5.jpg", "lost+found/6.jpg", ".git/7.jpg")
    index = scan(tree(tmp_path, "b/._2.jpg", "b/Thumbs.db", "desktop.ini"))
    assert shown(index.train, tmp_path) == [("a/1.jpg", 0), ("b/2.jpg", 1)]
    assert index.notes == ()


def run_folder(path):
    tree(path, "mixing/epoch-0001.png", "config.yaml")
    (path / "config.yaml").write_text("choices:\n  data: folder\nseed: 0\n")


def test_run_folders_are_left_out(tmp_path):
    tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "cats/config.yaml", "cats/3.jpg")
    (tmp_path / "cats" / "config.yaml").write_text("model:\n  choices: 3\n")
    run_folder(tmp_path / "cats" / "old run")
    index = scan(tmp_path)
    assert index.classes == ("cats", "train")
    assert index.notes == (
        "left out: 1 files that are not images here (.yaml 1)",
        "left out: what samix wrote in cats/old run",
    )
    (tmp_path / "cats").rename(tmp_path / "runs")
    (tmp_path / "runs" / "3.jpg").unlink()
    run_folder(tmp_path / "runs" / "new")
    index = scan(tmp_path)
    assert index.classes == ("a", "b"), "train/ stands alone beside runs"
    run_folder(tmp_path / "train" / "c" / "run")
    assert scan(tmp_path).classes == ("a", "b")
    assert empty_classes(tmp_path) == [], "runs and their folders are no empty classes"
    assert len(scan(tmp_path / "runs" / "new").train.paths) == 1, "unless they are asked for"


def test_results_and_embeddings_are_left_out(tmp_path):
    tree(tmp_path, "1.jpg", "r/knn/confusion.png", "r/knn/results.json")
    tree(tmp_path, "e/neighbours.png", "e/paths.csv", "mine/2.jpg", "mine/results.json")
    (tmp_path / "r" / "knn" / "results.json").write_text(json.dumps({"protocol": "knn"}, indent=2))
    (tmp_path / "e" / "paths.csv").write_text("row,path\r\n0,1.jpg\r\n")
    index = scan(tmp_path)
    assert [path for path, _ in shown(index.train, tmp_path)] == ["1.jpg", "mine/2.jpg"]
    assert index.notes[-1] == "left out: what samix wrote in e, r/knn"


def test_other_files_are_counted_by_their_endings(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "endings", lambda: frozenset({".jpg"}))
    tree(tmp_path, "1.JPG", "a.heic", "b.HEIC", "deep/x.txt", "deep/README")
    assert scan(tmp_path).notes == (
        "left out: 4 files that are not images here (.heic 2, without an ending 1, .txt 1; "
        ".heic needs pip install pillow-heif)",
    )


def test_what_is_no_file_is_left_out(tmp_path):
    tree(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "linked.jpg").symlink_to("1.jpg")
    check_layout("folder", tmp_path, False)
    index = scan(tmp_path)
    assert shown(index.train, tmp_path) == [("1.jpg", -1), ("linked.jpg", -1)]
    assert index.notes == (
        "left out: 3 names that are neither files nor folders (broken links, pipes), such as "
        "circle.jpg",
    )


def test_no_file_costs_a_look_of_its_own(tmp_path, monkeypatch):
    tree(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(5)))
    looked_at = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kw: looked_at.append(path) or stat(path, **kw))
    scan(tmp_path)
    assert {os.path.basename(path) for path in looked_at} == {tmp_path.name, "a", "b"}


def test_validation_may_lack_a_class(tmp_path):
    tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/a/4.jpg", "val/c/5.jpg")
    index = scan(tmp_path)
    assert shown(index.val, tmp_path) == [("val/a/4.jpg", 0), ("val/c/5.jpg", 2)]
    assert "val/ has no images of class b" in index.notes


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system has no such names")
def test_notes_can_be_printed_whatever_the_names(tmp_path):
    os.mkfifo(os.path.join(os.fsencode(tmp_path), b"\xff.jpg"))
    assert scan(tree(tmp_path, "1.jpg")).notes[0].endswith("such as ?.jpg")


@pytest.mark.parametrize("given", ["", "nowhere"])
def test_a_folder_given_by_hand(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tree(tmp_path, "1.jpg"))
    with pytest.raises(DataError, match=r"images= is empty|images=nowhere is not a folder"):
        given_images(given)
    assert given_images(".").train.paths == [str(tmp_path / "1.jpg")]


def test_links_are_followed_and_loops_end(tmp_path):
    tree(tmp_path, "elsewhere/1.jpg", "root/a/2.jpg")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root", target_is_directory=True)
    (tmp_path / "root" / "a" / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    index = scan(tmp_path / "root")
    assert index.classes == ("a", "b")
    assert ("b/1.jpg", 1) in shown(index.train, tmp_path / "root")


def test_no_image(tmp_path):
    with pytest.raises(DataError, match="no image found"):
        scan(tree(tmp_path, "a/readme.txt"))


def test_heic_is_an_image_where_its_package_is_installed(tmp_path, monkeypatch):
    def register():
        Image.register_open("HEIF", lambda *_: None)
        Image.register_extension("HEIF", ".heic")

    for table in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, table, dict(getattr(Image, table)))
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    package = SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    known, opened = image_files.endings.__wrapped__, image_files.formats.__wrapped__
    monkeypatch.setattr(image_files, "formats", opened)
    monkeypatch.setattr(image_files, "endings", known)
    index = scan(tree(tmp_path, "1.jpg", "2.HEIC", "3.jfif", "4.jp2", "5.pgm", "6.eps", "7.mpg"))
    assert [os.path.basename(path)[0] for path in index.train.paths] == list("12345")
    assert index.notes == ("left out: 2 files that are not images here (.eps 1, .mpg 1)",)
