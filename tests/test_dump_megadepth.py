"""dump.dump_megadepth: the records, resuming after an interruption, verification, bad input."""
import contextlib
import errno
import fcntl
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from plane_scene import SIZE, K, files_of, transfer, write_megadepth

from dump import features, workers
from dump.dump_megadepth import dump_megadepth, dump_scene, main
from dump.keypoints import ImageTask, Recipe
from dump.matches import match_pairs
from dump.verify import verify_dump
from tools.cli import InputError, run
from tools.correspondences import match_by_projection
from tools.features import Features, Sift
from tools.files import header_size, read_image, write_depth, write_image
from tools.geometry import opencv_to_colmap_K
from tools.locks import InUse, locked
from tools.manifest import keypoint_path, load_dump, match_path
from tools.processes import in_order, worker_pool
from tools.records import read_record, write_record
from tools.scene_info import candidate_pairs, load_scene_info, write_scene_info

ROOT = Path(__file__).parent.parent
MIN_KEYPOINTS = 200
ARGUMENTS = ["--feature_type", "sift", "--min_keypoints", str(MIN_KEYPOINTS)]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """Two scenes of four images, never written to."""
    root = tmp_path_factory.mktemp("megadepth")
    write_megadepth(root, "0000")
    write_megadepth(root, "0001", seed=1)
    return root


@pytest.fixture(scope="session")
def finished(pristine, tmp_path_factory):
    """The dump of `pristine`, never written to."""
    out = tmp_path_factory.mktemp("dump") / "out"
    assert dump(pristine, out) == 0
    return out


@pytest.fixture
def base(pristine, tmp_path):
    """A copy of `pristine` to spoil."""
    return shutil.copytree(pristine, tmp_path / "base")


@pytest.fixture
def out(finished, tmp_path):
    """A copy of `finished` to spoil."""
    return shutil.copytree(finished, tmp_path / "spoilt")


def dump(base, out, *options):
    return run(main, ["--base_path", str(base), "--save_path", str(out), "--workers", "1", *ARGUMENTS, *options])


def change_info(base, scene="0000", **changes):
    """Rewrite a scene_info with fields replaced."""
    path = base / "scene_info" / f"{scene}.0.npz"
    write_scene_info(path, {**load_scene_info(path), **changes})


# what is written

def test_records(pristine, finished):
    poses = load_scene_info(pristine / "scene_info" / "0000.0.npz")["poses"]
    record = read_record(finished / "keypoints" / "0000" / "1.jpg_sift.npy")
    n = len(record["keypoints"])
    assert list(record) == ["image_path", "depth_path", "image_size", "intrinsics", "pose", "keypoints", "scores",
                            "descriptors", "depth"]
    assert {name: (record[name].dtype, record[name].shape) for name in list(record)[5:]} == {
        "keypoints": (np.float32, (n, 2)), "scores": (np.float32, (n,)), "descriptors": (np.float16, (n, 128)),
        "depth": (np.float32, (n,))}
    assert record["image_path"] == "Undistorted_SfM/0000/images/1.jpg"
    assert record["depth_path"] == "phoenix/S6/zl548/MegaDepth_v1/0000/dense0/depths/1.h5"
    assert tuple(record["image_size"]) == SIZE
    np.testing.assert_array_equal(record["intrinsics"], opencv_to_colmap_K(K))
    np.testing.assert_array_equal(record["pose"], poses[1])
    expected = Sift()(read_image(pristine / record["image_path"]))
    np.testing.assert_array_equal(record["keypoints"], expected.keypoints)
    np.testing.assert_allclose(record["descriptors"], expected.descriptors, atol=1e-3)
    assert n >= MIN_KEYPOINTS and (record["depth"] > 0).all()


def test_matches_are_true(pristine, finished):
    """Every match record is a pair in order, and every match lands where the plane's homography says."""
    poses = load_scene_info(pristine / "scene_info" / "0000.0.npz")["poses"]
    seen, n_pairs = [], load_dump(finished)["scenes"]["0000"]
    assert n_pairs >= 8
    for i in range(n_pairs):
        record = read_record(match_path(finished, "0000", i))
        assert list(record) == ["image_path0", "image_path1", "intrinsics0", "intrinsics1", "pose0", "pose1",
                                "matches", "overlap"]
        assert record["overlap"] == 0.5
        matches = record["matches"]
        assert matches.dtype == np.int32 and len(matches) > 20
        views = [int(Path(record[f"image_path{v}"]).stem) for v in (0, 1)]
        seen.append(tuple(views))
        for v in (0, 1):
            np.testing.assert_array_equal(record[f"pose{v}"], poses[views[v]])
        keypoints = [read_record(keypoint_path(finished, "0000", record[f"image_path{v}"], "sift"))["keypoints"]
                     for v in (0, 1)]
        moved = transfer(keypoints[0][matches[:, 0]], record["pose0"], record["pose1"])
        error = np.linalg.norm(moved - keypoints[1][matches[:, 1]], axis=1)
        assert error.max() < 5.5 and np.median(error) < 1  # depth is read at the floor: up to half a pixel off
    assert seen == sorted(seen) and len(set(seen)) == len(seen)
    assert not match_path(finished, "0000", n_pairs).exists()


def test_index_and_counts(finished):
    assert json.loads((finished / "dump.json").read_text()) == {
        "format": "imp-dump", "version": 1, "feature_type": "sift",
        "settings": {"max_keypoints": 4096, "contrast_threshold": 0.04, "unique_locations": False,
                     "min_keypoints": MIN_KEYPOINTS, "descriptor_dtype": "float16", "inlier_th": 5.0}}
    counts = json.loads((finished / "scenes" / "0000.json").read_text())
    assert counts["images"] == counts["candidate_images"] == 4 and counts["candidate_pairs"] == 12
    assert counts["pairs"] + sum(counts["rejected"].values()) == 12
    files = [path for folder in ("keypoints", "matches") for path in (finished / folder / "0000").iterdir()]
    assert counts["bytes"] == sum(path.stat().st_size for path in files)


