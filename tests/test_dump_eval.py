"""dump.dump: the HDF5 file of evaluation features and pairs, its configurations, interruption, shards, bad input."""
import contextlib
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import pytest
import torch
from plane_scene import SIZE, K, files_of, poses, texture, transfer, view
from test_formats import rows_of

from dump import features, workers
from dump.dump import load_config, main
from tools.cli import run
from tools.features import Features, Sift
from tools.files import read_image, write_depth, write_image
from tools.geometry import make_pose, to_camera_coordinates

ROOT = Path(__file__).parent.parent
N = 3
PAIRS = [(0, 1), (1, 2), (2, 0), (0, 2)]
POSES = poses(N)
SETTINGS = {"max_keypoints": 300, "contrast_threshold": 0.02, "unique_locations": False}


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """The same three views as YFCC (with depth) and as ScanNet (without), never written to."""
    root = tmp_path_factory.mktemp("raw")
    test = root / "yfcc100m" / "square" / "test"
    scannet = root / "scannet" / "scene0707_00"
    picture = texture()
    for i, pose in enumerate(POSES):
        image, depth = view(picture, pose)
        write_image(test / "images" / f"im{i}.jpg", image)
        write_image(scannet / "img" / f"{15 * i}.jpg", image)
        write_depth(test / "depths" / f"im{i}.h5", depth)
        (test / "calibration").mkdir(exist_ok=True)
        with h5py.File(test / "calibration" / f"c{i}.h5", "w") as file:
            file["K"] = K + [[0, 0, 3.0], [0, 0, -2], [0, 0, 0]]  # its principal point is not to be used
            file["R"], file["T"], file["imsize"] = pose[:3, :3], pose[:3, 3], np.array([SIZE], np.float64)
        for folder, matrix in (("intrinsic", K), ("extrinsic", np.linalg.inv(pose))):
            (scannet / folder).mkdir(exist_ok=True)
            np.savetxt(scannet / folder / f"{15 * i}.txt", matrix)
    (test / "images.txt").write_text("".join(f"images/im{i}.jpg\n" for i in range(N)))
    (test / "calibration.txt").write_text("".join(f"calibration/c{i}.h5\n" for i in range(N)))
    (root / "pairs").mkdir()
    (root / "pairs" / "square-te-1000-pairs.pkl").write_bytes(pickle.dumps([list(pair) for pair in PAIRS]))
    (root / "pairs.txt").write_text("".join(f"scene0707_00/img/{15 * i}.jpg scene0707_00/img/{15 * j}.jpg\n"
                                            for i, j in PAIRS))
    return root


@pytest.fixture
def spoilt(raw, tmp_path):
    """A copy of `raw` to spoil."""
    return shutil.copytree(raw, tmp_path / "spoilt")


def arguments(raw, output, dataset="yfcc", **values):
    config = {"dataset": dataset, "feature_type": "sift", "output": str(output), "scenes": ["square"],
              "raw_data_dir": str(raw if dataset == "yfcc" else raw / "scannet"), "extractor": SETTINGS, **values}
    if dataset == "scannet":
        config.setdefault("pair_list", str(raw / "pairs.txt"))
    output.parent.mkdir(exist_ok=True)
    path = output.parent / f"{output.stem}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return ["--config", str(path), "--workers", "1"]


def dump(raw, output, *options, **values):
    return run(main, [*arguments(raw, output, **values), *options])


@pytest.fixture(scope="session")
def finished(raw, tmp_path_factory):
    """The file of the YFCC layout, never written to."""
    output = tmp_path_factory.mktemp("eval") / "out" / "yfcc.hdf5"
    assert dump(raw, output) == 0
    return output


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "eval.hdf5"


def assert_error(capsys, status, *words):
    errors = capsys.readouterr().err
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    for word in words:
        assert word in errors


# what is written

def check_geometry(file, number, i, j, n_keypoints=300):
    """Cameras of pair `number` are those of views i and j, and its keypoints see the plane through them."""
    pair = {name: file[name][str(number)] for name in file if name not in ("images", "skipped", "counts")}
    for name in ("K1", "K2"):
        np.testing.assert_allclose(pair[name][()], K)
    T_1to2 = POSES[j] @ np.linalg.inv(POSES[i])
    np.testing.assert_allclose(make_pose(pair["R"][()], pair["T"][()]), T_1to2, atol=1e-9)
    assert pair["T"].shape == (3,)
    keypoints1, keypoints2 = pair["kpt1"][:, :2], pair["kpt2"][:, :2]
    for name in ("kpt1", "kpt2", "desc1", "desc2"):
        assert pair[name].dtype == np.float32 and pair[name].shape == (n_keypoints, 3 if name[0] == "k" else 128)
    moved = transfer(keypoints1, POSES[i], POSES[j])
    for matrix, x1, x2 in ((pair["f"][()], keypoints1, moved),
                           (pair["e"][()], to_camera_coordinates(keypoints1, K), to_camera_coordinates(moved, K))):
        residual = np.sum(np.c_[x2, np.ones(len(x2))] * (np.c_[x1, np.ones(len(x1))] @ matrix.T), axis=1)
        assert np.abs(residual).max() < 1e-6
    nearest = np.linalg.norm(moved[:, None] - keypoints2[None], axis=2).min(axis=1)
    inside = ((moved > 10) & (moved < np.array(SIZE) - 10)).all(axis=1)
    assert np.median(nearest[inside]) < 2
    for name in ("size1", "size2"):
        assert tuple(pair[name][()]) == SIZE


