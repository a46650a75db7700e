"""A dump of the original code becomes one of ours that trains, whatever is damaged in it."""
import os
import shutil

import numpy as np
import pytest

from dump import import_dump, keypoints
from dump.verify import verify_dump
from tools.cli import run
from tools.manifest import load_dump
from tools.records import read_record
from training.data import Choice, DumpSource, Samples

N, M = 1030, 60


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, content, allow_pickle=True)


def make_old(path, scenes=("0000", "0001"), images=3, separate=True):
    """A dump in the original's form: pickled dicts."""
    rng, K = np.random.default_rng(0), np.array([[500, 0, 320.5], [0, 500, 240.5], [0, 0, 1]])
    for scene in scenes:
        views, pairs = [], []
        for i in range(images):
            pose = np.eye(4)
            pose[0, 3] = i
            views.append({"image_path": f"Undistorted_SfM/{scene}/images/{i}.jpg",
                          "depth_path": f"phoenix/{scene}/{i}.h5", "intrinsics": K, "pose": pose})
            save(path / "keypoints_sift" / scene / f"{i}.jpg_sift.npy", {
                **views[-1], "keypoints": rng.uniform(0, 480, (N, 2)), "scores": rng.random(N),
                "descriptors": rng.random((N, 128)).astype("f4"), "image_size": np.array([480, 640, 3]),
                "depth": rng.random(N)})
        for k, (i, j) in enumerate([(0, 1), (1, 2), (2, 0)]):
            pairs.append({f"{name}{v}": views[index][name] for v, index in ((1, i), (2, j))
                          for name in ("image_path", "depth_path", "intrinsics", "pose")})
            pairs[-1] |= {f"matched_ids{v}": rng.permutation(N)[:M] for v in (1, 2)}
            if separate:
                save(path / "matches_sep_sift" / scene / f"{k}.npy", pairs[-1])
        together = np.empty(len(pairs), object)
        together[:] = pairs
        save(path / "matches_sift" / f"{scene}.npy", together)
        save(path / "nmatches_sift" / f"{scene}_sift.npy", {scene: len(pairs)})
    return path


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return make_old(tmp_path_factory.mktemp("old"))


def imported(old, new, *options):
    return run(import_dump.main, [str(old), str(new), *options])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def change(path, **changes):
    save(path, {**np.load(path, allow_pickle=True).item(), **changes})


def test_an_imported_dump_trains(old, tmp_path, capsys):
    assert imported(old, tmp_path / "new") == 0
    assert "2 scenes, 6 images, 6 pairs" in capsys.readouterr().out
    dump = load_dump(tmp_path / "new")
    assert dump["scenes"] == {"0000": 3, "0001": 3} and dump["feature_type"] == "sift"
    assert dump["settings"]["made_by"] == "original" and dump["settings"]["overlap"] == "unknown"
    assert verify_dump(tmp_path / "new") == (12, [])
    was = np.load(old / "keypoints_sift" / "0001" / "2.jpg_sift.npy", allow_pickle=True).item()
    record = read_record(tmp_path / "new" / "keypoints" / "0001" / "2.jpg_sift.npy")
    assert record["image_size"].tolist() == [640, 480] and record["descriptors"].dtype == np.float16
    np.testing.assert_array_equal(record["keypoints"], was["keypoints"].astype("f4"))
    was = np.load(old / "matches_sep_sift" / "0001" / "2.npy", allow_pickle=True).item()
    record = read_record(tmp_path / "new" / "matches" / "0001" / "2.npy")
    np.testing.assert_array_equal(record["matches"], np.stack([was["matched_ids1"], was["matched_ids2"]], axis=1))
    np.testing.assert_array_equal(record["pose0"], was["pose1"])
    assert record["image_path1"] == was["image_path2"] and np.isnan(record["overlap"])
    sample = Samples([DumpSource(tmp_path / "new")], Choice(512))[0]
    assert sample["keypoints0"].shape == (512, 2) and not sample["skipped"]
    assert all(np.isfinite(value).all() for value in sample.values() if isinstance(value, np.ndarray))


def test_pairs_of_a_scene_in_one_file_are_the_same(old, tmp_path):
    make_old(tmp_path / "old", separate=False)
    assert imported(tmp_path / "old", tmp_path / "new") == imported(old, tmp_path / "other") == 0
    assert contents(tmp_path / "new") == contents(tmp_path / "other")


@pytest.mark.parametrize("stop", [1, 4, 8, 11])
def test_resumed_it_ends_with_equal_bytes(old, tmp_path, monkeypatch, stop):
    assert imported(old, tmp_path / "whole") == 0
    left, write = [stop], import_dump.write_record

    def killed(path, record):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(path, record)

    for module in (import_dump, keypoints):
        monkeypatch.setattr(module, "write_record", killed)
    assert imported(old, tmp_path / "new") == 130
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("keypoints/*/*")}
    assert kept and imported(old, tmp_path / "new") == 0
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_bad_items_are_left_out_and_named(old, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "old"
    shutil.copytree(old, bad)
    keypoints, pairs = bad / "keypoints_sift" / "0000", bad / "matches_sep_sift" / "0000"
    change(keypoints / "2.jpg_sift.npy", scores=Malicious())  # two pairs have it
    change(pairs / "0.npy", matched_ids1=np.r_[np.arange(29), 5], matched_ids2=np.arange(30))
    change(bad / "keypoints_sift" / "0001" / "0.jpg_sift.npy", image_path="../../0.jpg")
    change(bad / "matches_sep_sift" / "0001" / "1.npy", matched_ids1=np.arange(M) + N)
    change(bad / "matches_sep_sift" / "0001" / "0.npy", pose1=np.full((4, 4), np.nan))
    save(bad / "nmatches_sift" / "0001_sift.npy", {"0001": 5})
    (bad / "keypoints_sift" / "0002").mkdir()
    assert imported(bad, tmp_path / "new") == 1
    told = capsys.readouterr().err
    for words in ("0000/2.jpg_sift.npy: refused to unpickle", "mkdir is not admitted", "0001/0.jpg_sift.npy: name",
                  "0001/1.npy: matched_ids1 name keypoints that", "0001/0.npy: the pose is not a rotation",
                  "scene 0002: no pairs in",
                  "note: scene 0001 has 3 pairs; 0001_sift.npy: says 5 pairs"):
        assert words in told
    assert not (tmp_path / "code_ran").exists()
    record = read_record(tmp_path / "new" / "matches" / "0000" / "0.npy")
    assert len(record["matches"]) == 29  # a keypoint has one match
    assert load_dump(tmp_path / "new")["scenes"] == {"0000": 1}
    assert imported(bad, tmp_path / "new") == 1  # it says so again


def test_what_is_no_such_dump(old, tmp_path, capsys):
    assert imported(tmp_path, tmp_path / "new") == 2
    assert "is not a dump of the original IMP code" in capsys.readouterr().err
    assert imported(old, tmp_path / "new", "--feature_type", "spp") == 2
    assert imported(old, tmp_path / "new") == 0
    assert imported(old, tmp_path / "new", "--descriptor_dtype", "float32") == 2
    assert "descriptor_dtype float16, now it is float32" in capsys.readouterr().err
