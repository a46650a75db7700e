import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.ExifTags import IFD

from tools.exif import Exif, read_exif

ORIENTATION, WIDTH, HEIGHT, FOCAL, FOCAL_35MM, RESOLUTION, UNIT = (0x0112, 0xA002, 0xA003, 0x920A, 0xA405, 0xA20E,
                                                                   0xA210)


def photograph(path, tags=None, orientation=None, size=(400, 300)):
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    exif.get_ifd(IFD.Exif).update(tags or {})
    Image.new("RGB", size, (90, 120, 60)).save(path, exif=exif)
    return path


def test_the_35_mm_equivalent_is_by_the_diagonal(tmp_path):
    # 36 x 24 mm film has a diagonal of 43.27 mm, the image one of 500 pixels
    focal = read_exif(photograph(tmp_path / "a.jpg", {FOCAL_35MM: 26})).focal
    assert focal == pytest.approx(26 / 43.2666 * 500, rel=1e-4)


@pytest.mark.parametrize("unit, resolution", [(2, 2540.0), (3, 1000.0), (4, 100.0)])
def test_resolution_of_the_focal_plane(tmp_path, unit, resolution):
    # 100 pixels a millimetre in an image of twice the size
    tags = {FOCAL: 8.0, RESOLUTION: resolution, UNIT: unit, WIDTH: 800, HEIGHT: 600}
    assert read_exif(photograph(tmp_path / "a.jpg", tags)).focal == pytest.approx(400)
    assert read_exif(photograph(tmp_path / "b.jpg", {**tags, FOCAL_35MM: 26})).focal == pytest.approx(300.4, abs=0.1)


def test_an_image_that_was_turned_later_keeps_its_focal_length(tmp_path):
    tags = {FOCAL: 8.0, RESOLUTION: 1000.0, UNIT: 3, WIDTH: 800, HEIGHT: 600}
    assert read_exif(photograph(tmp_path / "a.jpg", tags, size=(300, 400))).focal == pytest.approx(400)


@pytest.mark.parametrize("tags", [
    {}, {FOCAL: 8.0}, {FOCAL_35MM: 0}, {FOCAL: 8.0, RESOLUTION: 0.0}, {FOCAL_35MM: 60000},
    {FOCAL_35MM: 26, WIDTH: 400, HEIGHT: 400},  # cropped since
    {FOCAL: 200.0, RESOLUTION: 3444.0, UNIT: 2, WIDTH: 400, HEIGHT: 300},  # made smaller since, and half of the tags
])
def test_tags_that_do_not_say_it_are_no_guess(tmp_path, tags):
    assert read_exif(photograph(tmp_path / "a.jpg", tags)).focal is None


@pytest.mark.parametrize("orientation, turns", [(None, 0), (1, 0), (3, 2), (6, 3), (8, 1), (2, 0), (99, 0)])
def test_orientation(tmp_path, orientation, turns):
    assert read_exif(photograph(tmp_path / "a.jpg", orientation=orientation)).turns == turns


def test_turns_are_those_that_viewers_make(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50), dtype=np.uint8)
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(pixels).save(path, exif=exif)
        with Image.open(path) as image:
            upright = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(np.rot90(pixels, read_exif(path).turns), upright)


def test_damaged_and_missing_files_say_nothing(tmp_path):
    whole = photograph(tmp_path / "a.jpg", {FOCAL_35MM: 26}, orientation=6).read_bytes()
    assert read_exif(tmp_path / "a.jpg") != Exif()
    assert read_exif(tmp_path / "none.jpg") == Exif()
    for number, content in enumerate((b"", b"no image", whole[:20], whole[:60])):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(content)
        assert read_exif(path) == Exif()
    # a picture larger than Pillow opens
    header = b"IHDR" + struct.pack(">2I5B", 60000, 60000, 8, 0, 0, 0, 0)
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
                                        + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I4s", 0, b"IDAT"))
    assert read_exif(tmp_path / "huge.png") == Exif()
    start = whole.index(b"Exif\0\0") + 6
    noise = np.random.default_rng(0)
    for number in range(30):  # whatever is in the tags, reading ends
        damaged = bytearray(whole)
        for place in noise.integers(start, start + 90, 12):
            damaged[place] = noise.integers(256)
        path = tmp_path / f"noise{number}.jpg"
        path.write_bytes(damaged)
        assert isinstance(read_exif(path), Exif)