def test_candidate_pairs():
    n = 5
    overlap = np.full((n, n), -1.0)
    overlap[0, 1], overlap[1, 0] = 0.1, 0.05  # one direction only, at the limit
    overlap[2, 0], overlap[0, 2] = 0.8, 0.81
    overlap[1, 2] = overlap[2, 1] = 0.5  # too few shared points
    overlap[0, 3] = overlap[3, 0] = overlap[0, 4] = 0.5  # no image, no depth
    np.fill_diagonal(overlap, 0.5)
    info = {"image_paths": ["a", "b", "c", None, "e"], "depth_paths": ["a", "b", "c", "d", None],
            "intrinsics": [K] * n, "poses": [np.eye(4)] * n, "overlap_matrix": overlap,
            "points3D_id_to_2D": [dict.fromkeys(points) for points in
                                  (range(100), range(20), range(1, 100), range(100), range(100))]}
    assert candidate_pairs(info).tolist() == [[0, 1], [2, 0]]
    info["points3D_id_to_2D"][1].popitem()
    assert candidate_pairs(info).tolist() == [[2, 0]]


def test_options_reach_the_records(pristine, tmp_path):
    assert dump(pristine, tmp_path, "--max_keypoints", "250", "--unique_locations", "--descriptor_dtype", "float32",
                "--contrast_threshold", "0.03") == 0
    record = read_record(tmp_path / "keypoints" / "0000" / "0.jpg_sift.npy")
    assert record["descriptors"].dtype == np.float32
    assert len(record["keypoints"]) == 250 == len(np.unique(record["keypoints"], axis=0))
    assert load_dump(tmp_path)["settings"]["contrast_threshold"] == 0.03


def test_scene_list(pristine, tmp_path):
    (tmp_path / "list.txt").write_text("# one of two\n0001\n")
    assert dump(pristine, tmp_path / "out", "--scene_list", str(tmp_path / "list.txt")) == 0
    assert list(load_dump(tmp_path / "out")["scenes"]) == ["0001"]


def test_any_number_of_workers_gives_the_same(pristine, finished, tmp_path):
    assert dump(pristine, tmp_path / "out", "--workers", "2") == 0
    assert files_of(tmp_path / "out") == files_of(finished)


def test_network(pristine, tmp_path, monkeypatch):
    """spp: one extractor, on the device asked for."""
    built = []

    class Network:
        weights_hash, batch_pixels = "0123", 0

        def __init__(self, feature_type, **settings):
            built.append((feature_type, settings))

        def __call__(self, image):
            found = Sift()(image)
            return Features(found.keypoints, found.scores, np.tile(found.descriptors, 2), found.image_size)

    monkeypatch.setattr(features, "build_extractor", Network)
    recipe = Recipe("spp", MIN_KEYPOINTS, device="cpu", max_keypoints=300)
    assert not dump_megadepth(pristine, tmp_path, recipe, ["0000"])["skipped"]
    assert built == [("spp", {"max_keypoints": 300, "keypoint_threshold": 0.001, "nms_radius": 3, "align_corners": True,
                              "device": "cpu"})]
    record = read_record(tmp_path / "keypoints" / "0000" / "2.jpg_spp.npy")
    assert record["image_path"].endswith("/2.jpg") and record["descriptors"].shape[1] == 256
    assert load_dump(tmp_path)["settings"]["weights"] == "0123"
    assert verify_dump(tmp_path)[1] == []


# interruption

def start(base, out, *options):
    """The command in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "dump.dump_megadepth", "--base_path", base, "--save_path", out,
                             *ARGUMENTS, *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def wait_for_records(process, out, n):
    """Wait until the dump holds n records, or the process has ended."""
    while process.poll() is None and sum(1 for _ in out.glob("*/*/[!.]*.npy")) < n:
        time.sleep(0.002)


@pytest.mark.parametrize("n_workers, kills", [("1", 3), ("2", 1)])
def test_killed_anywhere_ends_with_the_same_bytes(pristine, finished, tmp_path, n_workers, kills):
    rng = np.random.default_rng()
    out = tmp_path / "out"
    n_records = len(list(finished.glob("*/*/*.npy")))
    for n in sorted(rng.integers(0, n_records, kills)):
        process = start(pristine, out, "--workers", n_workers)
        wait_for_records(process, out, n)
        time.sleep(rng.random() * 0.02)
        children = []
        with contextlib.suppress(OSError):  # it may have finished
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        process.stderr.close()
        until = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < until:
            time.sleep(0.01)
        assert not any(os.path.exists(f"/proc/{child}") for child in children), "workers outlive a killed parent"
    assert dump(pristine, out) == 0
    assert files_of(out) == files_of(finished)


def test_what_a_killed_run_left_half_written_goes(pristine, finished, out):
    (out / "scenes" / "0001.json").unlink()
    (out / "dump.json").unlink()
    for folder in ("keypoints", "matches", "scenes"):  # killed before the manifest was whole, there is no such folder
        (out / folder).rename(out / f"aside_{folder}")
    (out / ".dump.1.tmp.json").write_bytes(b"half")
    (out / ".dump.json.lock").touch()
    assert dump(pristine, out, "--shard", "2/3") == 0  # no scene: the manifest only
    for folder in ("keypoints", "matches", "scenes"):
        (out / f"aside_{folder}").rename(out / folder)
    for stray in ("keypoints/0001/.x.1.tmp.npy", "matches/0001/.1.1.tmp.npy", "scenes/.0001.1.tmp.json", ".0000.lock",
                  ".0001.lock"):
        (out / stray).write_bytes(b"half")
    assert dump(pristine, out) == 0
    assert files_of(out) == files_of(finished)


def test_worker_of_a_parent_that_died_meanwhile_does_nothing(tmp_path):
    """Killed while its workers start, a parent leaves tasks in their queue."""
    script = ("import multiprocessing as m, os, sys, threading; from tools import processes; from pathlib import Path\n"
              "class Dead:\n    def join(self): threading.Event().wait()\n    def is_alive(self): return False\n"
              "m.parent_process = Dead; processes.start_worker(); Path(sys.argv[1]).touch()")
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "done"], cwd=ROOT).returncode == 1
    assert not (tmp_path / "done").exists()


# several at once

@contextlib.contextmanager
def held(path):
    """The lock file `path`, held by somebody else."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def test_second_dump_of_a_scene_is_refused(pristine, finished, tmp_path, capsys):
    """One line, nothing of that scene is touched; other scenes can be dumped beside it."""
    out = tmp_path / "out"
    assert dump(pristine, out, "--shard", "0/2") == 0
    with held(out / ".0001.lock"):
        before = files_of(out)
        capsys.readouterr()
        for shard in ([], ["--shard", "1/2"]):
            assert_error(capsys, dump(pristine, out, *shard), "another process writes scene 0001 of", "--shard")
        assert files_of(out) == before
        assert dump(pristine, out, "--shard", "0/2") == 0
    assert dump(pristine, out) == 0
    assert files_of(out) == files_of(finished)