def test_yfcc(raw, finished):
    with h5py.File(finished) as file:
        assert dict(file.attrs) == {"format": "imp-eval", "version": 1, "dataset": "yfcc", "feature_type": "sift",
                                    "settings": json.dumps({"scenes": ["square"], "resize": [], **SETTINGS})}
        groups = "K1 K2 R T e f img_path1 img_path2 kpt1 kpt2 desc1 desc2 size1 size2 depth1 depth2".split()
        assert set(file) == {*groups, "images", "skipped", "counts"}
        assert json.loads(file["counts"].asstr()[()]) == {"images": 3, "pairs_tried": 4, "pairs": 4,
                                                          "rejected": {"image_left_out": 0}}
        for group in groups:
            assert set(file[group]) == {str(number) for number in range(len(PAIRS))}
        for number, (i, j) in enumerate(PAIRS):
            check_geometry(file, number, i, j)
            assert file["img_path1"][str(number)].shape == (1,)  # as readers made for the original's files expect
            names = [file[f"img_path{side}"][str(number)].asstr()[0] for side in (1, 2)]
            assert names == [f"yfcc100m/square/test/images/im{k}.jpg" for k in (i, j)]
            assert (raw / names[0]).is_file()
        expected = Sift(**SETTINGS)(read_image(raw / "yfcc100m/square/test/images/im0.jpg"))
        np.testing.assert_array_equal(file["kpt1"]["0"][:], np.c_[expected.keypoints, expected.scores])
        np.testing.assert_array_equal(file["desc1"]["0"][:], expected.descriptors)
        depth = view(texture(), POSES[0])[1]
        x, y = expected.keypoints.astype(int).T
        np.testing.assert_array_equal(file["depth1"]["0"][:], depth[y, x])
    assert not Path(f"{finished}.parts").exists()


def test_the_formats_say_what_there_is(finished):
    with h5py.File(finished, "r") as file:
        assert set(file) - {"images", "counts", "skipped"} == set(rows_of("## Evaluation features"))


def test_features_are_stored_once(finished):
    with h5py.File(finished) as file:
        for name in ("kpt", "desc", "size", "depth"):
            assert file[f"{name}1"]["0"] == file[f"{name}2"]["2"] == file[f"{name}1"]["3"]
            assert file[f"{name}1"]["0"] == file[f"images/yfcc100m/square/test/images/im0.jpg/{name}"]
    assert finished.stat().st_size < N * 300 * (128 + 3 + 1) * 4 + 60_000


def test_each_view_has_its_own_camera(spoilt, output):
    K2 = K * [[1.3], [1.2], [1]]
    np.savetxt(spoilt / "scannet/scene0707_00/intrinsic/15.txt", K2)
    assert dump(spoilt, output, dataset="scannet") == 0
    with h5py.File(output) as file:
        x1 = file["kpt1"]["0"][:, :2]
        x2 = np.c_[transfer(x1, POSES[0], POSES[1]), np.ones(len(x1))] @ (K2 @ np.linalg.inv(K)).T
        np.testing.assert_allclose(file["K2"]["0"][:], K2)
        np.testing.assert_allclose(file["K1"]["0"][:], K)
        residual = np.sum(x2 * (np.c_[x1, np.ones(len(x1))] @ file["f"]["0"][:].T), axis=1)
        assert np.abs(residual).max() < 1e-6


def with_ground_truth(i, j):
    """The line of a pair list whose names are ScanNet's own."""
    numbers = [*K.ravel(), *K.ravel(), *(POSES[j] @ np.linalg.inv(POSES[i])).ravel()]
    names = [f"scans_test/scene0707_00/sens/frame-{15 * k:06d}.color.jpg" for k in (i, j)]
    return " ".join([*names, "0 0", *map(str, numbers)])


