"""Which images keep their labels."""

from __future__ import annotations

import pytest
import torch

from ssl_samix.data.images import MemoryImages
from ssl_samix.data.subsets import (
    draw_per_class,
    draw_percent,
    read_split,
    write_split,
)
from ssl_samix.errors import DataError

NAMES = ("ant", "bee", "cow")
LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


def images(names):
    pixels = torch.zeros(len(names), 3, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([NAMES.index(name.split("/")[-2]) for name in names])
    return MemoryImages(pixels, labels, names)


FILES = [f"/data/train/{NAMES[label]}/{i:03}.png" for i, label in enumerate(LABELS.tolist())]


def test_a_share_keeps_the_proportions():
    picks = draw_percent(LABELS, NAMES, 20, seed=0)
    assert torch.bincount(LABELS[picks]).tolist() == [12, 6, 2]
    assert len(set(picks.tolist())) == 20


def test_the_seed_fixes_the_choice():
    first, again, other = (draw_percent(LABELS, NAMES, 20, seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    first, again, other = (draw_per_class(LABELS, NAMES, 3, seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


def test_so_many_of_each_class():
    picks = draw_per_class(LABELS, NAMES, 10, seed=0)
    assert torch.bincount(LABELS[picks]).tolist() == [10, 10, 10]
    assert set(picks[-10:].tolist()) == set(range(90, 100))  # all that the last class has


def test_a_class_without_a_label_is_named():
    with pytest.raises(DataError, match=r"percent=2 leaves 2 of 100 labels and none for cow"):
        draw_percent(LABELS, NAMES, 2, seed=0)
    with pytest.raises(DataError, match=r"leaves 0 of 100 labels and none for ant, bee, cow"):
        draw_percent(LABELS, NAMES, 0.1, seed=0)
    with pytest.raises(DataError, match="class cow has 10 training images, per_class=11"):
        draw_per_class(LABELS, NAMES, 11, seed=0)


def test_a_written_split_is_read_back_in_another_folder(tmp_path):
    picks = draw_percent(LABELS, NAMES, 20, seed=0)
    write_split(tmp_path / "split.txt", images(FILES), picks)
    moved = images([name.replace("/data/", "/elsewhere/deep/") for name in FILES])
    assert read_split(tmp_path / "split.txt", moved, NAMES).tolist() == picks.tolist()


def test_a_list_of_file_names_alone_is_read(tmp_path):
    # as SimCLR's 1percent.txt: n01440764_10026.JPEG
    (tmp_path / "list.txt").write_text("099.png\n000.png\n070.png\n")
    assert read_split(tmp_path / "list.txt", images(FILES), NAMES).tolist() == [0, 70, 99]


def test_names_that_stand_for_several_images_need_their_folder(tmp_path):
    both = images(["/a/ant/1.png", "/a/bee/1.png", "/a/cow/2.png"])
    (tmp_path / "list.txt").write_text("1.png\n2.png\n")
    with pytest.raises(DataError, match=r"names 1 of 2 images .* such as 1\.png"):
        read_split(tmp_path / "list.txt", both, NAMES)
    (tmp_path / "list.txt").write_text("bee/1.png\nant/1.png\n2.png\n")
    assert read_split(tmp_path / "list.txt", both, NAMES).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nobody.png\n000.png\n", r"names 1 of 2 images .* such as nobody\.png"),
        ("\n\n", "names 0 of 0 images"),
        ("000.png\n001.png\n", "has no image of bee, cow"),
    ],
)
def test_a_list_that_does_not_fit(text, sentence, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_split(tmp_path / "list.txt", images(FILES), NAMES)


def test_a_missing_list(tmp_path):
    with pytest.raises(DataError, match=r"cannot read split=.*none\.txt"):
        read_split(tmp_path / "none.txt", images(FILES), NAMES)
