import subprocess
import sys

import pytest

from ssl_samix.data import layout
from ssl_samix.data.layout import DATASETS, check_layout, locate
from ssl_samix.errors import DataError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def complete(name, root):
    for need in DATASETS[name].needs:
        touch(root / DATASETS[name].folder / need)


def test_the_check_imports_neither_torch_nor_numpy():
    code = (
        "import sys, ssl_samix.data.layout, ssl_samix.data.folder; "
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(DataError, match=r"unknown data set 'cifar11': did you mean 'cifar10'\?"):
        check_layout("cifar11", None, False)


def test_digits_need_no_folder():
    check_layout("digits", None, False)


@pytest.mark.parametrize("root", [None, ""])
def test_folder_without_a_root_names_the_key(root):
    with pytest.raises(DataError, match=r"give data.root=<folder of images>"):
        check_layout("folder", root, False)


def test_missing_empty_and_not_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist: give data.root="):
        check_layout("folder", tmp_path / "nowhere", False)
    with pytest.raises(DataError, match="is an empty folder"):
        check_layout("folder", tmp_path, False)
    touch(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg is not a folder"):
        check_layout("folder", tmp_path / "a.jpg", False)


def test_links_in_a_circle_are_a_sentence(tmp_path):
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(DataError, match=r"cannot read data\.root=.*ring: Too many levels"):
        check_layout("folder", tmp_path / "ring", False)


def test_no_permission_is_a_sentence(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(layout.os, "scandir", refuse)
    with pytest.raises(DataError, match="no permission to read"):
        check_layout("folder", tmp_path, False)


def test_a_folder_of_other_files_has_no_image(tmp_path):
    touch(tmp_path / "notes.txt")
    touch(tmp_path / ".hidden" / "a.jpg")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(DataError, match="no image found under"):
        check_layout("folder", tmp_path, False)
    touch(tmp_path / "deep" / "er" / "PHOTO.JPeG")
    check_layout("folder", tmp_path, False)


def test_the_search_ends_at_the_first_image(tmp_path, monkeypatch):
    touch(tmp_path / "a.png")
    for i in range(20):
        touch(tmp_path / f"sub{i}" / "b.txt")
    listed = []
    scandir = layout.os.scandir
    monkeypatch.setattr(layout.os, "scandir", lambda path: listed.append(path) or scandir(path))
    check_layout("folder", tmp_path, False)
    assert {str(path) for path in listed} == {str(tmp_path)}


@pytest.mark.parametrize(
    "name", [name for name in DATASETS if name not in ("digits", "folder", "webdataset")]
)
def test_complete_and_incomplete_layouts(name, tmp_path):
    complete(name, tmp_path)
    check_layout(name, tmp_path, False)
    last = tmp_path / DATASETS[name].folder / DATASETS[name].needs[-1]
    last.unlink()
    touch(tmp_path / "other")
    with pytest.raises(DataError, match=f"'{name}' not found under .*{last.name}"):
        check_layout(name, tmp_path, False)


def test_the_way_out_is_the_download_where_there_is_one(tmp_path):
    touch(tmp_path / "other")
    with pytest.raises(DataError, match=r"add data.download=true"):
        check_layout("cifar10", tmp_path, False)
    check_layout("cifar10", tmp_path, True)
    check_layout("cifar10", tmp_path / "not yet there", True)
    with pytest.raises(DataError, match=r"tiny-imagenet-200\.zip \(no automatic download\)"):
        check_layout("tiny_imagenet", tmp_path, True)


def test_gzipped_fashion_mnist_is_found(tmp_path):
    for need in DATASETS["fashion_mnist"].needs:
        touch(tmp_path / "FashionMNIST" / "raw" / f"{need}.gz")
    check_layout("fashion_mnist", tmp_path, False)


@pytest.mark.parametrize("inside", ["", "FashionMNIST", "FashionMNIST/raw"])
def test_the_root_may_be_the_folder_of_the_set_itself(inside, tmp_path):
    complete("fashion_mnist", tmp_path)
    assert locate("fashion_mnist", tmp_path / inside) == tmp_path
    check_layout("fashion_mnist", tmp_path / inside, False)