def test_scannet(raw, output):
    """The resize differs along x and y, and keypoints come back to the image as stored."""
    assert dump(raw, output, dataset="scannet", resize=[280, 180]) == 0
    small = cv2.resize(read_image(raw / "scannet/scene0707_00/img/15.jpg"), (280, 180))
    expected = (Sift(**SETTINGS)(small).keypoints + 0.5) * [320 / 280, 240 / 180] - 0.5
    with h5py.File(output) as file:
        for number, (i, j) in enumerate(PAIRS):
            check_geometry(file, number, i, j, len(file["kpt1"][str(number)]))
        np.testing.assert_allclose(file["kpt2"]["0"][:, :2], expected, atol=1e-4)
        assert "depth1" not in file
        assert file["img_path2"]["0"].asstr()[0] == "scene0707_00/img/15.jpg"


def test_scannet_pair_list_with_ground_truth(raw, output, tmp_path):
    assert dump(raw, output, dataset="scannet") == 0
    (tmp_path / "gt.txt").write_text("".join(with_ground_truth(i, j) + "\n" for i, j in PAIRS))
    other = tmp_path / "other" / "eval.hdf5"
    assert dump(raw, other, dataset="scannet", pair_list=str(tmp_path / "gt.txt")) == 0
    with h5py.File(output) as one, h5py.File(other) as two:
        for group in set(one) - {"images", "skipped", "counts"}:
            assert all(np.array_equal(one[group][number][()], two[group][number][()]) for number in one[group])


def test_scannet_depth_smaller_than_the_image(spoilt, output):
    """A 16-bit PNG of half the size: read at the same place of the view."""
    scene = spoilt / "scannet" / "scene0707_00"
    depth = view(texture(), POSES[0])[1]
    write_image(scene / "depth" / "0.png", np.round(depth[::2, ::2] * 1000).astype(np.uint16))
    assert dump(spoilt, output, dataset="scannet") == 0
    with h5py.File(output) as file:
        assert set(file["depth1"]) == {"0", "3"} and set(file["depth2"]) == {"2"}
        x, y = file["kpt1"]["0"][:, :2].T.astype(int)
        np.testing.assert_allclose(file["depth1"]["0"][:], depth[y, x], atol=0.03)


def test_longer_side(raw, output):
    assert dump(raw, output, resize=[480]) == 0
    enlarged = cv2.resize(read_image(raw / "yfcc100m/square/test/images/im0.jpg"), (480, 360))
    with h5py.File(output) as file:
        np.testing.assert_allclose(file["kpt1"]["0"][:, :2], (Sift(**SETTINGS)(enlarged).keypoints + 0.5) / 1.5 - 0.5,
                                   atol=1e-4)


@pytest.mark.parametrize("scenes", [None, []])
def test_no_scenes_named_means_all(raw, output, scenes):
    assert dump(raw, output, scenes=scenes) == 0
    with h5py.File(output) as file:
        assert len(file["K1"]) == len(PAIRS)


def test_workers_and_command_line(raw, finished, output):
    """Any number of workers gives the same file; keys on the command line win."""
    assert dump(raw, output, "--workers", "2", "--extractor.max_keypoints", "300", "--scenes", "square",
                scenes=["elsewhere"], extractor={**SETTINGS, "max_keypoints": 7}) == 0
    assert output.read_bytes() == finished.read_bytes()


def test_network_gets_the_device(raw, output, monkeypatch):
    built = []

    class Network:
        weights_hash, batch_pixels = "0123", 0

        def __init__(self, feature_type, **settings):
            built.append((feature_type, settings))

        def __call__(self, image):
            found = Sift(50)(image)
            return Features(found.keypoints, found.scores, np.tile(found.descriptors, 2), found.image_size)

    monkeypatch.setattr(features, "build_extractor", Network)
    assert dump(raw, output, "--device", "cpu", feature_type="spp", extractor={"nms_radius": 3}) == 0
    assert built == [("spp", {"max_keypoints": 2000, "keypoint_threshold": 0.0025, "nms_radius": 3,
                              "align_corners": True, "device": "cpu"})]
    with h5py.File(output) as file:
        assert file["desc1"]["0"].shape == (50, 256)
        assert json.loads(file.attrs["settings"])["weights"] == "0123"


def test_image_without_keypoints(spoilt, output):
    write_image(spoilt / "yfcc100m/square/test/images/im1.jpg", np.full(SIZE[::-1], 90, np.uint8))
    assert dump(spoilt, output) == 0
    with h5py.File(output) as file:
        assert file["kpt2"]["0"].shape == (0, 3) and file["desc2"]["0"].shape == (0, 128)
        assert file["depth2"]["0"].shape == (0,)


# configurations