def test_two_processes_never_write_one_scene(pristine, finished, tmp_path):
    out = tmp_path / "out"
    processes = [start(pristine, out, "--workers", "1") for _ in range(2)]
    outcomes = [(process.communicate()[1], process.returncode) for process in processes]
    for errors, status in outcomes:
        assert status == 0 or (status == 2 and "another process writes scene" in errors and errors.count("\n") == 1)
    assert dump(pristine, out) == 0
    assert files_of(out) == files_of(finished)


def test_lock(tmp_path):
    path = tmp_path / "lock"
    with locked(path), pytest.raises(InUse, match="taken"), locked(path, "taken"):
        pass
    assert not path.exists()
    with locked(path, shared=True), locked(path, "taken", shared=True):
        with pytest.raises(InUse), locked(path, "taken"):
            pass
    assert not path.exists()
    with locked(path, shared=True):
        with locked(path, "taken", shared=True):
            pass
        with pytest.raises(InUse), locked(path, "taken"):  # the first who leaves must not remove it
            pass


def test_lock_is_not_held_on_a_file_that_was_removed(tmp_path):
    """Who waits for a lock gets the file that the holder removes: then it is the next one's turn to make it."""
    path, held_by_second, release = tmp_path / "lock", threading.Event(), threading.Event()

    def second():
        with locked(path):
            held_by_second.set()
            release.wait()
    with ThreadPoolExecutor(1) as pool:
        with locked(path):
            pool.submit(second)
            time.sleep(0.1)  # until it waits; a shorter time could only hide a failure
        try:
            assert held_by_second.wait(10)
            with pytest.raises(InUse), locked(path, "taken"):
                pass
        finally:
            release.set()


def test_file_system_without_locks(pristine, finished, tmp_path, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert dump(pristine, tmp_path / "out") == 0
    assert "this file system has no locks" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == files_of(finished)


# shards

def test_shards_at_once_end_with_the_same_bytes(pristine, finished, tmp_path):
    out = tmp_path / "out"
    processes = [start(pristine, out, "--workers", "1", "--shard", f"{i}/3") for i in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 3
    assert files_of(out) == files_of(finished)


def test_shards_one_after_the_other(pristine, finished, tmp_path, capsys):
    out = tmp_path / "out"
    for i, scenes in ((1, ["0001"]), (0, ["0000", "0001"])):
        assert dump(pristine, out, "--shard", f"{i}/2") == 0
        assert f"shard {i}/2:\n1 scenes, 4 of 4 images" in capsys.readouterr().out
        assert list(load_dump(out)["scenes"]) == scenes
    assert files_of(out) == files_of(finished)


def test_torchrun_is_a_shard(pristine, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("dump.dump_megadepth.wait_for_all", waited.append)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
    assert workers.available_cores() == 1
    assert dump(pristine, tmp_path) == 0
    assert list(load_dump(tmp_path)["scenes"]) == ["0001"] and len(waited) == 1
    assert workers.parse_shard("3/5") == (3, 5)


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "1/0", "a/b", ""])
def test_bad_shard(pristine, tmp_path, capsys, shard):
    assert_error(capsys, dump(pristine, tmp_path / "out", f"--shard={shard}"), f"--shard {shard}: expected I/N")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number, n_workers", [(signal.SIGINT, "2"), (signal.SIGTERM, "1")])
def test_signal_stops_cleanly(tmp_path, number, n_workers):
    write_megadepth(tmp_path / "base", n=16)  # large enough not to be done before the signal comes
    out = tmp_path / "out"
    process = start(tmp_path / "base", out, "--workers", n_workers)
    wait_for_records(process, out, 3)
    if number == signal.SIGINT:  # Ctrl-C reaches the workers, too
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped\n")
    assert not list(out.rglob(".*"))
    assert not (out / "scenes").exists()


def test_goes_on_after_the_last_match(pristine, out, monkeypatch):
    """What is there is not made again: kept keypoint and match records stay as they are."""
    untouched = files_of(out)
    (out / "scenes" / "0000.json").unlink()
    (out / "keypoints" / "0000" / "3.jpg_sift.npy").unlink()
    for record in (out / "matches" / "0000").iterdir():
        if int(record.stem) >= 4:
            record.unlink()
    old = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    assert dump(pristine, out) == 0
    assert files_of(out) == untouched
    assert {path: path.stat().st_mtime_ns for path in old} == old


def test_gap_in_the_matches_is_filled(pristine, out):
    untouched = files_of(out)
    (out / "scenes" / "0000.json").unlink()
    match_path(out, "0000", 2).unlink()
    for i in (5, 77):
        match_path(out, "0000", i).write_bytes(b"spoilt, after the gap")
    assert dump(pristine, out) == 0
    assert files_of(out) == untouched


@pytest.mark.parametrize("content", [b"", b"torn"])
def test_torn_records_of_an_unfinished_scene_are_made_again(pristine, finished, out, content):
    (out / "scenes" / "0000.json").unlink()
    for record in ("keypoints/0000/1.jpg_sift.npy", "matches/0000/3.npy"):
        (out / record).write_bytes((out / record).read_bytes()[:-9] if content else b"")
    assert dump(pristine, out) == 0
    assert files_of(out) == files_of(finished)


@pytest.mark.parametrize("record", ["keypoints/0000/1.jpg_sift.npy", "matches/0000/3.npy"])
def test_a_record_deleted_from_a_finished_scene_is_made_again(pristine, finished, out, capsys, record):
    (out / record).write_bytes(b"")
    assert verify(out) == 1
    assert f"{out / record}: " in (errors := capsys.readouterr().err) and "delete" in errors
    (out / record).unlink()
    assert dump(pristine, out) == 0
    assert files_of(out) == files_of(finished)


def test_changed_data_is_noticed(base, out, capsys):
    (out / "scenes" / "0000.json").unlink()
    change_info(base, overlap_matrix=np.eye(4))
    assert dump(base, out) == 1
    assert "the data changed since it was begun; delete" in capsys.readouterr().err
    assert not (out / "scenes" / "0000.json").exists()


LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); " \
          "from dump.{} import main; from tools.cli import run; sys.exit(run(main))"


