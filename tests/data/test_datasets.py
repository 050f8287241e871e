import gzip
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ssl_samix.data.datasets import SPECS, load_splits
from ssl_samix.data.images import FileImages, MemoryImages
from ssl_samix.data.layout import DATASETS
from ssl_samix.data.sources import PathSource
from ssl_samix.errors import DataError


def write_images(folder, *values, size=(32, 32)):
    """Write one PNG per gray value."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        Image.new("RGB", size, (value,) * 3).save(folder / f"{value:03d}.png")


def grays(images):
    """Return the gray value in the middle of each image."""
    half = images.image_size // 2
    return images.load(range(len(images)))[:, 0, half, half].tolist()


def write_cifar(root, name, key, batches, meta):
    """Write CIFAR pickles: row i of a batch is red i, green its label, blue 7."""
    home = root / DATASETS[name].folder
    home.mkdir(parents=True)
    for file, count in batches.items():
        labels = [i % 10 for i in range(count)]
        rows = np.zeros((count, 3, 32, 32), dtype=np.uint8)
        rows[:, 0] = np.arange(count)[:, None, None]
        rows[:, 1] = np.array(labels)[:, None, None]
        rows[:, 2] = 7
        entry = {"data": rows.reshape(count, -1), key: labels}
        (home / file).write_bytes(pickle.dumps(entry))
    (home / DATASETS[name].needs[-1]).write_bytes(pickle.dumps(meta))


@pytest.fixture
def no_checksum(monkeypatch):
    """Let torchvision accept data sets that are smaller than the real ones."""
    for kind in (torchvision.datasets.CIFAR10, torchvision.datasets.STL10):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)


def test_every_known_name_has_a_row():
    assert set(SPECS) == set(DATASETS)


def test_digits():
    splits = load_splits("digits", None, "auto", None)
    assert (len(splits.train), len(splits.val), splits.image_size) == (1438, 359, 16)
    assert splits.bank is splits.train
    assert splits.classes == tuple("0123456789")
    assert int(splits.train.pixels.max()) == 255
    names = [images.name(i) for images in (splits.train, splits.val) for i in range(len(images))]
    assert len(set(names)) == 1797
    values = splits.train.pixels.double() / 255
    torch.testing.assert_close(
        values.mean((0, 2, 3)).tolist(), list(splits.mean), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(values.std((0, 2, 3)).tolist(), list(splits.std), atol=1e-4, rtol=0)


def test_a_limit_is_balanced_repeatable_and_spares_val():
    first, second = (load_splits("digits", None, 8, 100) for _ in range(2))
    assert set(first.train.labels.bincount().tolist()) <= {9, 10, 11}
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert (len(first.train), len(first.bank), len(first.val)) == (100, 100, 359)


def test_cifar10(tmp_path, no_checksum):
    batches = {f"data_batch_{i}": 20 for i in range(1, 6)} | {"test_batch": 30}
    classes = [f"class {k}" for k in range(10)]
    write_cifar(tmp_path, "cifar10", "labels", batches, {"label_names": classes})
    splits = load_splits("cifar10", tmp_path, "auto", None)
    assert isinstance(splits.train, MemoryImages)
    assert splits.train.pixels.shape == (100, 3, 32, 32)
    assert splits.train.pixels[37, :, 4, 5].tolist() == [17, 7, 7]
    assert int(splits.train.labels[37]) == 7
    assert (splits.train.name(37), splits.val.name(2)) == ("cifar10 train 37", "cifar10 test 2")
    assert splits.classes == tuple(classes)
    assert len(splits.val) == 30
    few = load_splits("cifar10", tmp_path / "cifar-10-batches-py", 16, 10)
    assert few.train.pixels.shape == (10, 3, 16, 16)
    assert few.train.labels.tolist() == few.train.pixels[:, 1, 0, 0].tolist()
    assert few.train.labels.bincount().tolist() == [1] * 10


def test_cifar100_uses_the_fine_labels(tmp_path, no_checksum):
    classes = [f"fine {k}" for k in range(100)]
    write_cifar(
        tmp_path,
        "cifar100",
        "fine_labels",
        {"train": 20, "test": 10},
        {"fine_label_names": classes},
    )
    splits = load_splits("cifar100", tmp_path, "auto", None)
    assert splits.val.labels.tolist() == list(range(10))
    assert splits.classes == tuple(classes)


def test_a_wrong_checksum_is_a_sentence(tmp_path):
    write_cifar(tmp_path, "cifar100", "fine_labels", {"train": 2, "test": 2}, {})
    with pytest.raises(DataError, match=r"'cifar100' under .* is incomplete or damaged: delete it"):
        load_splits("cifar100", tmp_path, "auto", None)


def test_a_download_that_fails_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"could not be downloaded .*no route to host"):
        load_splits("cifar10", tmp_path, "auto", None, download=True)


def test_stl10(tmp_path, no_checksum):
    home = tmp_path / "stl10_binary"
    home.mkdir()
    for name, count in (("train", 10), ("test", 4), ("unlabeled", 6)):
        pixels = np.zeros((count, 3, 96, 96), dtype=np.uint8)
        pixels[:, :, 10, 20] = np.arange(count)[:, None]  # column 10, row 20 on disk
        pixels.tofile(home / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(home / f"{name}_y.bin")
    splits = load_splits("stl10", tmp_path, "auto", None)
    assert splits.train.labels.tolist() == [-1] * 6
    assert splits.bank.labels.tolist() == list(range(10))
    assert splits.val.labels.tolist() == [0, 1, 2, 3]
    assert splits.train.pixels[:, 0, 20, 10].tolist() == list(range(6))
    assert len(splits.classes) == 10
    limited = load_splits("stl10", tmp_path, 32, 3)
    assert (len(limited.train), len(limited.bank), limited.image_size) == (3, 10, 32)


def write_fashion(root, zipped):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        pixels = np.tile(np.arange(count, dtype=np.uint8)[:, None, None], (1, 28, 28))
        labels = np.arange(count, dtype=np.uint8) % 10
        for array, kind in ((pixels, "images-idx3"), (labels, "labels-idx1")):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
            data, name = head + array.tobytes(), f"{part}-{kind}-ubyte"
            if zipped:
                (raw / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (raw / name).write_bytes(data)
    return raw


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist(zipped, tmp_path):
    write_fashion(tmp_path, zipped)
    splits = load_splits("fashion_mnist", tmp_path, "auto", None)
    assert splits.train.pixels.shape == (20, 3, 32, 32)
    assert grays(splits.train) == list(range(20))
    assert splits.val.labels.tolist() == list(range(10))
    assert splits.classes[9] == "Ankle boot"
    assert grays(load_splits("fashion_mnist", tmp_path, 28, None).val) == list(range(10))


def test_a_truncated_fashion_mnist_is_a_sentence(tmp_path):
    raw = write_fashion(tmp_path, zipped=True)
    file = raw / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"'fashion_mnist' under .* is incomplete or damaged"):
        load_splits("fashion_mnist", tmp_path, "auto", None)


@pytest.mark.parametrize("published", [True, False])
def test_tiny_imagenet(published, tmp_path):
    home = tmp_path / "tiny-imagenet-200"
    for k, name in enumerate(("n01", "n02")):
        write_images(home / "train" / name / "images", 10 * k, 10 * k + 1, size=(64, 64))
        (home / "train" / name / f"{name}_boxes.txt").touch()
    if published:
        write_images(home / "val" / "images", 100, 101, 102, size=(64, 64))
        rows = [(100, "n02"), (101, "n01"), (102, "n02")]
        lines = [f"{value}.png\t{name}\t0\t0\t9\t9\n" for value, name in rows]
        (home / "val" / "val_annotations.txt").write_text("".join(lines))
    else:
        write_images(home / "val" / "n01", 101, size=(64, 64))
        write_images(home / "val" / "n02", 100, 102, size=(64, 64))
    splits = load_splits("tiny_imagenet", tmp_path, "auto", None)
    assert splits.classes == ("n01", "n02")
    assert list(zip(grays(splits.train), splits.train.labels.tolist(), strict=True)) == [
        (0, 0),
        (1, 0),
        (10, 1),
        (11, 1),
    ]
    found = dict(zip(grays(splits.val), splits.val.labels.tolist(), strict=True))
    assert found == {100: 1, 101: 0, 102: 1}


def test_imagenet_is_decoded_on_demand(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split / "a", 1, 2, size=(40, 30))
        write_images(tmp_path / split / "b", 3, size=(40, 30))
    splits = load_splits("imagenet", tmp_path, "auto", None)
    assert isinstance(splits.train, FileImages)
    assert splits.train.load([2]).shape == (1, 3, 224, 224)
    assert splits.train.original(2).shape == (3, 30, 40)
    assert splits.val.labels.tolist() == [0, 0, 1]


def test_imagenet_needs_class_folders_in_val(tmp_path):
    write_images(tmp_path / "train" / "a", 1)
    write_images(tmp_path / "val", 1)
    with pytest.raises(DataError, match="val has no class folders"):
        load_splits("imagenet", tmp_path, "auto", None)


def test_class_folders_hold_out_a_tenth(tmp_path):
    write_images(tmp_path / "a", *range(40))
    write_images(tmp_path / "b", *range(100, 160))
    splits = load_splits("folder", tmp_path, "auto", None)
    assert splits.train.labels.bincount().tolist() == [36, 54]
    assert splits.val.labels.bincount().tolist() == [4, 6]
    assert splits.bank is splits.train
    assert sorted(grays(splits.train) + grays(splits.val)) == [*range(40), *range(100, 160)]
    for images in (splits.train, splits.val):
        assert [int(value >= 100) for value in grays(images)] == images.labels.tolist()
    again = load_splits("folder", tmp_path, "auto", 20)
    assert [again.val.name(i) for i in range(10)] == [splits.val.name(i) for i in range(10)]
    assert again.train.labels.bincount().tolist() == [8, 12]


def test_an_unlabelled_folder_has_neither_bank_nor_val(tmp_path):
    write_images(tmp_path, *range(20))
    splits = load_splits("folder", tmp_path, "auto", 15)
    assert (splits.bank, splits.val, splits.classes) == (None, None, ())
    assert splits.train.labels.tolist() == [-1] * 15


def test_a_limit_decodes_no_more_than_it_keeps(tmp_path, monkeypatch):
    write_images(tmp_path, *range(50))
    opened = []
    read = PathSource.image
    monkeypatch.setattr(
        PathSource, "image", lambda self, *args: opened.append(0) or read(self, *args)
    )
    assert len(load_splits("folder", tmp_path, 32, 7).train) == 7
    assert len(opened) == 7


@pytest.mark.parametrize(
    ("side", "expected"),
    [(9, 16), (20, 24), (28, 32), (32, 32), (96, 96), (127, 96), (130, 128), (500, 224)],
)
def test_auto_size(side, expected, tmp_path):
    write_images(tmp_path, 1, 2, 3, size=(side + 5, side))
    splits = load_splits("folder", tmp_path, "auto", None)
    assert splits.image_size == splits.train.image_size == expected
    assert splits.train.load([0]).shape[-1] == expected


def test_a_split_that_does_not_fit_in_memory_stays_on_disk(tmp_path, caplog):
    write_images(tmp_path, 1, 2)
    fits = 2 * 3 * 32 * 32 / 2**30
    in_memory = load_splits("folder", tmp_path, "auto", None, memory_gb=fits).train
    assert not caplog.messages
    on_disk = load_splits("folder", tmp_path, "auto", None, memory_gb=0.9 * fits).train
    assert len(caplog.messages) == 1
    assert "decoded again in every epoch" in caplog.text
    assert isinstance(in_memory, MemoryImages)
    assert isinstance(on_disk, FileImages)
    assert torch.equal(in_memory.load([0, 1]), on_disk.load([0, 1]))


@pytest.mark.parametrize("image_size", [4, "large", 32.5])
def test_an_image_size_that_is_none(image_size):
    with pytest.raises(DataError, match=r"data.image_size must be auto or a number of pixels"):
        load_splits("digits", None, image_size, None)


def test_a_limit_below_one():
    with pytest.raises(DataError, match=r"data\.limit must be at least 1"):
        load_splits("digits", None, "auto", 0)