@pytest.mark.parametrize("name, resize, extractor", [
    ("yfcc_eval_sift", [], {"max_keypoints": 2000, "contrast_threshold": 1e-5, "unique_locations": False}),
    ("yfcc_eval_spp", [1600], {"max_keypoints": 2000, "nms_radius": 4, "keypoint_threshold": 0.0025,
                                "align_corners": True}),
    ("scannet_eval_sift", [640, 480], {"max_keypoints": 2000, "contrast_threshold": 1e-5, "unique_locations": False}),
    ("scannet_eval_spp", [640, 480], {"max_keypoints": 1000, "nms_radius": 4, "keypoint_threshold": 0.0025,
                                       "align_corners": True}),
])
def test_configs_are_the_protocol(name, resize, extractor):
    """Features of the published evaluation: docs/method.md, "Features"."""
    config = load_config(ROOT / "configs" / f"{name}.yaml", [])
    assert f"{config['dataset']}_eval_{config['feature_type']}" == name
    assert config["resize"] == resize and config["extractor"] == extractor
    assert config["scenes"] == ["buckingham_palace", "notre_dame_front_facade", "reichstag", "sacre_coeur"]


@pytest.mark.parametrize("values, words", [
    ({"raw_data_dirr": "x"}, "unknown key 'raw_data_dirr'; did you mean 'raw_data_dir'?"),
    ({"extractor": {"max_keypoint": 5}}, "unknown key 'max_keypoint'; did you mean 'max_keypoints'?"),
    ({"extractor": {"nms_radius": 5}}, "unknown key 'nms_radius'"),
    ({"extractor": {"max_keypoints": "many"}}, "max_keypoints should be"),
    ({"extractor": 5}, "extractor should hold keys and values"),
    ({"resize": [1, 2, 3]}, "resize"),
    ({"resize": ["big"]}, "resize"),
    ({"scenes": {"a": 1}}, "scenes should be"),
    ({"scenes": [1000]}, "put quotes round"),
    ({"dataset": "yfc"}, "dataset 'yfc' is unknown"),
    ({"feature_type": "orb"}, "feature_type 'orb' is unknown"),
    ({"output": None}, "output is not set"),
    ({"dataset": "scannet"}, "pair_list is not set"),
])
def test_bad_keys(raw, output, capsys, values, words):
    given = arguments(raw, output)
    path = Path(given[1])
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert_error(capsys, run(main, given), words)
    assert not output.exists()


def test_bad_key_on_the_command_line(raw, output, capsys):
    assert_error(capsys, dump(raw, output, "--extractor.max_keypoint", "5"), "did you mean 'max_keypoints'?")
    assert_error(capsys, dump(raw, output, "--resise", "5"), "did you mean 'resize'?")


@pytest.mark.parametrize("given, resize", [("1600", [1600]), ([1600.0], [1600]), (640.0, [640]),
                                           ([640, "480"], [640, 480])])
def test_numbers_as_yaml_writers_write_them(raw, output, given, resize):
    assert load_config(arguments(raw, output, resize=given)[1], [])["resize"] == resize


ORIGINAL_YFCC = """
data_name: yfcc
rawdata_dir: RAW
feature_dump_dir: OUT/features
dataset_dump_dir: OUT
data_split: ['test']
data_seq: ['square']
extractor:
  name: root
  num_kpt: 300
  resize: [-1]
  overwrite: false
  extract: true
  num_process: 2
  det_th: 0.02
"""


def test_the_originals_yaml_makes_the_same_file(raw, finished, output, capsys):
    path = output.parent / "original.yaml"
    output.parent.mkdir()
    path.write_text(ORIGINAL_YFCC.replace("RAW", str(raw)).replace("OUT", str(output.parent)))
    assert run(main, ["--config", str(path)]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "feature_dump_dir, overwrite, extract" in notes[0]
    assert (output.parent / "yfcc_root_300.hdf5").read_bytes() == finished.read_bytes()


def test_the_originals_yaml_for_spp(tmp_path, capsys):
    path = tmp_path / "original.yaml"
    text = ORIGINAL_YFCC.replace("name: root", "name: sp").replace("[-1]", "[480, 640]").replace("yfcc", "scannet")
    path.write_text(text + "pair_list: pairs.txt\n")
    config = load_config(path, [])
    assert (config["dataset"], config["feature_type"], config["resize"]) == ("scannet", "spp", [640, 480])
    assert config["extractor"] == {"max_keypoints": 300, "keypoint_threshold": 0.0025, "nms_radius": 4,
                                   "align_corners": True}
    assert config["workers"] == 2 and config["pair_list"] == "pairs.txt"
    assert "det_th has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("old, new, words", [
    ("num_kpt", "num_kpts", "unknown key 'extractor.num_kpts'"), ("data_seq", "data_sec", "unknown key 'data_sec'"),
    ("'test'", "'train'", "data_split ['train']"), ("name: root", "name: orb", "feature_type 'orb' is unknown"),
    ("[-1]", "[-2]", "resize [-2]")])
