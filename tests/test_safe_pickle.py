import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest

from tools.cli import InputError
from tools.safe_pickle import load_npz, load_pickle, numbers
from tools.scene_info import (
    MATRIX_FIELDS,
    OBJECT_FIELDS,
    candidate_pairs,
    list_scenes,
    load_scene_info,
    write_scene_info,
)

WITNESS = "code_ran"


class Malicious:
    """Unpickled the ordinary way, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (WITNESS,)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def objects(*values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def scene_info():
    info = {name: objects(None, None) for name in OBJECT_FIELDS}
    info.update({name: np.array([[1, 0.5], [0.25, 1]]) for name in MATRIX_FIELDS})
    info["image_paths"] = objects("Undistorted_SfM/0000/images/a.jpg", None)
    info["intrinsics"] = objects(np.eye(3), np.eye(3))
    info["points3D_id_to_2D"] = objects({7: [1.5, 2.5], np.int64(9): np.array([3.0, 4.0])}, {})
    return info


def test_the_ordinary_way_would_run_the_code():
    np.savez("bad.npz", image_paths=objects(Malicious()))
    with np.load("bad.npz", allow_pickle=True) as archive:
        archive["image_paths"]
    assert os.path.isdir(WITNESS)


def test_scene_info_with_code_in_it_is_refused_and_nothing_runs():
    info = scene_info()
    info["image_paths"] = objects("a.jpg", Malicious())
    np.savez("bad.npz", **info)
    with pytest.raises(InputError, match=r"bad\.npz.*mkdir is not admitted"):
        load_scene_info("bad.npz")
    assert not os.path.exists(WITNESS)


@pytest.mark.parametrize("payload", [Malicious(), {"a": [Malicious()]}, np.load, getattr, eval])
def test_pickles_with_more_than_data_are_refused(payload):
    with open("bad.pkl", "wb") as file:
        pickle.dump(payload, file)
    with pytest.raises(InputError, match="not admitted"):
        load_pickle("bad.pkl")
    assert not os.path.exists(WITNESS)


def test_only_the_codec_of_old_byte_strings_is_admitted():
    with open("bad.pkl", "wb") as file:
        file.write(b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")
    with pytest.raises(InputError, match="rot13 is not admitted"):
        load_pickle("bad.pkl")


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\1btR"
DTYPE = b"cnumpy\ndtype\n(U%c%bK\0K\1tR(K\3U\1<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"


def array(code: bytes, shape: bytes, data: bytes) -> bytes:
    """A pickled array, as Python 2 wrote it, but of any dtype, shape and data."""
    return ARRAY + b"(K\1" + shape + DTYPE % (len(code), code) + b"\x89" + data + b"tb"


@pytest.mark.parametrize("pickled, message", [
    (b"cos\nsystem\n(S'mkdir code_ran'\ntR.", "os.system is not admitted"),
    (b"cposix\nsystem\n(S'mkdir code_ran'\ntR.", "posix.system is not admitted"),
    (b"\x80\4\x8c\x08builtins\x8c\4eval\x93\x8c\0011\x85R.", "builtins.eval is not admitted"),
    (b"c__builtin__\ngetattr\n.", "__builtin__.getattr is not admitted"),
    # objects made of bytes: the process died
    (b"\x80\2cnumpy\nndarray\n((K\1tX\1\0\0\0OC\x08AAAAAAAAtR.", "numpy.ndarray is not admitted"),
    (array(b"O", b"K\1\x85", b"U\x08AAAAAAAA") + b".", "as much data"),
    (array(b"O", b"K\2\x85", b"]Na") + b".", "as much data"),
    (array(b"f8", b"K\1\x85", b"U\7AAAAAAA") + b".", "as much data"),
    (array(b"f8", b"I-1\n\x85", b"U\0") + b".", "whole numbers"),
    (array(b"f8", b"I4611686018427387904\nK\4\x86", b"U\0") + b".", "as much data"),
    (array(b"V8", b"K\1\x85", b"U\x08AAAAAAAA") + b".", "'V8' is not admitted"),
    (array(b"O,f8", b"K\1\x85", b"U\x08AAAAAAAA") + b".", "'O,f8' is not admitted"),
    (b"cnumpy\ndtype\n(U\2f8tR(K\3U\1<N(U\1at}U\1aK\1sK\x08K\1K?tb.", "structured dtype"),
    (array(b"f8", b"K\1\x85", b"U\x08AAAAAAAA") + b"(K\1)" + DTYPE % (2, b"f8") + b"\x89U\x08AAAAAAAAtb.", "twice"),
    (array(b"f8", b"K\1\x85", b"U\x08AAAAAAAA") + b"K\0]s.", "read-only"),
    (b"cnumpy.core.multiarray\nscalar\n(" + DTYPE % (1, b"O") + b"U\x08AAAAAAAAtR.", "scalar of objects"),
    # what stands in for functions keeps its own attributes
    (b"cnumpy.core.multiarray\nscalar\nN}S'function'\nNs\x86b.", "has no state"),
    (b"cnumpy\ndtype\nN}S'fullmatch'\nNs\x86b.", "missing 1 required"),
    # memory
    (b"\x80\2]r\xff\xff\xff\x0f.", "opcode b'r' at byte 3"), (b"]p268435455\n.", "opcode b'p' at byte 1"),
    (b"]r\0\0\1\0.", "opcode b'r'"), (b"\x80\4\x95\0\0\0\0\1\0\0\0N.", "cut off"), (b"B\0\0\0\x7f.", "cut off"),
    (b"(" + b"]" * 10 ** 6 + b"l.", "empty lists"), (b"P1\n.", "opcode b'P'"), (b"\x82\1.", "opcode"),
    (b"N", "cut off"),
])
def test_made_up_pickles_are_refused(pickled, message):
    with open("bad.pkl", "wb") as file:
        file.write(pickled)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_pickle("bad.pkl")
    assert "\n" not in str(error.value) and not os.path.exists(WITNESS)


def test_arrays_of_old_programs_and_in_other_orders():
    for name, pickled, wanted in (
            ("old", array(b"f8", b"K\1\x85", b"S'\\x00\\x00\\x00\\x00\\x00\\x00\\xf8?'\n"), np.array([1.5])),
            ("text", pickle.dumps(np.array(["é", "ab"])), np.array(["é", "ab"])),
            ("fortran", pickle.dumps(np.arange(6.0).reshape(2, 3).T), np.arange(6.0).reshape(2, 3).T),
            ("big", pickle.dumps(np.arange(3, dtype=">i4")), np.arange(3))):
        with open(name, "wb") as file:
            file.write(pickled.removesuffix(b".") + b".")
        read = load_pickle(name)
        np.testing.assert_array_equal(read, wanted)
        assert type(pickle.loads(pickle.dumps(read))) is np.ndarray  # no class of ours goes into other files


def test_lists_that_hold_themselves_are_no_numbers():
    within = []
    within += [within, within]
    with open("self.pkl", "wb") as file:
        pickle.dump(within, file)
    with pytest.raises(InputError, match="is not of n x 2 numbers"):
        numbers(load_pickle("self.pkl"), None, 2)
    shared = [1.0, 2.0]
    for _ in range(60):
        shared = [shared, shared]
    with pytest.raises(InputError, match="a pose is not of 2 x 2 numbers"):
        numbers(shared, 2, 2, name="a pose")
    np.testing.assert_array_equal(numbers([(1, np.float32(2))], None, 2), [[1, 2]])


def test_headers_and_zip_files_take_no_more_memory_than_they_may():
    np.savez_compressed("bomb.npz", a=np.zeros(3 * 10 ** 7))
    np.savez("huge.npz", a=np.zeros(3))
    data = open("huge.npz", "rb").read()
    with zipfile.ZipFile("huge.npz", "w") as archive:
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"shape": (2 ** 40,), "fortran_order": False, "descr": "<f8"})
        archive.writestr("a.npy", stream.getvalue() + b"\0" * 24)
    for name, content in (("flipped.npz", data[:150] + b"\xff" + data[151:]), ("cut.npz", data[:100])):
        open(name, "wb").write(content)
    for name, message in (("bomb.npz", "40 times its size"), ("huge.npz", "no 24 bytes"), ("flipped.npz", "damaged"),
                          ("cut.npz", "damaged")):
        with pytest.raises(InputError, match=message):
            load_npz(name)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_data_of_every_protocol_is_read(protocol):
    value = {"list": [(0, 1), (2, 3)], "array": np.arange(6.0).reshape(2, 3), "scalar": np.float32(0.5), "none": None,
             "text": "é", "bytes": b"\x00\xff", "objects": objects([1, 2], {"a": np.arange(2)})}
    with open("good.pkl", "wb") as file:
        pickle.dump(value, file, protocol=protocol)
    read = load_pickle("good.pkl")
    np.testing.assert_array_equal(read["array"], value["array"])
    np.testing.assert_array_equal(read["objects"][1]["a"], [0, 1])
    assert {name: read[name] for name in ("list", "scalar", "none", "text", "bytes")} == {
        name: value[name] for name in ("list", "scalar", "none", "text", "bytes")}


def test_scene_info_is_read_as_written():
    write_scene_info("0000.0.npz", scene_info())
    info = load_scene_info("0000.0.npz")
    assert set(info) == {*OBJECT_FIELDS, *MATRIX_FIELDS}
    assert info["image_paths"].tolist() == ["Undistorted_SfM/0000/images/a.jpg", None]
    assert info["points3D_id_to_2D"][0][7] == [1.5, 2.5]
    np.testing.assert_array_equal(info["overlap_matrix"], [[1, 0.5], [0.25, 1]])
    with np.load("0000.0.npz", allow_pickle=True) as archive:  # as the programs read it that made the format
        np.testing.assert_array_equal(archive["intrinsics"][0], np.eye(3))


def test_one_pickle_named_npz_is_read():
    with open("0015_0.1_0.3.npz", "wb") as file:
        pickle.dump({"image_paths": objects("a", "b"), "pair_infos": [(np.array([0, 1]), 0.2)]}, file)
    assert load_npz("0015_0.1_0.3.npz")["pair_infos"][0][1] == 0.2


def test_damaged_and_foreign_files_are_named():
    write_scene_info("whole.npz", scene_info())
    data = open("whole.npz", "rb").read()
    with open("cut.npz", "wb") as file:
        file.write(data[:len(data) // 2])
    np.savez("other.npz", a=np.zeros(3))
    with open("number.npz", "wb") as file:
        pickle.dump(7, file)
    with zipfile.ZipFile("garbled.npz", "w") as archive:
        archive.writestr("image_paths.npy", b"no numpy header")
    for name, message in (("cut.npz", "cut.npz"), ("other.npz", "lacks image_paths"),
                          ("number.npz", "lacks"), ("garbled.npz", "damaged"),
                          ("missing.npz", "not found")):
        with pytest.raises(InputError, match=message):
            load_scene_info(name)


def broken(**values):
    """A scene_info whose first of two images has these values."""
    info = scene_info()
    info["image_paths"][1] = info["depth_paths"][1] = "b"
    info["depth_paths"][0] = "a.h5"
    info["poses"] = objects(np.eye(4), np.eye(4))
    for name, value in values.items():
        info[name][0] = value
    return info


@pytest.mark.parametrize("values, message", [
    ({"intrinsics": np.zeros((3, 3))}, "intrinsics are not a camera matrix"),
    ({"intrinsics": np.full((3, 3), np.nan)}, "not a camera matrix"),
    ({"intrinsics": np.eye(4)}, "intrinsics is not of 3 x 3 numbers"), ({"intrinsics": "f"}, "is not of"),
    ({"poses": np.diag([1, 1, -1.0, 1])}, "the pose is not a rotation"),
    ({"poses": np.zeros((4, 4))}, "the pose is not a rotation"),
    ({"poses": np.full((4, 4), np.inf)}, "the pose is not a rotation"), ({"poses": {}}, "pose is not of 4 x 4 numbers"),
    ({"image_paths": "../a.jpg"}, "'../a.jpg'"), ({"image_paths": 7}, "a path is not text"),
    ({"depth_paths": "/etc/a.h5"}, "/etc/a.h5"), ({"points3D_id_to_2D": [1]}, "3D points"),
    ({"points3D_id_to_2D": {"a": [1, 2]}}, "3D points"), ({"points3D_id_to_2D": {2 ** 64: [1, 2]}}, "3D points"),
])
def test_an_image_that_cannot_be_used_is_left_out_and_named(values, message):
    write_scene_info("0.npz", broken(**values))
    info = load_scene_info("0.npz")
    assert info["image_paths"].tolist() == [None, "b"] and info["poses"][0] is None
    [(name, why)] = info["left_out"]
    assert message in why and name == str(values.get("image_paths", "Undistorted_SfM/0000/images/a.jpg"))
    assert candidate_pairs(info).shape == (0, 2)


@pytest.mark.parametrize("values, message", [
    ({"overlap_matrix": np.ones((3, 3))}, r"overlap_matrix is \(3, 3\), for 2 images"),
    ({"overlap_matrix": objects("a", "b")}, "overlap_matrix is"),
    ({"poses": [np.eye(4)]}, "poses is missing, or not for"),
    ({"angles": np.array([["a", "b"]] * 2)}, "angles is not of 2 x 2 numbers"), ({"image_paths": []}, "for 0 images"),
    ({"intrinsics": [np.zeros((3, 3))] * 2}, "has no image that can be used; the first: .*not a camera"),
])
def test_a_scene_info_that_is_wrong_as_a_whole(values, message):
    write_scene_info("0.npz", {**broken(), **values})
    with pytest.raises(InputError, match=message):
        load_scene_info("0.npz")


def test_scenes_are_listed_and_missing_ones_named(tmp_path):
    for name in ("0001.0", "0000.0", "0000.1", "kitchen"):
        write_scene_info(tmp_path / "scene_info" / f"{name}.npz", scene_info())
    assert list(list_scenes(tmp_path)) == ["0000", "0000.1", "0001", "kitchen"]
    assert list(list_scenes(tmp_path, ["kitchen", "0000"])) == ["kitchen", "0000"]
    with pytest.raises(InputError, match="no scene 0099"):
        list_scenes(tmp_path, ["0000", "0099"])
    with pytest.raises(InputError, match="no scene_info"):
        list_scenes(tmp_path / "elsewhere")