@pytest.mark.parametrize("n_workers", ["1", "2"])
def test_full_disk_is_one_line_and_loses_nothing(pristine, finished, out, n_workers):
    """No file may grow to the size of a keypoint record."""
    for path in ("scenes/0001.json", "keypoints/0001/0.jpg_sift.npy"):
        (out / path).unlink()
    before = files_of(out)
    result = subprocess.run([sys.executable, "-c", LIMITED.format("dump_megadepth"), "--base_path", pristine,
                             "--save_path", out, "--workers", n_workers, *ARGUMENTS], cwd=ROOT, capture_output=True,
                            text=True)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert result.returncode == 2
    assert result.stderr == f"error: cannot write to {out}: File too large; what is done is kept\n"
    assert files_of(out) == before
    assert dump(pristine, out) == 0
    assert files_of(out) == files_of(finished)


# size, memory, counts

def test_record_of_4096_spp_keypoints_takes_at_most_2_3_MB(tmp_path):
    rng = np.random.default_rng(0)
    features = Features(*(rng.random(shape, np.float32) for shape in ((4096, 2), 4096, (4096, 256))), (1600, 1200))
    paths = [f"{folder}/0000/dense0/imgs/4183746529_9ee81ef1a5_o.jpg" for folder in
             ("Undistorted_SfM", "phoenix/S6/zl548/MegaDepth_v1")]
    task = ImageTask("", *paths, np.eye(3), np.eye(4), tmp_path / "record.npy", Recipe("spp"))
    assert task.finish((None, np.ones((1200, 1600), np.float32)), features)
    assert task.record_path.stat().st_size <= 2.3e6
    record = read_record(task.record_path)
    np.testing.assert_allclose(record["descriptors"], features.descriptors, atol=5e-4)
    np.testing.assert_array_equal(record["keypoints"], features.keypoints)


def test_matching_4096_keypoints_takes_at_most_50_MB():
    rng = np.random.default_rng(0)
    view = rng.random((4096, 2)) * 1000, np.full(4096, 4.0), K, np.eye(4)
    tracemalloc.start()
    match_by_projection(*view, *view)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_memory_does_not_grow_with_the_scene(tmp_path):
    """16 images and 240 pairs need no more than 4 and 12, but for 100 bytes a pair and 10 KB an image."""
    peaks = {}
    write_megadepth(tmp_path / "base", "4")
    info = load_scene_info(tmp_path / "base" / "scene_info" / "4.0.npz")
    larger = {name: list(values) * 4 if values.ndim == 1 else np.tile(values, (4, 4)) for name, values in info.items()}
    larger["image_paths"] = [path.replace(".jpg", f"_{i // 4}.jpg") for i, path in enumerate(larger["image_paths"])]
    for path, copy in zip(list(info["image_paths"]) * 4, larger["image_paths"]):
        shutil.copyfile(tmp_path / "base" / path, tmp_path / "base" / copy)
    write_scene_info(tmp_path / "base" / "scene_info" / "16.0.npz", larger)
    recipe = Recipe("sift", 50, max_keypoints=100)
    for n in (4, 4, 16):  # the first time, things are set up that stay
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        tracemalloc.start()
        counts = dump_scene(f"{n}", tmp_path / "base" / "scene_info" / f"{n}.0.npz", tmp_path / "base",
                            tmp_path / "out", recipe)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert counts["images"] == 16 and counts["candidate_pairs"] == 240 and counts["pairs"] > 150
    image_and_depth = SIZE[0] * SIZE[1] * 5
    assert peaks[4] > image_and_depth
    assert peaks[16] - peaks[4] < 12 * 10_000 + 228 * 100 < image_and_depth / 2


