"""Gray that is not 8 bits: what becomes black, what white, and what is refused."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_samix.data.decode import memory_images
from ssl_samix.data.images import to_rgb
from ssl_samix.data.sources import PathSource, UnusableImage
from ssl_samix.errors import DataError

RAMP = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)
LEVELS = np.rint(RAMP * 255).astype(int)
HOLE = np.s_[16:32]  # rows


def saved(values, kind="TIFF", **options):
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


def retagged(data, **tags):
    """Overwrite tags of a little-endian TIFF that hold one number of 16 bits."""
    for name, value in tags.items():
        number = {"width": 256, "bits": 258, "photometric": 262, "sample_format": 339}[name]
        for entry in (struct.pack("<HHI", number, 3, 1), struct.pack("<HHI", number, 4, 1)):
            data = b"".join(
                part if i == 0 else entry + struct.pack("<I", value) + part[4:]
                for i, part in enumerate(data.split(entry, 1))
            )
    return data


def gray(data):
    """Return the levels of an encoded picture, (h, w); all channels are the same."""
    levels = np.array(to_rgb(Image.open(io.BytesIO(data)))).astype(int)
    assert (levels == levels[..., :1]).all()
    return levels[..., 0]


def near(levels, expected, most=1):
    return np.abs(levels - expected).max() <= most


@pytest.mark.parametrize("scale", [1.0, 255.0, 4095.0, 1e-3])
def test_floats_of_any_range(scale):
    assert near(gray(saved(RAMP * scale)), LEVELS)
    assert near(gray(saved(RAMP * scale - 0.4 * scale)), LEVELS)


@pytest.mark.parametrize("outlier", [1.0001, 50.0, -50.0, 1e9])
def test_one_outlier_changes_no_other_pixel(outlier):
    values = RAMP.copy()
    values[5, 5] = outlier
    levels = gray(saved(values))
    levels[5, 5] = LEVELS[5, 5]
    assert near(levels, LEVELS)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf, 3.4028235e38, -9999.0, -3.4e38])
def test_missing_values_are_black_and_change_nothing_else(missing):
    values = RAMP + 5
    values[HOLE] = missing
    levels = gray(saved(values))
    assert (levels[HOLE] == 0).all()
    levels[HOLE] = LEVELS[HOLE]
    assert near(levels, LEVELS)


@pytest.mark.parametrize(("missing", "level"), [(0, 0), (65535, 255)])
def test_missing_values_of_whole_numbers(missing, level):
    values = np.rint(RAMP * 1000 + 3000).astype(np.uint16)
    values[HOLE] = missing
    levels = gray(saved(values))
    assert (levels[HOLE] == level).all()
    levels[HOLE] = LEVELS[HOLE]
    assert near(levels, LEVELS)


def test_the_missing_value_that_gdal_names():
    values = RAMP.copy()
    values[HOLE] = -1.5  # too near to be told from the rest
    levels = gray(saved(values, tiffinfo={42113: "-1.5"}))
    assert (levels[HOLE] == 0).all()
    levels[HOLE] = LEVELS[HOLE]
    assert near(levels, LEVELS)
    assert near(gray(saved(RAMP, tiffinfo={42113: "-1.7976931348623157e+308"})), LEVELS)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "JPEG2000"])
def test_12_bits_in_a_16_bit_file(kind):
    levels = gray(saved(np.rint(RAMP * 4095).astype(np.uint16), kind))
    assert near(levels, LEVELS)
    assert len(np.unique(levels)) > 250


def test_whole_numbers_of_32_bits():
    assert near(gray(saved(np.rint(RAMP * 1000).astype(np.int32))), LEVELS)
    assert near(
        gray(saved(np.rint(RAMP.astype(np.float64) * 2.0e9 - 1e9).astype(np.int32))), LEVELS
    )
    large = np.rint(RAMP.astype(np.float64) * 4.0e9).astype(np.uint32)
    assert near(gray(retagged(saved(large.view(np.int32)), sample_format=1)), LEVELS)


def test_a_hot_pixel_does_not_darken_the_picture():
    values = np.rint(RAMP * 4095).astype(np.uint16)
    values[0, 0] = 65535
    assert near(gray(saved(values))[1:], LEVELS[1:])


def test_slices_of_a_scan_look_alike_with_and_without_negative_values():
    def scan(bone, air):
        """Return (64, 64): air, tissue at 40, a little bone, in Hounsfield units."""
        noise = np.random.default_rng(0).normal(0, 10, (64, 64))
        values = np.full((64, 64), air) + noise
        values[8:56, 8:56] = 40 + noise[8:56, 8:56]
        values[20:24, 20:40] = bone + noise[20:24, 20:40]
        return np.rint(values)

    signed = [gray(saved(scan(b, -1000).astype(np.int32))) for b in (1000, 1200)]
    shifted = gray(saved((scan(1000, -1000) + 1024 + 1).clip(0).astype(np.uint16)))
    assert near(shifted, signed[0])
    tissue = [np.median(levels[40:50, 40:50]) for levels in signed]
    assert all(110 < level < 140 for level in tissue)
    assert abs(tissue[0] - tissue[1]) < 15


def test_a_declared_range_keeps_slices_alike():
    tags = {340: 0.0, 341: 4095.0}  # SMinSampleValue, SMaxSampleValue
    for most in (4095, 2000):
        values = np.rint(RAMP * most).astype(np.uint16)
        assert near(gray(saved(values, tiffinfo=tags)), values / 4095 * 255)
        assert near(gray(saved(values, tiffinfo={281: 4095})), values / 4095 * 255)
    pgm = b"P5 64 64 4095\n" + np.rint(RAMP * 2000).astype(">u2").tobytes()
    assert near(gray(pgm), np.rint(RAMP * 2000) * 255 / 4095)


@pytest.mark.parametrize("declared", [{341: 65535.0}, {341: 100.0}, {340: 9.0, 341: 9.0}])
def test_a_declared_range_that_would_hide_the_picture_is_not_used(declared):
    values = np.rint(RAMP * 4095).astype(np.uint16)
    assert near(gray(saved(values, tiffinfo=declared)), LEVELS)


def test_12_bits_per_sample():
    """Two values in three bytes; such a file says itself how bright its values are."""
    values = np.arange(0, 2000, 250)
    bits = "".join(f"{value:012b}" for value in values)
    packed = np.frombuffer(int(bits, 2).to_bytes(12, "big"), np.uint8)[None]
    data = retagged(saved(packed), bits=12, width=8)
    assert near(gray(data)[0], values / 4095 * 255)


def test_few_levels_keep_their_distances():
    for values in ([[0, 200, 255]], [[0, 55, 255]]):
        assert gray(saved(np.array(values, dtype=np.uint16))).tolist() == values
    assert gray(saved(np.array([[-1, 0, 0, 1]], dtype=np.int32))).tolist() == [[0, 128, 128, 255]]


def test_a_little_light_on_black_stays_visible():
    values = np.zeros((64, 64), dtype=np.uint16)
    values[0, :2] = (500, 1000)
    levels = gray(saved(values))
    assert levels[0, :3].tolist() == [128, 255, 0]


def test_nothing_at_all_is_black():
    for kind in (np.uint16, np.int32, np.float32):
        assert (gray(saved(np.zeros((8, 8), dtype=kind))) == 0).all()


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "no pixel has a finite value"), (-1024.0, "the value -1024")]
)
def test_what_cannot_be_understood_counts_as_damaged(value, reason, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(saved(np.full((8, 8), value, dtype=np.float32)))
    with pytest.raises(UnusableImage, match=reason):
        to_rgb(Image.open(path))
    with pytest.raises(DataError, match=rf"1 of 1 images cannot be read.*a\.tif \(.*{reason}"):
        memory_images(PathSource([str(path)]), torch.zeros(1), 8)


def test_one_value_in_a_declared_range():
    assert (gray(b"P5 2 2 4095\n" + np.full(4, 1638, ">u2").tobytes()) == 102).all()


def test_white_is_zero():
    assert near(gray(retagged(saved(RAMP), photometric=0)), 255 - LEVELS)
    deep = np.rint(RAMP * 4095).astype(np.uint16)
    assert near(gray(retagged(saved(deep), photometric=0)), 255 - LEVELS)
    assert near(gray(retagged(saved(LEVELS.astype(np.uint8)), photometric=0)), 255 - LEVELS)


def test_signed_bytes():
    data = saved((LEVELS - 128).astype(np.int8).view(np.uint8), tiffinfo={339: 2})
    assert near(gray(data), LEVELS)


def test_big_endian():
    values = np.rint(RAMP * 4095).astype(">u2")
    image = Image.frombytes("I;16B", (64, 64), values.tobytes())
    assert near(np.array(to_rgb(image))[..., 0].astype(int), LEVELS)


def test_the_transparent_value_of_a_16_bit_png_is_white():
    values = np.rint(RAMP * 1000 + 3000).astype(np.uint16)
    values[HOLE] = 7
    levels = gray(saved(values, "PNG", transparency=7))
    assert (levels[HOLE] == 255).all()
    levels[HOLE] = LEVELS[HOLE]
    assert near(levels, LEVELS)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_gray_is_turned_upright_once(kind):
    values = (np.arange(6 * 4) * 100).astype(np.uint16).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    levels = gray(saved(values, kind, exif=exif))
    assert near(levels, np.rot90(values, -1) / 2300 * 255)
