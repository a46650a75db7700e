import os
import pickle
import zipfile

import numpy as np
import pytest

from tools.cli import InputError
from tools.safe_pickle import load_npz, load_pickle
from tools.scene_info import MATRIX_FIELDS, OBJECT_FIELDS, list_scenes, load_scene_info, write_scene_info

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
    with zipfile.ZipFile("garbled.npz", "w") as archive:
        archive.writestr("image_paths.npy", b"no numpy header")
    for name, message in (("cut.npz", "cut.npz"), ("other.npz", "lacks image_paths"), ("garbled.npz", "damaged"),
                          ("missing.npz", "not found")):
        with pytest.raises(InputError, match=message):
            load_scene_info(name)


def test_scenes_are_listed_and_missing_ones_named(tmp_path):
    for name in ("0001.0", "0000.0", "0000.1", "kitchen"):
        write_scene_info(tmp_path / "scene_info" / f"{name}.npz", scene_info())
    assert list(list_scenes(tmp_path)) == ["0000", "0000.1", "0001", "kitchen"]
    assert list(list_scenes(tmp_path, ["kitchen", "0000"])) == ["kitchen", "0000"]
    with pytest.raises(InputError, match="no scene 0099"):
        list_scenes(tmp_path, ["0000", "0099"])
    with pytest.raises(InputError, match="no scene_info"):
        list_scenes(tmp_path / "elsewhere")