def test_mistakes_in_the_originals_yaml(tmp_path, capsys, old, new, words):
    path = tmp_path / "original.yaml"
    path.write_text(ORIGINAL_YFCC.replace(old, new))
    assert run(main, ["--config", str(path)]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and words in error and all(note.startswith("note: ") for note in notes)


# interruption, and what is there

def test_a_torn_part_is_made_again(spoilt, output, raw, finished):
    image = spoilt / "yfcc100m/square/test/images/im1.jpg"
    good = image.read_bytes()
    image.write_bytes(b"no image")
    assert dump(spoilt, output) == 1
    image.write_bytes(good)
    output.unlink()
    Path(f"{output}.parts", "yfcc100m/square/test/images/im0.jpg.npy").write_bytes(b"")
    assert dump(spoilt, output) == 0
    assert output.read_bytes() == finished.read_bytes()


def test_room_on_the_disk_is_checked_first(raw, output, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert_error(capsys, dump(raw, output), "No space left on device")
    assert {path.name for path in output.parent.iterdir()} == {"eval.hdf5.parts", "eval.yaml"}


def test_killed_anywhere_ends_with_the_same_file(raw, finished, output):
    rng = np.random.default_rng()
    parts = Path(f"{output}.parts")
    for n in range(1, N + 1):
        process = subprocess.Popen([sys.executable, "-m", "dump.dump", *arguments(raw, output)], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(parts.rglob("*.jpg.npy"))) < n:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.wait()
    output.unlink(missing_ok=True)
    (output.parent / ".eval.123.tmp.hdf5").write_bytes(b"half")
    assert dump(raw, output) == 0
    assert output.read_bytes() == finished.read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == ["eval.hdf5", "eval.yaml"]


def test_parts_are_kept(spoilt, output):
    """What was extracted before an interruption is not extracted again."""
    (spoilt / "yfcc100m/square/test/images/im1.jpg").write_bytes(b"no image")
    assert dump(spoilt, output) == 1
    output.unlink()
    parts = Path(f"{output}.parts")
    before = {path: path.stat().st_mtime_ns for path in parts.rglob("*.jpg.npy")}
    assert len(before) == 2
    (next(iter(before)).parent / ".im1.jpg.77.tmp.npy").write_bytes(b"half")
    assert dump(spoilt, output) == 1
    assert {path: path.stat().st_mtime_ns for path in parts.rglob("*.npy")} == before


def test_parts_of_other_settings_are_refused(spoilt, output, capsys):
    (spoilt / "yfcc100m/square/test/images/im1.jpg").write_bytes(b"no image")
    dump(spoilt, output)
    output.unlink()
    capsys.readouterr()
    assert_error(capsys, dump(spoilt, output, "--resize", "100"), "resize [], now it is [100]")


def test_full_disk_is_one_line_and_loses_nothing(raw, finished, output):
    """No file may grow to the size of an image's features, then to that of them all."""
    for limit in (100_000, 300_000):
        script = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); " \
                 "from dump.dump import main; from tools.cli import run; sys.exit(run(main))"
        result = subprocess.run([sys.executable, "-c", script, *arguments(raw, output)], cwd=ROOT, capture_output=True,
                                text=True)
        assert result.returncode == 2
        assert result.stderr == f"error: cannot write {output}: File too large; what is done is kept\n"
        assert {path.suffix for path in output.parent.iterdir()} == {".yaml", ".parts"}
        assert len(list(Path(f"{output}.parts").rglob("*.jpg.npy"))) == (0 if limit == 100_000 else N)
    assert dump(raw, output) == 0
    assert output.read_bytes() == finished.read_bytes()


# several at once

@pytest.mark.parametrize("n_shards", [2, 4])
def test_shards_at_once_end_with_the_same_bytes(raw, finished, output, n_shards):
    """Each makes features, one run without --shard joins them and makes none."""
    processes = [subprocess.Popen([sys.executable, "-m", "dump.dump", *arguments(raw, output), "--shard",
                                   f"{i}/{n_shards}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
                 for i in range(n_shards)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * n_shards
    assert sorted(text.split(" are in ")[0] for text in printed) == sorted(
        f"features of {len(range(i, N, n_shards))} images" for i in range(n_shards))
    assert not output.exists()
    parts = {path: path.stat().st_mtime_ns for path in Path(f"{output}.parts").rglob("*.jpg.npy")}
    assert len(parts) == N
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dump.dump.ViewTask.finish", None)
        assert dump(raw, output) == 0
    assert output.read_bytes() == finished.read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == ["eval.hdf5", "eval.yaml"]


def test_shard_lists_its_bad_images_and_the_join_does_again(spoilt, output, capsys):
    (spoilt / "yfcc100m/square/test/images/im1.jpg").write_bytes(b"no image")
    assert [dump(spoilt, output, "--shard", f"{i}/2") for i in range(2)] == [0, 1]
    captured = capsys.readouterr()
    assert "im1.jpg: not a readable image" in captured.err and "features of 0 images" in captured.out
    assert dump(spoilt, output) == 1
    assert "its 2 pairs are left out" in capsys.readouterr().err


def test_torchrun_makes_the_file(spoilt, output):
    """One command: its processes share the features, and one joins them. Another, which has skipped an image, does not
    end before, because its status would have torchrun kill them all."""
    (spoilt / "yfcc100m/square/test/images/im1.jpg").unlink()
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                             "-m", "dump.dump", *arguments(spoilt, output)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "features of 0 images" in result.stdout and "2 of 4 pairs" in result.stdout, result.stderr
    one = output.read_bytes()
    output.unlink()
    assert dump(spoilt, output) == 1
    assert output.read_bytes() == one


def test_processes_of_torchrun_meet_before_the_join_and_at_the_end(raw, output, monkeypatch):
    """Here the first of one."""
    met = []
    monkeypatch.setattr("dump.dump.wait_for_all", lambda point: met.append(output.exists()))
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert dump(raw, output) == 0
    assert met == [False, True]


def test_wait_for_all(monkeypatch):
    store, events = torch.distributed.HashStore(), []
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 0, 2)]))
    workers.wait_for_all("here")  # not under torchrun: there is nobody to wait for
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")

    def first():
        workers.wait_for_all("here")
        events.append("first goes on")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(first)
        time.sleep(0.1)  # until it waits; a shorter time could only hide a failure
        events.append("second comes")
        workers.wait_for_all("here")
        done.result(20)
    assert events == ["second comes", "first goes on"]