def test_report(base, tmp_path, capsys):
    (base / "Undistorted_SfM" / "0000" / "images" / "1.jpg").write_bytes(b"no image")
    report_path = tmp_path / "reports" / "dump.json"
    assert dump(base, tmp_path / "out", "--report", str(report_path)) == 1
    report = json.loads(report_path.read_text())
    printed = capsys.readouterr().out
    assert list(report) == ["images", "pairs_tried", "pairs", "rejected", "skipped", "seconds", "images_per_second",
                            "pairs_per_second", "megabytes_per_image", "peak_memory_mb"]
    assert report["images"] == 7 and report["pairs_tried"] == 24
    assert report["pairs"] == 24 - sum(report["rejected"].values()) > 0
    assert report["rejected"]["image_left_out"] == 6
    assert [name for name, _ in report["skipped"]] == ["0000 Undistorted_SfM/0000/images/1.jpg"]
    sizes = [path.stat().st_size for path in (tmp_path / "out" / "keypoints").glob("*/*")]
    assert report["megabytes_per_image"] == pytest.approx(sum(sizes) / 7 / 1e6)
    assert 20 < report["peak_memory_mb"] < 20_000 and report["seconds"] > 0
    assert report["images_per_second"] >= 8 / report["seconds"] and report["pairs_per_second"] > 0
    assert f"{report['images_per_second']:.2f} images/s" in printed and "7 of 8 images" in printed
    # rates are of the run, counts of the dump; the report is no part of the dump
    assert dump(base, tmp_path / "out", "--report", str(report_path)) == 1
    again = json.loads(report_path.read_text())
    assert again["images_per_second"] is None and again["pairs_per_second"] is None
    assert {name: again[name] for name in list(report)[:5]} == {name: report[name] for name in list(report)[:5]}
    capsys.readouterr()
    (tmp_path / "file").touch()
    assert_error(capsys, dump(base, tmp_path / "out", "--report", str(tmp_path / "file" / "x")), "--report")


# workers

def test_look_ahead_is_bounded():
    tasks = iter(range(100))
    with ThreadPoolExecutor(4) as pool:
        results = in_order(pool, lambda task: task, tasks, ahead=6)
        assert [next(results) for _ in range(10)] == list(range(10))
        assert next(tasks) == 9 + 6  # the reader is at the tenth
        assert list(results) == [task for task in range(10, 100) if task != 15]


class BatchNetwork:
    """A network that takes 100 pixels together; an image's features are its first pixel and what it came with."""

    batch_pixels = 100

    def __init__(self):
        self.batches = []

    def extract_batch(self, images):
        self.batches.append([int(image[0, 0]) for image in images])
        return [(int(image[0, 0]), len(images)) for image in images]

    def __call__(self, image):
        return self.extract_batch([image])[0]


class Task:
    """Image i of its number; `size` in its header, `real` in truth."""

    def __init__(self, i, size, real=None, bad=False):
        self.i, self.size, self.real, self.bad = i, size, real or size, bad

    def image_size(self):
        return self.size

    def load(self):
        return "bad" if self.bad else (np.full(self.real[::-1], self.i), "loaded")

    def finish(self, loaded, found):
        return (*found, loaded[1])


def in_batches(monkeypatch, sizes, done=(), bad=(), real_sizes=None, shard=None):
    """What becomes of images 0 .. n-1 of these sizes, and the batches that a network gets."""
    network, real_sizes = BatchNetwork(), real_sizes or sizes
    monkeypatch.setattr(features, "extractor", lambda *recipe: network)
    tasks = [Task(i, size, real_sizes[i], i in bad) for i, size in enumerate(sizes)]
    batches = features.batches_of(tasks, ("spp",), shard)
    results = features.each_image(batches, ("spp",), lambda task: task.i in done, None, 2)
    return {task.i: result for task, result in results}, network.batches


def test_images_of_one_size_make_a_batch(monkeypatch):
    sizes = [(5, 8), (8, 5), (5, 8), (20, 20), (5, 8), (8, 5)]
    found, batches = in_batches(monkeypatch, sizes)
    assert batches == [[0, 2], [4], [1, 5], [3]]
    assert found == {0: (0, 2, "loaded"), 2: (2, 2, "loaded"), 4: (4, 1, "loaded"), 1: (1, 2, "loaded"),
                     5: (5, 2, "loaded"), 3: (3, 1, "loaded")}


def test_batches_are_the_same_whatever_is_done(monkeypatch):
    """A batch that is done in part is extracted as a whole, and the rest of it is what becomes of it."""
    found, batches = in_batches(monkeypatch, [(5, 5)] * 11, done={0, 1, 2, 3, 5, 9})
    assert batches == [[4, 5, 6, 7], [8, 9, 10]]
    assert found == {i: (i, 4 if i < 8 else 3, "loaded") for i in (4, 6, 7, 8, 10)}


def test_shards_deal_out_whole_batches(monkeypatch):
    sizes = [(5, 5)] * 9 + [(6, 5)] * 4
    whole, batches = in_batches(monkeypatch, sizes)
    parts = [in_batches(monkeypatch, sizes, shard=(i, 3)) for i in range(3)]
    assert [batch for _, dealt in parts for batch in dealt] == batches[0::3] + batches[1::3] + batches[2::3]
    assert {**parts[0][0], **parts[1][0], **parts[2][0]} == whole and sum(len(found) for found, _ in parts) == 13


def test_bad_images_and_headers_in_a_batch(monkeypatch):
    found, batches = in_batches(monkeypatch, [(5, 5)] * 4, bad={0, 2})
    assert found[0] == found[2] == "bad" and batches == [[1, 3]] and found[3] == (3, 2, "loaded")
    found, batches = in_batches(monkeypatch, [(5, 5)] * 4, real_sizes=[(5, 5), (5, 5), (6, 5), (5, 5)])
    assert batches == [[0], [1], [2], [3]] and sorted(found) == [0, 1, 2, 3]
    assert in_batches(monkeypatch, [None, None], real_sizes=[(5, 5)] * 2)[1] == [[0], [1]]


def test_few_images_are_held_at_a_time(monkeypatch):
    """Two for each thread that reads, and a batch."""
    held, most = set(), 0

    class Image(np.ndarray):
        pass

    class Held(Task):
        def load(self):
            nonlocal most
            image = np.full((5, 5), self.i).view(Image)
            held.add(self.i)
            weakref.finalize(image, held.discard, self.i)
            most = max(most, len(held))
            return (image,)

        def finish(self, loaded, found):
            return True
    monkeypatch.setattr(features, "extractor", lambda *recipe: BatchNetwork())
    batches = features.batches_of([Held(i, (5, 5)) for i in range(60)], ("spp",))
    assert len(list(features.each_image(batches, ("spp",), lambda task: False, None, 2))) == 60
    assert 4 < most <= 2 * 2 + 3 * 4  # what is read ahead, the batch, and the last one until it is replaced


