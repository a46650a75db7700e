import os
import tracemalloc

import numpy as np
import pytest

from tools.cli import InputError
from tools.files import atomic_path, read_depth, read_image, write_depth, write_image
from tools.records import Field, read_record, write_record

RECORD = {
    "image_path": "Undistorted_SfM/0000/images/größe.jpg", "depth_path": None, "image_size": np.array([640, 480]),
    "intrinsics": np.eye(3), "keypoints": np.arange(14, dtype="f4").reshape(7, 2),
    "descriptors": np.arange(7 * 128).reshape(7, 128).astype("f2"), "empty": np.zeros((0, 2), "i4"), "overlap": 0.25,
}


@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_written_is_read(tmp_path, mmap):
    write_record(tmp_path / "a" / "r.npy", RECORD)
    record = read_record(tmp_path / "a" / "r.npy", mmap=mmap)
    assert list(record) == list(RECORD)
    assert record["image_path"] == RECORD["image_path"]
    assert record["depth_path"] == ""
    assert record["overlap"] == 0.25
    for name in ("image_size", "intrinsics", "keypoints", "descriptors", "empty"):
        np.testing.assert_array_equal(record[name], RECORD[name])
        assert record[name].dtype == RECORD[name].dtype
    assert isinstance(record["descriptors"], np.memmap) == mmap


def test_the_format_is_plain_npy_without_pickle(tmp_path):
    write_record(tmp_path / "r.npy", RECORD)
    packed = np.load(tmp_path / "r.npy", allow_pickle=False)
    assert packed.shape == ()
    assert str(packed["image_path"]) == RECORD["image_path"]
    np.testing.assert_array_equal(packed["keypoints"], RECORD["keypoints"])


def test_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a.npy", "b.npy"):
        write_record(tmp_path / name, RECORD)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_objects_are_not_written(tmp_path):
    with pytest.raises(TypeError, match="field x"):
        write_record(tmp_path / "r.npy", {"x": {"a": 1}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:20], lambda data: b"",
                                    lambda data: b"x" * 99])
def test_damaged_records_are_named(tmp_path, damage):
    path = tmp_path / "r.npy"
    write_record(path, RECORD)
    path.write_bytes(damage(path.read_bytes()))
    for mmap in (False, True):
        with pytest.raises(InputError, match=r"r\.npy"):
            read_record(path, mmap=mmap)


def test_missing_record_and_other_arrays(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.npy"):
        read_record(tmp_path / "nothing.npy")
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(InputError, match="no named fields"):
        read_record(tmp_path / "plain.npy")


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "r.npy")
    with pytest.raises(InputError, match="pipe, not a record"):
        read_record(tmp_path / "r.npy")


@pytest.mark.parametrize("mmap", [False, True])
def test_what_a_header_claims_is_checked_before_memory_is_taken(tmp_path, mmap):
    dtype = np.dtype([("keypoints", "f4", (2 ** 27, 2))])
    header = {"descr": dtype.descr, "fortran_order": False, "shape": ()}
    with open(tmp_path / "r.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1000))
    tracemalloc.start()
    with pytest.raises(InputError, match="ends too soon"):
        read_record(tmp_path / "r.npy", mmap=mmap)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 ** 6


FIELDS = {"keypoints": Field("f", ("N", 2)), "descriptors": Field("f", ("N", "D")), "overlap": Field("f"),
          "more": Field("i", ("N",), optional=True)}


@pytest.mark.parametrize("mmap", [False, True])
def test_fields_are_checked_and_no_others_returned(tmp_path, mmap):
    write_record(tmp_path / "r.npy", RECORD)
    record = read_record(tmp_path / "r.npy", FIELDS, mmap, D=128)
    assert list(record) == ["keypoints", "descriptors", "overlap"] and record["descriptors"].shape == (7, 128)
    for changed, lengths, said in (({}, {"D": 64}, r"descriptors are \(7, 128\), not \(7, 64\)"),
                                ({}, {"N": 8}, r"keypoints are \(7, 2\), not \(8, 2\)"),
                                ({"more": np.arange(6)}, {}, r"more are \(6,\), not \(7,\)"),
                                ({"overlap": "half"}, {}, "overlap is of type <U4")):
        write_record(tmp_path / "r.npy", {**RECORD, **changed})
        with pytest.raises(InputError, match=r"r\.npy is damaged: its " + said):
            read_record(tmp_path / "r.npy", FIELDS, mmap, **lengths)


def test_letters_that_do_not_exist(tmp_path):
    write_record(tmp_path / "r.npy", {"image_path": "größe"})
    data = (tmp_path / "r.npy").read_bytes()
    (tmp_path / "r.npy").write_bytes(data.replace("ß".encode("utf-32-le"), b"\xff" * 4))
    for fields in (None, {"image_path": Field("U")}):
        with pytest.raises(InputError, match="its image_path is not text"):
            read_record(tmp_path / "r.npy", fields)


def test_an_older_record_is_read(tmp_path):
    """Written by NumPy itself, not aligned, its fields in another order, with one that is not known."""
    write_record(tmp_path / "new.npy", RECORD)
    arrays = {name: np.asarray(value) for name, value in reversed(read_record(tmp_path / "new.npy").items())}
    dtype = np.dtype([(name, array.dtype, array.shape) for name, array in arrays.items()])
    np.save(tmp_path / "old.npy", np.array(tuple(arrays.values()), dtype))
    old = read_record(tmp_path / "old.npy", FIELDS)
    assert all(np.array_equal(old[name], RECORD[name]) for name in ("keypoints", "descriptors", "overlap"))


def test_records_with_pickles_are_refused(tmp_path):
    np.save(tmp_path / "p.npy", np.array({"a": 1}, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"p\.npy"):
        read_record(tmp_path / "p.npy")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f.txt"]


def test_depth_maps(tmp_path):
    depth = np.array([[0.5, 2, 0], [-1, np.nan, 7]], np.float32)
    write_depth(tmp_path / "d.h5", depth)
    np.testing.assert_array_equal(read_depth(tmp_path / "d.h5"), [[0.5, 2, 0], [0, 0, 7]])
    write_image(tmp_path / "d.png", np.array([[500, 0], [65535, 1234]], np.uint16))
    np.testing.assert_allclose(read_depth(tmp_path / "d.png"), [[0.5, 0], [0, 1.234]])
    (tmp_path / "bad.h5").write_bytes(b"not hdf5")
    write_image(tmp_path / "color.png", np.zeros((4, 4, 3), np.uint8))
    for name in ("bad.h5", "color.png", "missing.h5"):
        with pytest.raises(InputError, match=name):
            read_depth(tmp_path / name)


def test_images_are_read_as_stored(tmp_path):
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, :10] = 255
    write_image(tmp_path / "a.jpg", image)
    data = (tmp_path / "a.jpg").read_bytes()
    # an EXIF block that says: turn me by 90 degrees (orientation 6)
    tiff = b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00"
    exif = b"Exif\x00\x00" + tiff
    (tmp_path / "turned.jpg").write_bytes(data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:])
    assert read_image(tmp_path / "turned.jpg").shape == (20, 30)
    assert read_image(tmp_path / "turned.jpg", color=True).shape == (20, 30, 3)
    (tmp_path / "bad.jpg").write_bytes(b"hello")
    for name in ("bad.jpg", "missing.jpg"):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)