def test_second_dump_is_refused(raw, output, capsys):
    output.parent.mkdir()
    for lock, refused in ((".eval.hdf5.lock", ([], ["--shard", "0/2"])), (".eval.hdf5.0.lock", (["--shard", "0/2"],))):
        with contextlib.closing(open(output.parent / lock, "a")) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for shard in refused:
                assert_error(capsys, dump(raw, output, *shard), "another process writes", "--shard")
    with contextlib.closing(open(output.parent / ".eval.hdf5.lock", "a")) as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as a shard does
        assert_error(capsys, dump(raw, output), "another process writes")
        assert dump(raw, output, "--shard", "1/2") == 0


def test_report(spoilt, output, tmp_path, capsys):
    (spoilt / "yfcc100m/square/test/images/im1.jpg").unlink()
    path = tmp_path / "report.json"
    assert dump(spoilt, output, "--report", str(path)) == 1
    report = json.loads(path.read_text())
    assert {name: report[name] for name in ("images", "pairs_tried", "pairs", "rejected")} == {
        "images": 2, "pairs_tried": 4, "pairs": 2, "rejected": {"image_left_out": 2}}
    assert report["megabytes_per_image"] == pytest.approx(output.stat().st_size / 2e6)
    assert len(report["skipped"]) == 1 and min(report[name] for name in ("seconds", "images_per_second",
                                                                        "pairs_per_second", "peak_memory_mb")) > 0
    assert "2 images, 2 of 4 pairs" in capsys.readouterr().out
    assert dump(spoilt, output, "--report", str(path)) == 1
    again = json.loads(path.read_text())
    assert again["images_per_second"] is None and again["skipped"] == report["skipped"] and again["pairs"] == 2


# what is there

def test_finished_file_is_kept(raw, finished, output, capsys):
    output.parent.mkdir()
    shutil.copy(finished, output)
    before = output.stat().st_mtime_ns
    assert dump(raw, output) == 0 and "4 pairs" in capsys.readouterr().out
    assert_error(capsys, dump(raw, output, "--extractor.max_keypoints", "9"), "max_keypoints 300, now it is 9")
    assert_error(capsys, dump(raw, output, dataset="scannet"), "dataset yfcc, now it is scannet")
    assert output.stat().st_mtime_ns == before


def test_something_else_is_not_overwritten(raw, output, capsys):
    output.parent.mkdir()
    output.write_bytes(b"my thesis")
    assert_error(capsys, dump(raw, output), "not a finished dump")
    assert output.read_bytes() == b"my thesis"


def verify(output, raw):
    return dump(raw, output, "--verify")


def test_verify_good(raw, finished, output, capsys):
    output.parent.mkdir()
    shutil.copy(finished, output)
    assert verify(output, raw) == 0
    assert "4 pairs read, 0 problems" in capsys.readouterr().out


def in_place(change):
    def spoil(path):
        with h5py.File(path, "a") as file:
            change(file)
    return spoil


def replace(name, value):
    def change(file):
        del file[name]
        file[name] = value
    return in_place(change)


IM0 = "images/yfcc100m/square/test/images/im0.jpg"