def test_header_size(tmp_path):
    write_image(tmp_path / "a.jpg", np.zeros((20, 30), np.uint8))
    (tmp_path / "b.jpg").write_bytes(b"no image")
    assert header_size(tmp_path / "a.jpg") == (30, 20)
    assert header_size(tmp_path / "b.jpg") is header_size(tmp_path / "c.jpg") is None


def test_gpus_are_dealt_to_the_processes_of_torchrun(monkeypatch):
    built = []
    monkeypatch.setattr(features, "_extractor", lambda feature_type, settings: built.append(dict(settings)["device"]))
    monkeypatch.setattr("tools.distributed.choose_devices", lambda gpu: ["cuda:0", "cuda:1"])
    features.extractor("spp", {})
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    features.extractor("spp", {})
    features.extractor("spp", {}, "cpu")
    assert built == ["auto", "cuda:1", "cpu"]


def test_workers_take_one_core_and_may_die():
    """They leave Ctrl-C to their parent, and one that is killed ends the work with one line."""
    with pytest.raises(InputError, match="a worker was killed"), worker_pool(2) as pool:
        assert pool.submit(cv2.getNumThreads).result() == 1
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        list(in_order(pool, os._exit, [1, 1], ahead=2))


# bad input

def assert_error(capsys, status, *words):
    errors = capsys.readouterr().err
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    for word in words:
        assert word in errors


def test_missing_base_path(tmp_path, capsys):
    assert_error(capsys, dump(tmp_path / "nowhere", tmp_path / "out"), "nowhere", "--base_path")
    assert not (tmp_path / "out").exists()


def test_base_path_without_scene_info(tmp_path, capsys):
    assert_error(capsys, dump(tmp_path, tmp_path / "out"), "no scene_info")
    assert not (tmp_path / "out").exists()


