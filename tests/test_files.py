"""The doors that every file goes through, and the boundaries of items and commands."""
import errno
import os
import zlib

import cv2
import h5py
import numpy as np
import pytest
from PIL import Image

from eval.match_images import find_images
from tools.cli import InputError, OutputError, reason, run
from tools.files import (
    atomic_path,
    below,
    check_file,
    check_folder,
    hdf5_array,
    hdf5_text,
    open_hdf5,
    read_depth,
    read_image,
    read_json,
    read_lines,
    read_text,
    write_hdf5,
    write_json,
)


def raising(error):
    def main(argv):
        raise error
    return main


# boundaries

@pytest.mark.parametrize("error, said", [
    (InputError("x.txt: two\nlines"), "error: x.txt: two lines\n"),
    (OutputError(errno.ENOSPC, "No space left on device", "out/a.npy"),
     "error: cannot write out/a.npy: No space left on device\n"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "error: x: No such file or directory\n"),
    (MemoryError(), "error: not enough memory\n"),
    (ValueError("bad"), "ValueError: bad (unexpected; --debug shows where)\n"),
])
def test_a_command_ends_in_one_line(error, said, capsys):
    assert run(raising(error), []) == 2
    assert capsys.readouterr().err == said


def test_debug_shows_the_traceback_and_no_command_sees_it(capsys):
    seen = []
    assert run(lambda argv: seen.append(argv), ["--x", "--debug"]) == 0
    assert seen == [["--x"]]
    assert run(raising(ValueError("bad")), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_home_folder_in_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    seen = []
    run(seen.append, ["~/a.jpg", "--save_path=~/out", "--name=x~", "b~c"])
    assert seen == [["/home/me/a.jpg", "--save_path=/home/me/out", "--name=x~", "b~c"]]


def test_an_item_is_skipped_with_one_line_unless_the_machine_is_at_fault():
    assert reason(ValueError("a\nb")) == "ValueError: a b"
    assert reason(InputError("x is damaged")) == "x is damaged"
    assert len(reason(ValueError("x" * 10_000))) <= 510
    for error in (OutputError(errno.EACCES, "Permission denied", "x"), OSError(errno.ENOSPC, "full")):
        with pytest.raises(OSError):
            reason(error)


# writing

def test_a_link_is_replaced_not_written_through(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "link.json"
    victim.write_text("mine")
    link.symlink_to(victim)
    write_json(link, {})
    assert victim.read_text() == "mine" and not link.is_symlink()


def test_what_is_written_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda *_: order.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_json(tmp_path / "a.json", {})
    assert order == ["fsync", "replace"]


def test_a_long_name_is_written_and_a_failure_names_it_and_leaves_nothing(tmp_path):
    with atomic_path(tmp_path / ("n" * 240 + ".npy")) as temporary:
        temporary.write_bytes(b"x")
    with pytest.raises(OutputError, match=r"cannot write .*: File name too long"), \
            atomic_path(tmp_path / ("n" * 260 + ".npy")) as temporary:
        temporary.write_bytes(b"x")
    assert [len(path.name) for path in tmp_path.iterdir()] == [244]


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot write /proc/imp: "):
        check_folder("/proc/imp")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "file" / "x")
    check_folder(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# names and kinds of files

@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "a\0b", "C:\\x", "\\\\host\\x", "..\\x", "C:x"])
def test_names_in_data_stay_below_their_folder(name, tmp_path):
    with pytest.raises(InputError, match="must lie below its folder"):
        below(tmp_path, name)


def test_names_below_a_folder(tmp_path):
    assert below(tmp_path, "a/b..c.jpg") == tmp_path / "a" / "b..c.jpg"


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for read in (check_file, read_image, read_depth, read_text):
        with pytest.raises(InputError, match="a device or pipe"):
            read(tmp_path / "pipe.jpg")
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(InputError, match="not found"):
        read_text(tmp_path / "file" / "x")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_text_as_editors_save_it(encoding, tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("# Liste\r\ncafé.jpg\r\n\r\nb.jpg".encode(encoding))
    assert read_lines(path) == ["café.jpg", "b.jpg"]


@pytest.mark.parametrize("content", [b"\x89PNG\0\0", b"[" * 100_000, b"\xff\xfe\0", b"{"])
def test_what_is_no_json(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(path)


# images and HDF5

def test_a_large_image_is_refused_by_its_header(tmp_path):
    path = tmp_path / "large.png"
    _, png = cv2.imencode(".png", np.zeros((8, 8), np.uint8))
    data = bytearray(png.tobytes())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(InputError, match="too large: 40000x40000"):
        read_image(path)


@pytest.mark.parametrize("dtype, suffix", [(np.uint8, ".png"), (np.uint16, ".png"), (np.uint16, ".tiff"),
                                           (np.float32, ".tiff"), (np.float32, ".pfm"), (np.float32, ".hdr")])
def test_every_bit_depth_is_read_as_8_bit(dtype, suffix, tmp_path):
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32)[:, None, None], (1, 48, 3))
    scale = 1 if dtype == np.float32 else np.iinfo(dtype).max
    assert cv2.imwrite(str(tmp_path / f"ramp{suffix}"), (ramp * scale).astype(dtype))
    for color in (False, True):
        image = read_image(tmp_path / f"ramp{suffix}", color)
        assert image.dtype == np.uint8 and image.shape == ((64, 48, 3) if color else (64, 48))
        np.testing.assert_allclose(image.reshape(64, -1).mean(axis=1), 255 * ramp[:, 0, 0], atol=3)


