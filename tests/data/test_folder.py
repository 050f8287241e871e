import os

import pytest

from ssl_samix.data.folder import scan
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


def test_different_classes_are_named(tmp_path):
    tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/b/3.jpg", "val/c/4.jpg")
    with pytest.raises(DataError, match=r"only in train: a; only in val: c"):
        scan(tmp_path)


def test_an_unlabelled_test_folder_is_left_out_aloud(tmp_path, caplog):
    tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "test/3.jpg")
    assert scan(tmp_path).val is None
    assert "test has no class folders" in caplog.text


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
