import io
import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from ssl_samix.data import decode
from ssl_samix.data.decode import check_sample, memory_images, typical_side
from ssl_samix.data.images import FileImages, MemoryImages, fit, to_rgb
from ssl_samix.data.sources import ArraySource, PathSource
from ssl_samix.errors import DataError


def picture(width=8, height=8, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reopened(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return Image.open(data)


def corner(image):
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def files(folder, good, bad=0):
    """Write small PNGs whose gray value is their position; the last ``bad`` are text."""
    paths = [folder / f"{i:04d}.png" for i in range(good + bad)]
    for i, path in enumerate(paths):
        if i < good:
            Image.new("RGB", (8, 8), (i % 256,) * 3).save(path)
        else:
            path.write_text("this is no picture")
    return [str(path) for path in paths]


# --- one picture


def test_gray_and_palette():
    assert corner(to_rgb(reopened(Image.new("L", (2, 2), 77), "PNG"))) == (77, 77, 77)
    palette = reopened(Image.new("RGB", (2, 2), (10, 200, 30)).quantize(4), "PNG")
    assert palette.mode == "P"
    assert corner(to_rgb(palette)) == (10, 200, 30)


def test_transparent_parts_become_white():
    assert corner(to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == (255, 255, 255)
    assert corner(to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 51)))) == (255, 204, 204)
    assert corner(to_rgb(Image.new("LA", (2, 2), (9, 255)))) == (9, 9, 9)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([1, 2, 3] * 256)
    assert corner(to_rgb(reopened(palette, "PNG", transparency=0))) == (255, 255, 255)