def test_a_jpeg_that_was_cut_off_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    rng = np.random.default_rng(0)
    assert cv2.imwrite(str(path), rng.integers(0, 256, (64, 64, 3), np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole + b"what some telephones append")
    assert read_image(path).shape == (64, 64)
    for n in (700, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError, match=r"a.jpg is incomplete"):
            read_image(path)


def test_every_format_that_opencv_reads_is_found_and_read(tmp_path):
    ramp = np.tile(np.linspace(40, 215, 64)[:, None, None], (1, 64, 3)).astype(np.uint8)
    for suffix in {".jpg", ".jpeg", ".jpe", ".png", ".tif", ".bmp", ".dib", ".webp", ".avif", ".jp2", ".ppm", ".pnm",
                   ".pam", ".ras", ".sr"}:
        assert cv2.imwrite(str(tmp_path / f"ramp{suffix}"), ramp)
        read = read_image(tmp_path / f"ramp{suffix}", color=True)
        assert np.abs(read.astype(int) - ramp).mean() < 3, suffix
    Image.fromarray(ramp).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(ramp[:, :, 0]).save(tmp_path / "ramp.gif")
    for name in ("cmyk.jpg", "ramp.gif"):
        assert np.abs(read_image(tmp_path / name).astype(int) - ramp[:, :, 0]).mean() < 10
    assert len(find_images(tmp_path)) == 17


def test_hdf5_reads_nothing_outside_the_file_and_believes_no_header(tmp_path):
    other, path = tmp_path / "other.h5", tmp_path / "a.h5"
    with h5py.File(other, "w") as file:
        file["depth"] = np.ones((4, 5), np.float32)
    with h5py.File(path, "w") as file:
        file["good"] = np.ones((4, 5), np.float32)
        file["external"] = h5py.ExternalLink(str(other), "depth")
        file["group/x"] = [1.0]
        file["text"] = "x"
        file.create_dataset("huge", (100_000, 100_000), np.float32, chunks=(100, 100))
        file.create_dataset("storage", (4, 5), np.float32, external=[(str(other), 0, 80)])
        layout = h5py.VirtualLayout((4, 5), np.float32)
        layout[:] = h5py.VirtualSource(str(other), "depth", (4, 5))
        file.create_virtual_dataset("virtual", layout)
    with open_hdf5(path) as file:
        assert hdf5_array(file, "good", (None, 5)).shape == (4, 5)
        assert hdf5_array(file, "group/x", (1,)) == 1
        for name, said in (("external", "link to elsewhere"), ("group", "not a plain"), ("text", "of type"),
                           ("huge", "more than the file"), ("storage", "not a plain"), ("virtual", "not a plain"),
                           ("none", "missing"), ("good/x", "missing")):
            with pytest.raises(InputError, match=said):
                hdf5_array(file, name)
        with pytest.raises(InputError, match="has shape"):
            hdf5_array(file, "good", (4, 4))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"cannot read .*a\.h5"), open_hdf5(path):
        pass


def test_hdf5_is_read_as_written(tmp_path):
    path = tmp_path / "a.h5"
    write_hdf5(path, {"x": np.arange(3)})
    with open_hdf5(path) as file:
        np.testing.assert_array_equal(hdf5_array(file, "x"), [0, 1, 2])


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}, {"userblock_size": 512}])
def test_text_of_hdf5_files_in_the_ways_it_is_stored(tmp_path, options):
    with h5py.File(tmp_path / "a.hdf5", "w", **options) as file:
        names = [letter * n for letter, n in (("ä", 1), ("b", 8), ("c", 1500), ("d", 4000), ("e", 17))]
        for i, name in enumerate(names):
            file[f"scalar/{i}"], file[f"array/{i}"], file[f"fixed/{i}"] = name, [name], np.bytes_(name.encode())
            file.create_dataset(f"chunk/{i}", data=[[name]], maxshape=(None, 1), chunks=(1, 1))
        file["two"], file["number"] = ["a", "b"], 5
        file.create_dataset("packed", data=["a"], compression="gzip")
    with open_hdf5(tmp_path / "a.hdf5") as file:
        for group in ("scalar", "array", "fixed", "chunk"):
            assert [hdf5_text(file[group], str(i)) for i in range(5)] == names
        for name, said in (("two", "not one string"), ("number", "of type int64"), ("packed", "is not read here"),
                           ("none", "is missing"), ("fixed", "not a plain dataset")):
            with pytest.raises(InputError, match=said):
                hdf5_text(file, name)


def test_damaged_text_of_an_hdf5_file_takes_neither_memory_nor_time(tmp_path):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["name"] = "images/0.jpg"
        element = file["name"].id.get_offset()
    whole = path.read_bytes()
    heap = whole.index(b"GCOL")
    for place, value in ((element, 2 ** 30), (element + 4, 2 ** 31), (element + 8, 2 ** 31), (element + 12, 9),
                         (heap, 0), (heap + 8, 20), (heap + 16, 0), (heap + 24, 0), (heap + 28, 2 ** 31)):
        damaged = bytearray(whole)
        damaged[place:place + 4] = value.to_bytes(4, "little")
        path.write_bytes(damaged)
        with open_hdf5(path) as file, pytest.raises(InputError, match=r"name of .*a\.hdf5 is damaged"):
            hdf5_text(file, "name")