def test_unknown_scene(pristine, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("0000\n0077\n")
    assert_error(capsys, dump(pristine, tmp_path / "out", "--scene_list", str(tmp_path / "list.txt")), "0077")


def test_setting_of_another_feature():
    with pytest.raises(InputError, match="contrast_threshold is not a setting of spp"):
        Recipe("spp", contrast_threshold=0.1)


def test_no_workers(pristine, tmp_path, capsys):
    assert_error(capsys, dump(pristine, tmp_path / "out", "--workers", "0"), "--workers")


@pytest.mark.parametrize("change, names", [
    (["--contrast_threshold", "0.02"], "contrast_threshold 0.04, now it is 0.02"),
    (["--min_keypoints", "201"], "min_keypoints 200, now it is 201"),
    (["--unique_locations"], "unique_locations False, now it is True"),
    (["--descriptor_dtype", "float32"], "descriptor_dtype"),
])
def test_other_settings_are_refused(pristine, out, capsys, change, names):
    untouched = files_of(out)
    assert_error(capsys, dump(pristine, out, *change), names)
    assert files_of(out) == untouched


def test_other_version_is_refused(pristine, out, capsys):
    manifest = json.loads((out / "dump.json").read_text())
    (out / "dump.json").write_text(json.dumps({**manifest, "version": 0}))
    assert_error(capsys, dump(pristine, out), "version 0, now it is 1")


def test_a_dump_without_the_threshold_of_matches_had_5_pixels(pristine, out, capsys):
    path = out / "dump.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["inlier_th"]
    path.write_text(json.dumps(manifest))
    assert dump(pristine, out) == 0
    manifest["settings"]["inlier_th"] = 3.0
    path.write_text(json.dumps(manifest))
    capsys.readouterr()
    assert_error(capsys, dump(pristine, out), "inlier_th 3.0, now it is 5.0")


def test_foreign_folder_is_refused(pristine, tmp_path, capsys):
    (tmp_path / "keypoints").mkdir()
    assert_error(capsys, dump(pristine, tmp_path), "without dump.json")


def test_unreadable_image_and_depth_of_another_size(base, tmp_path, capsys):
    """Both images are left out and listed, their pairs are not made, the others are; a second run says so again."""
    images = base / "Undistorted_SfM" / "0000" / "images"
    (images / "1.jpg").write_bytes(b"no image")
    write_depth(base / "phoenix/S6/zl548/MegaDepth_v1/0000/dense0/depths/2.h5", np.ones((120, 320)))
    for _ in range(2):
        assert dump(base, tmp_path / "out") == 1
        errors = capsys.readouterr().err
        assert "1.jpg: not a readable image" in errors and "is 320x120, the image 320x240" in errors
    counts = json.loads((tmp_path / "out" / "scenes" / "0000.json").read_text())
    assert counts["images"] == 2 and counts["rejected"]["image_left_out"] == 10 and len(counts["skipped"]) == 2
    names = {read_record(path)[name][-5:] for path in (tmp_path / "out" / "matches" / "0000").iterdir()
             for name in ("image_path0", "image_path1")}
    assert names <= {"0.jpg", "3.jpg"}
    assert load_dump(tmp_path / "out")["scenes"]["0001"] > 0
    assert verify_dump(tmp_path / "out")[1] == []


def test_missing_and_broken_depth(base, tmp_path, capsys):
    depths = base / "phoenix/S6/zl548/MegaDepth_v1/0000/dense0/depths"
    (depths / "0.h5").unlink()
    (depths / "1.h5").write_bytes((depths / "1.h5").read_bytes()[:2000])
    assert dump(base, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert "depth map not found" in errors and "not a depth map" in errors


def test_too_few_keypoints_is_no_error(base, tmp_path, capsys):
    write_image(base / "Undistorted_SfM" / "0000" / "images" / "3.jpg", np.full(SIZE[::-1], 90, np.uint8))
    assert dump(base, tmp_path / "out") == 0
    assert "1 images have fewer keypoints than --min_keypoints" in capsys.readouterr().out
    counts = json.loads((tmp_path / "out" / "scenes" / "0000.json").read_text())
    assert counts["few_keypoints"] == 1 and counts["images"] == 3 and counts["skipped"] == []
    assert not (tmp_path / "out" / "keypoints" / "0000" / "3.jpg_sift.npy").exists()


def test_min_keypoints_is_inclusive(pristine, tmp_path):
    n = len(Sift()(read_image(pristine / "Undistorted_SfM/0000/images/0.jpg")).keypoints)
    for least, expected in ((n, True), (n + 1, False)):
        dump(pristine, tmp_path / str(least), "--min_keypoints", str(least))
        assert (tmp_path / str(least) / "keypoints/0000/0.jpg_sift.npy").exists() == expected


def test_limits_of_a_pair(finished, tmp_path):
    """More than 20 keypoints with depth on each side, and more than 20 matches; a view is matched with itself here."""
    record = read_record(finished / "keypoints" / "0000" / "0.jpg_sift.npy")
    apart = []  # keypoints that cannot be taken for one another
    for i, place in enumerate(record["keypoints"]):
        if all(np.abs(place - record["keypoints"][j]).max() > 10 for j in apart):
            apart.append(i)

    def known(rows):
        path = tmp_path / f"{rows[0]}_{len(rows)}.npy"
        depth = np.zeros_like(record["depth"])
        depth[rows] = record["depth"][rows]
        write_record(path, {**record, "depth": depth})
        return path

    first20, first21, other21, all_of_them = (known(rows) for rows in (apart[:20], apart[:21], apart[1:22], apart))
    few_depths, few_depths_too, few_matches, enough = match_pairs(
        [(first20, all_of_them), (all_of_them, first20), (first21, other21), (first21, all_of_them)])
    assert few_depths == few_depths_too == "few_keypoints_with_depth" and few_matches == "few_matches"
    assert enough.tolist() == [[i, i] for i in sorted(apart[:21])]


def test_view_without_depth_is_in_no_pair(base, tmp_path):
    write_depth(base / "phoenix/S6/zl548/MegaDepth_v1/0000/dense0/depths/0.h5", np.zeros(SIZE[::-1]))
    assert dump(base, tmp_path / "out") == 0
    counts = json.loads((tmp_path / "out" / "scenes" / "0000.json").read_text())
    assert counts["rejected"]["few_keypoints_with_depth"] == 6 and counts["images"] == 4


def test_scene_without_valid_pairs(base, tmp_path, capsys):
    change_info(base, overlap_matrix=np.full((4, 4), 0.9))
    assert dump(base, tmp_path / "out") == 0
    assert "1 scenes have no valid pair: 0000" in capsys.readouterr().out
    assert list(load_dump(tmp_path / "out")["scenes"]) == ["0001"]
    with pytest.raises(InputError, match="has no pairs"):
        load_dump(tmp_path / "out", ["0000"])


def test_none_entries_are_no_candidates(base, tmp_path):
    info = load_scene_info(base / "scene_info" / "0000.0.npz")
    for name in ("image_paths", "depth_paths", "intrinsics", "poses", "points3D_id_to_2D"):
        info[name][2] = None
    change_info(base, **info)
    assert dump(base, tmp_path / "out") == 0
    counts = json.loads((tmp_path / "out" / "scenes" / "0000.json").read_text())
    assert counts["candidate_pairs"] == 6 and counts["candidate_images"] == 3


@pytest.mark.parametrize("changes, words", [
    ({"overlap_matrix": np.ones((3, 3))}, "overlap_matrix is (3, 3), for 4 images"),
    ({"image_paths": [f"{i}/same.jpg" for i in range(4)]}, "two images have the same file name"),
    ({"poses": [np.eye(4)] * 3}, "poses is missing, or not for 4 images"),
])
def test_bad_scene_info_leaves_the_other_scenes(base, tmp_path, capsys, changes, words):
    change_info(base, **changes)
    assert dump(base, tmp_path / "out") == 1
    assert words in capsys.readouterr().err
    assert list(load_dump(tmp_path / "out")["scenes"]) == ["0001"]


@pytest.mark.parametrize("name, value, words", [
    ("image_paths", "../0001/images/1.jpg", "must lie below"),
    ("depth_paths", "/etc/hostname", "must lie below"),
    ("image_paths", f"{'n' * 250}.jpg", "its name is too long"),
    ("intrinsics", np.zeros((3, 3)), "intrinsics"),
    ("poses", np.full((4, 4), np.nan), "pose"),
])
def test_an_image_with_a_bad_name_or_camera_is_left_out(base, tmp_path, capsys, name, value, words):
    values = load_scene_info(base / "scene_info" / "0000.0.npz")[name]
    values[1] = value
    change_info(base, **{name: values})
    assert dump(base, tmp_path / "out") == 1
    assert words in capsys.readouterr().err
    assert load_dump(tmp_path / "out")["scenes"]["0001"] > 0


def test_fifo_is_not_opened(base, tmp_path, capsys):
    image = base / "Undistorted_SfM" / "0000" / "images" / "1.jpg"
    image.unlink()
    os.mkfifo(image)
    assert dump(base, tmp_path / "out") == 1
    assert "1.jpg is a device or pipe" in capsys.readouterr().err


def test_damaged_scene_info(base, tmp_path, capsys):
    for scene in ("0000", "0001"):
        path = base / "scene_info" / f"{scene}.0.npz"
        path.write_bytes(path.read_bytes()[:500])
        assert dump(base, tmp_path / "out") == (1 if scene == "0000" else 2)
        assert f"scene {scene}: " in capsys.readouterr().err
        shutil.rmtree(tmp_path / "out")


# reading it back

def test_load_dump(finished, out, tmp_path):
    dump = load_dump(finished)
    assert dump["feature_type"] == "sift" and dump["incomplete"] == [] and set(dump["scenes"]) == {"0000", "0001"}
    assert list(load_dump(finished, ["0001"])["scenes"]) == ["0001"]
    with pytest.raises(InputError, match="is not a dump"):
        load_dump(tmp_path)
    with pytest.raises(InputError, match=r"lacks 1 of the 2 scenes asked for \(0099\)"):
        load_dump(finished, ["0000", "0099"])
    (out / "scenes" / "0000.json").unlink()
    assert load_dump(out)["incomplete"] == ["0000"] and list(load_dump(out)["scenes"]) == ["0001"]
    (out / "scenes" / "0001.json").unlink()
    with pytest.raises(InputError, match="no pairs; unfinished scenes: 0000, 0001"):
        load_dump(out)
    (out / "dump.json").write_text('{"format": "imp-dump", "version": 7}')
    with pytest.raises(InputError, match="version 7"):
        load_dump(out)


@pytest.mark.parametrize("file, change, words", [
    ("dump.json", [], "it holds no JSON object"),
    ("dump.json", {"settings": 5}, "its settings is 5"),
    ("dump.json", {"settings": {"descriptor_dtype": "float16"}}, "its min_keypoints is None"),
    ("dump.json", {"settings": {"min_keypoints": "many"}}, "its min_keypoints is 'many'"),
    ("dump.json", {"feature_type": ["sift"]}, r"its feature_type is \['sift'\]"),
    ("scenes/0000.json", {"pairs": -1}, "its pairs is -1"),
    ("scenes/0000.json", {"pairs": 10 ** 12}, "its pairs is 1000000000000"),
    ("scenes/0000.json", {"images": None}, "its images is None"),
    ("scenes/0000.json", {"bytes": 1.5}, "its bytes is 1.5"),
    ("scenes/0000.json", {"rejected": {"few": []}}, "its rejected is"),
    ("scenes/0000.json", {"skipped": [["a"]]}, "its skipped is"),
])
def test_what_a_dump_says_of_itself_is_checked(pristine, out, capsys, file, change, words):
    content = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps({**content, **change} if change else change))
    with pytest.raises(InputError, match=rf"{file} is damaged: {words}"):
        load_dump(out)
    assert verify(out) == dump(pristine, out) == (2 if file == "dump.json" else 1)
    errors = capsys.readouterr().err
    assert errors.count("is damaged") == 2 or "was made with" in errors
    assert "unexpected" not in errors and "Error" not in errors


def test_what_early_dumps_did_not_count_is_none(pristine, finished, out):
    path = out / "scenes" / "0000.json"
    path.write_text(json.dumps({name: json.loads(path.read_text())[name] for name in ("pairs", "images")}))
    assert dump(pristine, out) == 0
    assert load_dump(out)["scenes"] == load_dump(finished)["scenes"]


def verify(out):
    return run(main, ["--verify", "--save_path", str(out)])


def test_verify_good(finished, capsys):
    assert verify(finished) == 0
    assert "0 problems" in capsys.readouterr().out


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def out_of_range(path):
    record = read_record(path)
    record["matches"] = record["matches"].copy()
    record["matches"][0, 1] = 4096
    write_record(path, record)


def twice(path):
    record = read_record(path)
    record["matches"] = record["matches"].copy()
    record["matches"][1] = record["matches"][0]
    write_record(path, record)


def shorter(path):
    record = read_record(path)
    write_record(path, {**record, "scores": record["scores"][1:]})


def scalars(path):
    write_record(path, dict.fromkeys(read_record(path), 1))


def not_finite(path, name="pose"):
    record = read_record(path)
    write_record(path, {**record, name: record[name] * np.nan})


@pytest.mark.parametrize("file, spoil, words", [
    ("keypoints/0000/1.jpg_sift.npy", truncate, "not a whole record"),
    ("keypoints/0000/1.jpg_sift.npy", Path.unlink, "3 keypoint records, 4 expected"),
    ("keypoints/0000/1.jpg_sift.npy", shorter, "its scores are ("),
    ("keypoints/0000/1.jpg_sift.npy", scalars, "1.jpg_sift.npy: "),
    ("keypoints/0000/1.jpg_sift.npy", not_finite, "pose has values that are not finite"),
    ("keypoints/0000/1.jpg_sift.npy", functools.partial(not_finite, name="descriptors"), "descriptors has values"),
    ("matches/0000/2.npy", truncate, "not a whole record"),
    ("matches/0000/2.npy", Path.unlink, "record not found"),
    ("matches/0000/2.npy", out_of_range, "name keypoints that view 1, of "),
    ("matches/0000/2.npy", twice, "matched twice"),
    ("matches/0000/77.npy", Path.touch, "does not belong"),
    ("scenes/0000.json", Path.unlink, "scene 0000: not complete"),
])
def test_verify_finds(out, capsys, file, spoil, words):
    spoil(out / file)
    assert verify(out) == 1
    assert words in capsys.readouterr().err


def test_verify_no_dump(tmp_path, capsys):
    assert_error(capsys, verify(tmp_path), "is not a dump")


def test_threads_do_not_matter(pristine):
    """Workers use one thread of OpenCV, a single process uses all: the features must be the same."""
    image = read_image(pristine / "Undistorted_SfM" / "0000" / "images" / "0.jpg")
    threads = cv2.getNumThreads()
    try:
        found = []
        for n in (1, 4):
            cv2.setNumThreads(n)
            found.append(Sift()(image))
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_array_equal(found[0].keypoints, found[1].keypoints)
    np.testing.assert_array_equal(found[0].descriptors, found[1].descriptors)