def test_cmyk_jpeg():
    red = corner(to_rgb(reopened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert red[0] > 240
    assert max(red[1:]) < 15


def test_exif_turns_the_picture_upright():
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    upright = to_rgb(reopened(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2))[0] > 240  # left has become top
    assert upright.getpixel((4, 13))[0] < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_is_no_obstacle():
    image = reopened(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage")
    assert to_rgb(image).size == (8, 8)


def test_fit_leaves_the_right_size_alone():
    image = picture(8, 8)
    fitted = fit(image, 8)
    assert fitted.dtype == torch.uint8
    assert np.array_equal(fitted.permute(1, 2, 0).numpy(), np.array(image))


@pytest.mark.parametrize(
    ("width", "height", "size", "side"),
    [(50, 37, 16, 16), (20, 31, 64, 64), (250, 200, 160, 183), (300, 240, 224, 256)],
)
def test_fit_is_resize_then_centre_crop(width, height, size, side):
    image = picture(width, height)
    wide, high = side * width // min(width, height), side * height // min(width, height)
    whole = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - size) // 2, (high - size) // 2
    expected = np.array(whole.crop((left, top, left + size, top + size))).astype(int)
    difference = np.abs(fit(image, size).permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 1  # the two round in another order


def test_fit_of_an_extreme_shape_needs_little_memory():
    assert fit(Image.new("RGB", (60_000, 1)), 224).shape == (3, 224, 224)


# --- many pictures


def test_memory_images_are_in_order_and_named(tmp_path):
    paths = files(tmp_path, 300)
    images = memory_images(PathSource(paths), torch.arange(300), 8)
    assert images.pixels[:, 0, 0, 0].tolist() == [i % 256 for i in range(300)]
    assert images.name(17) == paths[17]
    assert images.load([5, 2]).shape == (2, 3, 8, 8)
    assert int(images.original(7)[0, 0, 0]) == 7
    pixels, label = images[9]
    assert (int(pixels[0, 0, 0]), label) == (9, 9)
    assert (images.unreadable, images.image_size, len(images)) == (0, 8, 300)


def test_threads_and_one_thread_agree(tmp_path, monkeypatch):
    source, labels = PathSource(files(tmp_path, 60)), torch.arange(60)
    monkeypatch.setattr(decode, "_CHUNK", 8)
    alone = memory_images(source, labels, 8)
    monkeypatch.setattr(decode, "_WORTH_THREADS", 0.0)
    assert torch.equal(memory_images(source, labels, 8).pixels, alone.pixels)


def test_one_percent_is_skipped_named_and_counted(tmp_path, caplog):
    paths = files(tmp_path, 198)
    whole = io.BytesIO()
    picture(64, 64).save(whole, "JPEG")
    truncated, text = tmp_path / "cut.jpg", tmp_path / "text.jpg"
    truncated.write_bytes(whole.getvalue()[:-400])
    text.write_text("this is no picture")
    paths = [str(truncated), *paths[:100], str(text), *paths[100:]]
    images = memory_images(PathSource(paths), torch.arange(200), 8)
    assert images.unreadable == 2
    assert images.labels.tolist() == [i for i in range(200) if i not in (0, 101)]
    assert images.pixels[:, 0, 0, 0].tolist() == list(range(198))
    assert [images.name(0), images.name(100)] == [paths[1], paths[102]]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 of 200 images" in record.message
    assert str(truncated) in record.message
    assert str(text) in record.message


@pytest.mark.parametrize(("total", "most"), [(500, 5), (100, 3), (31, 3), (6, 3), (3, 1)])
def test_more_than_one_percent_and_a_few_are_refused(total, most, tmp_path):
    paths = files(tmp_path, total - most, bad=most + 1)
    enough = PathSource(paths[:total])
    assert len(memory_images(enough, torch.zeros(total), 8)) == total - most
    check_sample(enough, 8)
    source = PathSource(paths[1:])
    last = rf"{most + 1} of {total} images cannot be read.*{total:04}\.png"
    with pytest.raises(DataError, match=last):
        memory_images(source, torch.zeros(total), 8)
    with pytest.raises(DataError, match=f"{most + 1} of {total} images"):
        check_sample(source, 8)


def test_what_starts_other_programs_is_not_opened_under_another_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", "EPS")
    with pytest.raises(UnidentifiedImageError):
        PathSource([str(tmp_path / "a.jpg")]).open(0)


def test_all_unreadable_is_refused_with_twenty_names(tmp_path):
    with pytest.raises(DataError, match=r"25 of 25 .*0019\.png and 5 more$"):
        memory_images(PathSource(files(tmp_path, 0, bad=25)), torch.zeros(25), 8)


def test_a_sample_is_seeded_and_bounded(tmp_path):
    opened = []

    class Counting(PathSource):
        def image(self, index, at_least=None):
            opened.append(self.paths[index])
            return super().image(index, at_least)

        def take(self, indices):
            return Counting([self.paths[i] for i in indices])

    source = Counting(files(tmp_path, 30))
    check_sample(source, 8, seed=1, most=10)
    first = sorted(opened)
    opened.clear()
    check_sample(source, 8, seed=1, most=10)
    assert sorted(opened) == first
    assert len(set(first)) == 10


def test_file_images_decode_on_demand(tmp_path):
    path = tmp_path / "a.png"
    picture(20, 12).save(path)
    images = pickle.loads(pickle.dumps(FileImages(PathSource([str(path)]), torch.tensor([3]), 8)))
    assert images.load([0, 0]).shape == (2, 3, 8, 8)
    original = images.original(0)
    assert original.shape == (3, 12, 20)
    assert np.array_equal(original.permute(1, 2, 0).numpy(), np.array(picture(20, 12)))


def test_a_damaged_file_is_replaced_by_the_next_of_its_class(tmp_path, caplog):
    paths = files(tmp_path, 4, bad=1)
    order = [paths[0], paths[4], paths[1], paths[2], paths[3]]  # the damaged one is second
    images = FileImages(PathSource(order), torch.tensor([0, 0, 1, 0, 1]), 8)
    for _ in range(2):
        assert images.load([1])[0, 0, 0, 0] == 2  # position 3: next with label 0
    assert images.original(1)[0, 0, 0] == 2
    assert images.unreadable == 1
    [record] = caplog.records
    assert paths[4] in record.message
    alone = FileImages(PathSource(order), torch.tensor([0, 7, 0, 0, 0]), 8)
    with pytest.raises(DataError, match="nor any other image of its class"):
        alone.load([1])


def test_large_jpegs_are_reduced_but_alike(tmp_path):
    path = tmp_path / "large.jpg"
    wave = (127 + 120 * np.sin(np.linspace(0, 32 * np.pi, 640))).astype(np.uint8)
    Image.fromarray(np.tile(wave, (480, 1))).convert("RGB").save(path, quality=95)
    source = PathSource([str(path)])
    assert source.image(0, at_least=64).size == (160, 120)
    small = memory_images(source, torch.zeros(1), 32).pixels[0].int()
    assert (small - fit(source.image(0), 32).int()).abs().max() <= 3


def test_typical_side_is_the_median_of_the_shorter_sides(tmp_path):
    sizes = [(30, 10), (20, 50), (40, 60), (9, 9), (70, 80)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    assert typical_side(PathSource(paths)) == 20
    with pytest.raises(DataError, match="2 of 2"):
        typical_side(PathSource([str(tmp_path / "gone.png"), str(tmp_path)]))


def test_arrays_are_pictures_too():
    gray = ArraySource(np.full((3, 4, 4), 9, dtype=np.uint8), "toy test", [5, 6, 8]).take([0, 2])
    assert (gray.name(1), len(gray)) == ("toy test 8", 2)
    assert torch.equal(gray.stacked(), torch.full((2, 3, 4, 4), 9, dtype=torch.uint8))
    assert isinstance(memory_images(gray, torch.zeros(2), 8), MemoryImages)
