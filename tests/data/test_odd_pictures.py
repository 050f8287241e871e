"""Files that are damaged, too large or unusual: read rightly, or named; nothing else is printed."""

import io
import logging
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from ssl_samix.data.decode import memory_images, typical_side
from ssl_samix.data.images import FileImages, to_rgb
from ssl_samix.data.sources import PathSource, UnusableImage, set_up_pillow
from ssl_samix.errors import ConfigError, DataError


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(data, x=0, y=0):
    image = to_rgb(Image.open(io.BytesIO(data)))
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(path, width, height):
    """Write a PNG of a few bytes that begins like a sound one of this size."""
    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    path.write_bytes(start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return PathSource([str(path)])


# --- size


def test_pictures_up_to_500_megapixels_are_read_without_a_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_up_pillow()
        assert typical_side(header(tmp_path / "a.png", 20_000, 10_000)) == 10_000
        assert typical_side(header(tmp_path / "b.png", 25_000, 19_000)) == 19_000


def test_a_larger_one_is_refused_with_its_size_and_the_way_out(tmp_path, monkeypatch):
    source = header(tmp_path / "a.png", 25_000, 24_000)
    reason = r"a\.png \(600 megapixels, and the limit is 500: raise it with SSL_SAMIX_MAX_MEGA"
    for read in (
        lambda: memory_images(source, torch.zeros(1), 8),
        lambda: typical_side(source),
        lambda: FileImages(source, torch.zeros(1), 8).load([0]),
    ):
        with pytest.raises(DataError, match=reason.replace(r" \(", r".*\(")):
            read()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # and back again after the test
    monkeypatch.setenv("SSL_SAMIX_MAX_MEGAPIXELS", "600")
    set_up_pillow()
    assert typical_side(source) == 24_000


@pytest.mark.parametrize("limit", ["many", "0", "nan", "inf"])
def test_a_limit_that_is_not_a_number(limit, monkeypatch):
    monkeypatch.setenv("SSL_SAMIX_MAX_MEGAPIXELS", limit)
    with pytest.raises(ConfigError, match=rf"SSL_SAMIX_MAX_MEGAPIXELS must be .*{limit}"):
        set_up_pillow()


# --- damage


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_damaged_avif_counts_as_damaged(tmp_path):
    sound = saved(Image.linear_gradient("L").resize((64, 64)).convert("RGB"), "AVIF")
    damaged = [
        sound[:-16] + bytes(16),  # found while decoding
        sound.replace(b"pitm", b"xxxx"),  # found while opening
        sound[:-30],
        sound[:60],
    ]
    source = PathSource([str(tmp_path / f"{i}.avif") for i in range(4)])
    for path, data in zip(source.paths, damaged, strict=True):
        Path(path).write_bytes(data)
    with pytest.raises(DataError, match=r"4 of 4 images cannot be read.*0\.avif, .*3\.avif"):
        memory_images(source, torch.zeros(4), 8)
    with pytest.raises(DataError, match=r"2 of 2 images"):
        typical_side(source.take([1, 3]))


def test_pillow_says_nothing_about_damaged_and_odd_files(caplog):
    tiff = saved(Image.new("RGB", (8, 8)), "TIFF")
    samples = struct.pack("<HHI", 277, 3, 1)  # SamplesPerPixel
    files = [
        saved(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage"),
        tiff[:100],
        tiff.replace(samples + struct.pack("<I", 3), samples + struct.pack("<I", 99)),
    ]

    def remarks(prepare):
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepare()
            for data in files:
                with suppress(OSError):  # some are damaged, some only odd
                    rgb(data)
        return len(caught), len(caplog.records)

    by_itself = remarks(lambda: logging.getLogger("PIL").setLevel(logging.WARNING))
    assert min(by_itself) >= 1
    assert remarks(set_up_pillow) == (0, 0)


# --- modes


@pytest.mark.parametrize(
    ("ink", "expected"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 100), (155, 155, 155)),
    ],
)
def test_cmyk_and_ycck_jpegs(ink, expected):
    cmyk = saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    # the same with its inks as luminance and chrominance, which is what Photoshop writes
    y, cb, cr = Image.new("RGB", (1, 1), ink[:3]).convert("YCbCr").getpixel((0, 0))
    stored = Image.new("CMYK", (16, 16), (255 - y, 255 - cb, 255 - cr, ink[3]))
    data = bytearray(saved(stored, "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2  # YCCK
    for kind in (cmyk, bytes(data)):
        assert np.abs(np.subtract(rgb(kind), expected)).max() <= 2


def test_transparency_of_every_kind():
    """A clear pixel is white, an opaque one keeps its colour, half of black is middle gray."""
    alpha = Image.frombytes("L", (3, 1), bytes([0, 128, 255]))
    gray = Image.merge("LA", (Image.new("L", (3, 1), 0), alpha))
    for image in (
        gray,
        gray.convert("La"),
        gray.convert("RGBA"),
        gray.convert("RGBA").convert("RGBa"),
    ):
        assert np.array(to_rgb(image))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3], image.mode
    palette = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    palette.putpalette([0] * 768)
    half_clear = saved(palette, "PNG", transparency=bytes([0, 128, 255]))
    assert [rgb(half_clear, x) for x in range(3)] == [(255,) * 3, (127,) * 3, (0,) * 3]
    palette.putpalette([0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 255], "RGBA")
    assert np.array(to_rgb(palette))[0, :, 0].tolist() == [255, 127, 0]
    red = saved(Image.new("RGB", (2, 2), (255, 0, 0)), "PNG", transparency=(255, 0, 0))
    assert rgb(red) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit(kind):
    data = saved(Image.fromarray(np.array([[True, False]])), kind)
    assert (rgb(data), rgb(data, 1)) == ((255,) * 3, (0,) * 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_once(kind, orientation):
    image = Image.new("RGB", (32, 16))
    image.paste("white", (0, 0, 16, 8))  # upper left
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    upright = to_rgb(Image.open(io.BytesIO(saved(image, kind, exif=exif, **options))))
    assert upright.size == ((32, 16) if orientation < 5 else (16, 32))
    corners = [(1, 1), (upright.width - 2, 1), (-2 + upright.width, upright.height - 2)]
    corners.append((1, upright.height - 2))  # clockwise
    bright = [upright.getpixel(corner)[0] > 128 for corner in corners]
    assert bright.index(True) == (0, 0, 1, 2, 3, 0, 1, 2, 3)[orientation]
    assert sum(bright) == 1


def test_colour_of_16_bits(tmp_path):
    """Pillow keeps the upper 8 bits, of which 12-bit values leave next to nothing."""

    def png(values):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        size = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
        path = tmp_path / "a.png"
        parts = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
        return PathSource([str(path)])

    values = np.linspace(0, 65535, 48).reshape(4, 4, 3)
    levels = np.array(to_rgb(png(values).image(0))).astype(int)
    assert np.abs(levels - values / 257).max() <= 1
    with pytest.raises(UnusableImage, match="16 bits per channel"):
        png(values / 16).image(0)