@pytest.mark.parametrize("spoil, words", [
    (replace("R/2", np.full((3, 3), np.nan)), "pair 2: R has values that are not finite"),
    (replace("K1/0", np.eye(2)), "pair 0: K1 is (2, 2), not (3, 3)"),
    (in_place(lambda file: file.__delitem__("T/3")), "T: 3 pairs, not 0 to 3"),
    (in_place(lambda file: file.__delitem__("desc2")), "desc2: 0 pairs, not 0 to 3"),
    (replace(f"{IM0}/desc", np.zeros((299, 128), np.float32)), "desc is (299, 128), not (300, 128)"),
    (in_place(lambda file: file.__delitem__(f"{IM0}/size")), "size is missing, not (2,)"),
    (replace("kpt1/1", np.zeros((300, 3), np.float32)), "pair 1: kpt1 is not that of its image"),
])
def test_verify_finds(raw, finished, output, capsys, spoil, words):
    output.parent.mkdir()
    shutil.copy(finished, output)
    spoil(output)
    assert verify(output, raw) == 1
    assert words in capsys.readouterr().err


def test_verify_a_file_with_plain_names(raw, finished, output):
    """As they were written before they had shape (1,)."""
    output.parent.mkdir()
    shutil.copy(finished, output)
    with h5py.File(output, "a") as file:
        for side in (1, 2):
            for number, dataset in list(file[f"img_path{side}"].items()):
                name = dataset.asstr()[0]
                del file[f"img_path{side}"][number]
                file[f"img_path{side}"][number] = name
    assert verify(output, raw) == 0


def test_verify_no_dump(raw, finished, output, capsys):
    output.parent.mkdir()
    assert_error(capsys, verify(output, raw), "not a finished dump, or damaged")
    for content in (b"x", finished.read_bytes()[:-5000]):
        output.write_bytes(content)
        assert_error(capsys, verify(output, raw), "not a finished dump, or damaged")


# bad input

@pytest.mark.parametrize("file, content, words", [
    ("images/im1.jpg", b"no image", "not a readable image"),
    ("images/im1.jpg", None, "image not found"),
    ("calibration/c1.h5", b"", "not a calibration file"),
    ("calibration/c1.h5", None, "not a calibration file"),
])
def test_bad_image_leaves_out_its_pairs(spoilt, output, capsys, file, content, words):
    path = spoilt / "yfcc100m/square/test" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for _ in range(2):
        assert dump(spoilt, output) == 1
        errors = capsys.readouterr().err
        assert "im1.jpg" in errors and words in errors and "its 2 pairs are left out" in errors
    with h5py.File(output) as file:
        assert set(file["K1"]) == set(file["kpt2"]) == {"0", "1"}
        check_geometry(file, 0, 2, 0)
        check_geometry(file, 1, 0, 2)


@pytest.mark.parametrize("name, words", [
    ("../im1.jpg", "must lie below"), ("/ABSOLUTE/im1.jpg", "must lie below"), ("images/im1\0.jpg", "not a text file"),
    (f"images/{'n' * 250}.jpg", "its name is too long"), ("FIFO", "is a device or pipe"),
])
def test_a_bad_name_is_left_out_and_nothing_is_written_beside_the_image(spoilt, output, capsys, name, words):
    test = spoilt / "yfcc100m/square/test"
    (test / "images/im1.jpg").rename(test.parent / "im1.jpg")
    if name == "FIFO":
        os.mkfifo(test / "images/im1.jpg")
        name = "images/im1.jpg"
    (test / "images.txt").write_text("\n".join(["images/im0.jpg", name.replace("/ABSOLUTE", str(test.parent)),
                                               "images/im2.jpg"]))
    before = sorted(spoilt.rglob("*"))
    assert dump(spoilt, output) == (2 if "\0" in name else 1)
    assert words in capsys.readouterr().err
    assert sorted(spoilt.rglob("*")) == before

def test_folders_may_be_links(spoilt, output, finished):
    images = spoilt / "yfcc100m/square/test/images"
    images.rename(spoilt / "elsewhere")
    images.symlink_to(spoilt / "elsewhere")
    assert dump(spoilt, output) == 0
    assert output.read_bytes() == finished.read_bytes()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_in_any_encoding(spoilt, output, finished, encoding):
    names = spoilt / "yfcc100m/square/test/images.txt"
    names.write_text(names.read_text(), encoding=encoding)
    assert dump(spoilt, output) == 0
    assert output.read_bytes() == finished.read_bytes()


def test_a_bad_name_in_a_pair_list_leaves_out_its_pairs(spoilt, output, capsys):
    with open(spoilt / "pairs.txt", "a") as file:
        file.write("scene0707_00/img/0.jpg ../../x.jpg\n")
    assert dump(spoilt, output, dataset="scannet") == 1
    assert "../../x.jpg is neither" in capsys.readouterr().err
    with h5py.File(output) as file:
        assert len(file["K1"]) == len(PAIRS)


@pytest.mark.parametrize("name, value, words", [
    ("imsize", [[240, 320]], "is for an image of 240x320, it is 320x240"),
    ("R", np.full((3, 3), np.nan), "camera not usable"),
    ("K", np.eye(2), "not a calibration file"),
    ("K", None, "not a calibration file"),
    ("K", np.zeros((3, 3)), "camera not usable"),
    ("R", np.zeros((3, 3)), "camera not usable"),
    ("T", np.zeros((2, 2)), "not a calibration file"),
    ("imsize", "large", "not a calibration file"),
])
def test_bad_calibration(spoilt, output, capsys, name, value, words):
    with h5py.File(spoilt / "yfcc100m/square/test/calibration/c1.h5", "a") as file:
        del file[name]
        if value is None:
            file.create_group(name)
        else:
            file[name] = value
    assert dump(spoilt, output) == 1
    assert words in capsys.readouterr().err


def test_bad_scannet_pose(spoilt, output, capsys):
    """A frame that lost tracking has -inf for a pose."""
    np.savetxt(spoilt / "scannet/scene0707_00/extrinsic/15.txt", np.full((4, 4), -np.inf))
    (spoilt / "scannet/scene0707_00/intrinsic/30.txt").write_text("K = ?")
    assert dump(spoilt, output, dataset="scannet") == 2
    (spoilt / "pairs.txt").write_text("scene0707_00/img/0.jpg scene0707_00/img/0.jpg\n"
                                      "scene0707_00/img/0.jpg scene0707_00/img/15.jpg\n")
    assert dump(spoilt, output, dataset="scannet") == 1
    assert "scene0707_00/img/15.jpg" in capsys.readouterr().err


def test_bad_depth_keeps_the_image(spoilt, output, capsys):
    depths = spoilt / "yfcc100m/square/test/depths"
    (depths / "im0.h5").write_bytes(b"no depth")
    write_depth(depths / "im1.h5", np.ones((100, 100)))
    assert dump(spoilt, output) == 1
    errors = capsys.readouterr().err
    assert "not a depth map" in errors and "another shape than its image" in errors
    with h5py.File(output) as file:
        assert len(file["K1"]) == 4 and set(file["depth1"]) == {"2"} and set(file["depth2"]) == {"1", "3"}


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("malicious",)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("content, words", [
    (pickle.dumps([[0, Malicious()]]), "refused to unpickle"),
    (pickle.dumps([[0, 3]]), "names image 3 of 3"),
    (pickle.dumps([[-1, 0]]), "of 3"),
    (pickle.dumps([0, 1, 2]), "not a list of pairs"),
    (pickle.dumps({"a": 1}), "not a list of pairs"),
    (pickle.dumps([[0, 1.5]]), "not a list of pairs"),
    (pickle.dumps([[0, np.inf]]), "names image inf of 3"),
    (pickle.dumps([[0, 1], [2]]), "not a list of pairs"),
    (pickle.dumps(5), "not a list of pairs"),
])
def test_bad_pair_pickle(spoilt, output, capsys, content, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (spoilt / "pairs" / "square-te-1000-pairs.pkl").write_bytes(content)
    assert_error(capsys, dump(spoilt, output), words)
    assert not (tmp_path / "malicious").exists()


def test_other_number_of_pairs(spoilt, output):
    pairs = spoilt / "pairs"
    (pairs / "square-te-1000-pairs.pkl").unlink()
    (pairs / "square-te-2-pairs.pkl").write_bytes(pickle.dumps(np.array(PAIRS[:2])))
    assert dump(spoilt, output) == 0
    with h5py.File(output) as file:
        assert len(file["K1"]) == 2


def test_lists_that_do_not_go_together(spoilt, output, capsys):
    (spoilt / "yfcc100m/square/test/calibration.txt").write_text("calibration/c0.h5\n")
    assert_error(capsys, dump(spoilt, output), "images.txt names 3 files, calibration.txt 1")


@pytest.mark.parametrize("values, words", [
    ({"raw_data_dir": "/nowhere"}, "/nowhere is not a folder"),
    ({"scenes": ["atlantis"]}, "atlantis"),
    ({"dataset": "scannet", "pair_list": "/nowhere.txt"}, "/nowhere.txt"),
])
def test_missing_raw_data(raw, output, capsys, values, words):
    assert_error(capsys, dump(raw, output, **values), words)
    assert files_of(output.parent).keys() == {"eval.yaml"}


def test_pair_list_of_something_else(raw, output, capsys, tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg b.jpg\n")
    assert_error(capsys, dump(raw, output, dataset="scannet", pair_list=str(tmp_path / "list.txt")),
                 "a.jpg is neither <scene>/img/<N>.jpg nor")


def test_bad_configuration_file(capsys, tmp_path):
    assert_error(capsys, run(main, ["--config", str(tmp_path / "no.yaml")]), "no.yaml")
