"""RGB-D sequences -> the MegaDepth layout: conventions, the pair list, bad frames, and running again."""
import errno
import os
import re
import shutil
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import pytest
from plane_scene import files_of

import dump.import_rgbd
from dump.import_rgbd import import_rgbd, main
from tools.cli import InputError, run
from tools.correspondences import depth_at, match_by_projection, reproject
from tools.files import read_depth, read_image, write_depth
from tools.geometry import lift, make_pose, project
from tools.pair_list import read_pair_list
from tools.scene_info import list_scenes, load_scene_info

KITCHEN = Path(__file__).resolve().parents[2] / "shared" / "data" / "kitchen"
W, H = 96, 72
K = np.array([[90.0, 0, 46.5], [0, 92.0, 35.0], [0, 0, 1]])  # OpenCV's convention
NORMAL, OFFSET = np.array([0.6, 0.0, 0.8]), 3.0  # the wall: NORMAL . X = OFFSET, slanted so that half a pixel shows
NUMBERS = (3, 7, 11, 20, 21, 40)


def camera_to_world(index):
    a = np.deg2rad(8.0 * index)
    return make_pose(np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]]),
                     [0.1 * index, 0.05 * index, -0.1 * index])


def wall_depth(pose):
    """Depth (H, W) of the wall for a camera-to-world pose, metres."""
    x, y = np.meshgrid(np.arange(W), np.arange(H))
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(K).T @ pose[:3, :3].T
    return (OFFSET - NORMAL @ pose[:3, 3]) / (rays @ NORMAL)


def write_frame(folder, index, number, suffix="jpg"):
    stem = folder / f"frame-{number:06d}"
    image = np.random.default_rng(number).integers(0, 255, (H, W, 3), dtype=np.uint8)
    depth = np.round(wall_depth(camera_to_world(index)) * 1000)
    depth[:4, :4], depth[-4:, -4:] = 0, 65535
    cv2.imwrite(f"{stem}.color.{suffix}", image)
    cv2.imwrite(f"{stem}.depth.png", depth.astype(np.uint16))
    np.savetxt(f"{stem}.pose.txt", camera_to_world(index), fmt="%.8f")


@pytest.fixture
def sequence(tmp_path):
    folder = tmp_path / "sequence"
    folder.mkdir()
    for index, number in enumerate(NUMBERS):
        write_frame(folder, index, number)
    np.savetxt(folder / "camera-intrinsics.txt", K)
    return folder


def command(sequence, out, *options, scene="wall"):
    return run(main, ["--sequence_path", str(sequence), "--save_path", str(out), "--scene", scene, *options])


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
            for path in sorted(folder.rglob("*")) if path.is_file()}


def stems(info):
    return [int(Path(path).stem.removeprefix("frame-")) for path in info["image_paths"]]


def test_layout_and_conventions(sequence, tmp_path):
    out = tmp_path / "out"
    assert command(sequence, out) == 0
    assert list(list_scenes(out)) == ["wall"]
    info = load_scene_info(out / "scene_info" / "wall.0.npz")
    assert list(info["image_paths"]) == [f"Undistorted_SfM/wall/images/frame-{n:06d}.jpg" for n in NUMBERS]
    assert list(info["depth_paths"]) == [
        f"phoenix/S6/zl548/MegaDepth_v1/wall/dense0/depths/frame-{n:06d}.h5" for n in NUMBERS]
    assert len(snapshot(out)) == 2 * len(NUMBERS) + 1
    x, y = np.meshgrid(np.arange(0, W, 5), np.arange(0, H, 5))
    keypoints = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float64)
    depths = []
    for i, number in enumerate(NUMBERS):
        assert (out / info["image_paths"][i]).read_bytes() == (sequence / f"frame-{number:06d}.color.jpg").read_bytes()
        depth = read_depth(out / info["depth_paths"][i])
        assert depth.shape == (H, W) and (depth[:4, :4] == 0).all() and (depth[-4:, -4:] == 0).all()
        depths.append(depth_at(depth, keypoints))
        known = depths[i] > 0
        np.testing.assert_allclose(info["intrinsics"][i], K + [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        points = lift(keypoints[known] + 0.5, depths[i][known], info["intrinsics"][i], info["poses"][i])
        # 1.5 mm: the depth's rounding; half a pixel would be 10 mm
        np.testing.assert_allclose(points @ NORMAL, OFFSET, atol=1.5e-3)
    # where frame 0 sees a thing, the truth being computed with no code of the project
    pose0, pose1 = camera_to_world(0), camera_to_world(2)
    truth = np.c_[keypoints, np.ones(len(keypoints))] @ np.linalg.inv(K).T * wall_depth(pose0)[y, x].reshape(-1, 1)
    truth = (truth @ pose0[:3, :3].T + pose0[:3, 3] - pose1[:3, 3]) @ pose1[:3, :3] @ K.T
    landed = reproject(keypoints, depths[0], info["intrinsics"][0], info["poses"][0], info["intrinsics"][2],
                       info["poses"][2])
    known = depths[0] > 0
    np.testing.assert_allclose(landed[known], (truth[:, :2] / truth[:, 2:])[known], atol=0.05)


def test_overlap_falls_with_the_angle_and_ids_are_shared(sequence, tmp_path):
    import_rgbd(sequence, tmp_path / "out", "wall")
    info = load_scene_info(tmp_path / "out" / "scene_info" / "wall.0.npz")
    overlap = info["overlap_matrix"]
    np.testing.assert_allclose(info["angles"][0], 8.0 * np.arange(6), atol=1e-4)
    assert (np.diff(overlap[0]) < 0).all() and overlap[0, 1] > 0.7
    shared = info["points3D_id_to_2D"][0].keys() & info["points3D_id_to_2D"][2].keys()
    assert len(shared) >= 100


def test_eval_pairs(sequence, tmp_path):
    out = tmp_path / "out"
    options = ["--eval_pairs", "5", "--min_rotation", "12", "--max_rotation", "30", "--min_overlap", "0.2"]
    assert command(sequence, out, *options) == 0
    info = load_scene_info(out / "scene_info" / "wall.0.npz")
    names = [Path(path).name for path in info["image_paths"]]
    pairs = read_pair_list(out / "pairs" / "wall.txt")
    assert len(pairs) == 5
    seen = set()
    for pair in pairs:
        i, j = names.index(pair.image0), names.index(pair.image1)
        seen.add((i, j))
        assert i < j and 12 <= 8 * (j - i) <= 30  # frames are turned by 8 degrees each
        assert min(info["overlap_matrix"][i, j], info["overlap_matrix"][j, i]) >= 0.2
        np.testing.assert_allclose(pair.K0, K), np.testing.assert_allclose(pair.K1, K)
        # a point of the wall, seen from both: OpenCV's pixels, no half pixel anywhere
        pixel = np.array([[50.0, 30.0]])
        depth = wall_depth(camera_to_world(i))[30, 50:51]
        there, _ = project(lift(pixel, depth, pair.K0, np.eye(4)), pair.K1, pair.T_0to1)
        point = lift(pixel, depth, K, np.linalg.inv(camera_to_world(i)))
        np.testing.assert_allclose(there, project(point, K, np.linalg.inv(camera_to_world(j)))[0], atol=1e-4)
    assert len(seen) == 5
    first = (out / "pairs" / "wall.txt").read_text()
    command(sequence, out, *options)
    assert (out / "pairs" / "wall.txt").read_text() == first
    command(sequence, out, *options, "--seed", "1")
    assert (out / "pairs" / "wall.txt").read_text() != first


def test_eval_pairs_fewer_than_asked_and_none(sequence, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(sequence, out, "--eval_pairs", "100", "--min_rotation", "7", "--max_rotation", "9",
                   "--min_overlap", "0") == 0
    assert len(read_pair_list(out / "pairs" / "wall.txt")) == 5
    assert "only 5 of 100 evaluation pairs" in capsys.readouterr().out
    overlap = load_scene_info(out / "scene_info" / "wall.0.npz")["overlap_matrix"]
    smaller = np.minimum(overlap, overlap.T)[np.arange(5), np.arange(1, 6)]
    threshold = (np.sort(smaller)[2] + np.sort(smaller)[1]) / 2
    command(sequence, out, "--eval_pairs", "100", "--min_rotation", "7", "--max_rotation", "9",
            "--min_overlap", str(threshold))
    assert len(read_pair_list(out / "pairs" / "wall.txt")) == 3
    assert command(sequence, out, "--eval_pairs", "100", "--min_rotation", "90", "--max_rotation", "99") == 0
    assert "only 0 of 100" in capsys.readouterr().out
    assert not (out / "pairs" / "wall.txt").exists()


def test_first_and_last_split_a_sequence(sequence, tmp_path):
    out = tmp_path / "out"
    assert command(sequence, out, "--last", "11", scene="train") == 0
    assert command(sequence, out, "--first", "12", "--last", "21", scene="val") == 0
    assert list(list_scenes(out)) == ["train", "val"]
    assert stems(load_scene_info(out / "scene_info" / "train.0.npz")) == [3, 7, 11]
    assert stems(load_scene_info(out / "scene_info" / "val.0.npz")) == [20, 21]


def test_running_again_changes_nothing_and_mends_what_is_missing(sequence, tmp_path):
    out = tmp_path / "out"
    command(sequence, out)
    before = snapshot(out)
    assert command(sequence, out) == 0
    assert snapshot(out) == before
    depth = "phoenix/S6/zl548/MegaDepth_v1/wall/dense0/depths/frame-000007.h5"
    content = read_depth(out / depth)
    (out / depth).unlink()
    assert command(sequence, out) == 0
    after = snapshot(out)
    assert {name for name in after if after[name] != before[name]} <= {depth, "Undistorted_SfM/wall/images/"
                                                                      "frame-000007.jpg"}
    assert np.array_equal(read_depth(out / depth), content)


def test_scene_info_is_written_last_and_whole(sequence, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dump.import_rgbd, "write_pair_list", interrupted)
        assert command(sequence, out, "--eval_pairs", "2", "--min_rotation", "5") == 130
    assert not (out / "scene_info").exists() and len(snapshot(out)) == 12
    assert command(sequence, out, "--eval_pairs", "2", "--min_rotation", "5") == 0
    assert len(snapshot(out)) == 14
    # a new frame joins: the file is made anew
    write_frame(sequence, 1, 50)
    assert command(sequence, out) == 0
    assert stems(load_scene_info(out / "scene_info" / "wall.0.npz")) == [*NUMBERS, 50]
    # poses made better: likewise
    np.savetxt(sequence / "frame-000050.pose.txt", camera_to_world(2), fmt="%.8f")
    assert command(sequence, out) == 0
    np.testing.assert_allclose(load_scene_info(out / "scene_info" / "wall.0.npz")["poses"][6],
                               np.linalg.inv(camera_to_world(2)), atol=1e-7)
    # and a camera calibrated anew
    np.savetxt(sequence / "camera-intrinsics.txt", K + [[1, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert command(sequence, out) == 0
    assert load_scene_info(out / "scene_info" / "wall.0.npz")["intrinsics"][0][0, 0] == K[0, 0] + 1


def test_any_number_of_workers_gives_the_same(sequence, tmp_path):
    for workers in ("1", "4"):
        assert command(sequence, tmp_path / workers, "--workers", workers) == 0
    one, four = (load_scene_info(tmp_path / workers / "scene_info" / "wall.0.npz") for workers in ("1", "4"))
    assert np.array_equal(one["overlap_matrix"], four["overlap_matrix"])
    assert list(one["points3D_id_to_2D"]) == list(four["points3D_id_to_2D"])
    assert files_of(tmp_path / "1") == files_of(tmp_path / "4")


def test_two_runs_give_the_same_bytes_whatever_the_clock_says(sequence, tmp_path, monkeypatch):
    assert command(sequence, tmp_path / "now") == 0
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr("time.localtime", lambda *seconds: time.gmtime(1e9))
    assert command(sequence, tmp_path / "then") == 0
    assert files_of(tmp_path / "now") == files_of(tmp_path / "then")
    assert len(files_of(tmp_path / "now")) == 2 * len(NUMBERS) + 1


def test_a_depth_map_has_the_same_bytes_whatever_was_written_before(tmp_path):
    rng = np.random.default_rng(0)
    maps = [np.round(rng.uniform(1, 5, (480, 640)), 3).astype(np.float32) for _ in range(8)]
    written = []
    for workers in (1, 2, 4):
        with ThreadPool(workers) as pool:
            pool.starmap(write_depth, [(tmp_path / str(workers) / f"{i}.h5", depth) for i, depth in enumerate(maps)])
        written.append(files_of(tmp_path / str(workers)))
    assert written[0] == written[1] == written[2]


def test_what_a_killed_run_left_half_written_goes(sequence, tmp_path):
    out = tmp_path / "out"
    strays = [out / folder / f".x.{os.getpid()}.tmp.h5" for folder in (
        "phoenix/S6/zl548/MegaDepth_v1/wall/dense0/depths", "Undistorted_SfM/wall/images", "scene_info")]
    for stray in strays:
        stray.parent.mkdir(parents=True)
        stray.write_bytes(b"half")
    assert command(sequence, out) == 0
    assert not any(stray.exists() for stray in strays)
    linked = out / "Undistorted_SfM" / "wall" / "images" / "frame-000003.jpg"
    assert linked.samefile(sequence / "frame-000003.color.jpg")


def test_a_full_disk_ends_the_command(sequence, tmp_path, monkeypatch, capsys):
    def full(path, depth):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    monkeypatch.setattr(dump.import_rgbd, "write_depth", full)
    assert command(sequence, tmp_path / "out") == 2
    expect_error(capsys, tmp_path / "out", "No space left on device")


def test_png_images_as_in_seven_scenes(sequence, tmp_path):
    for path in sequence.glob("*.color.jpg"):
        path.unlink()
    for index, number in enumerate(NUMBERS):
        write_frame(sequence, index, number, "png")
    assert command(sequence, tmp_path / "out") == 0
    info = load_scene_info(tmp_path / "out" / "scene_info" / "wall.0.npz")
    assert info["image_paths"][0] == "Undistorted_SfM/wall/images/frame-000003.png"
    assert read_image(tmp_path / "out" / info["image_paths"][0]).shape == (H, W)


def test_images_are_copied_where_links_cannot_be_made(sequence, tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError("another file system")

    monkeypatch.setattr(dump.import_rgbd.os, "link", no_links)
    assert command(sequence, tmp_path / "out") == 0
    copy = tmp_path / "out" / "Undistorted_SfM" / "wall" / "images" / "frame-000003.jpg"
    assert copy.read_bytes() == (sequence / "frame-000003.color.jpg").read_bytes()


def remove(suffix):
    return lambda folder: (folder / f"frame-000011.{suffix}").unlink()


def replace(suffix, content):
    return lambda folder: (folder / f"frame-000011.{suffix}").write_text(content)


def resize_depth(folder):
    cv2.imwrite(str(folder / "frame-000011.depth.png"), np.full((H, W - 1), 2000, np.uint16))


def shallow_depth(folder):
    cv2.imwrite(str(folder / "frame-000011.depth.png"), np.full((H, W), 200, np.uint8))


@pytest.mark.parametrize("harm, reason", [
    (remove("color.jpg"), "no color.jpg or color.png"),
    (remove("depth.png"), "no depth.png"),
    (remove("pose.txt"), "frame-000011.pose.txt"),
    (replace("color.jpg", "not an image"), "not a readable image"),
    (replace("depth.png", "not an image"), "not a 16-bit depth PNG"),
    (replace("pose.txt", "1 0 0 0"), "does not hold 4x4 numbers"),
    (replace("pose.txt", "one " * 16), "does not hold 4x4 numbers"),
    (replace("pose.txt", "0 " * 16), "not a camera-to-world pose"),
    (replace("pose.txt", "1 0 0 0 0 1 0 0 0 0 -1 0 0 0 0 1"), "not a camera-to-world pose"),
    (shallow_depth, "not a 16-bit depth PNG"),
    (resize_depth, "depth is 95x72, the image 96x72"),
], ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "")
def test_a_bad_frame_is_left_out_and_listed(sequence, tmp_path, capsys, harm, reason):
    harm(sequence)
    out = tmp_path / "out"
    assert command(sequence, out) == 1
    listed = capsys.readouterr().err
    assert "1 frames skipped:" in listed
    assert re.search(rf"^  frame-000011: .*{re.escape(reason)}", listed, re.M)
    info = load_scene_info(out / "scene_info" / "wall.0.npz")
    assert stems(info) == [3, 7, 20, 21, 40] and info["overlap_matrix"].shape == (5, 5)
    assert not [name for name in snapshot(out) if "000011" in name]
    # once mended, it joins
    write_frame(sequence, 2, 11)
    assert command(sequence, out) == 0
    assert stems(load_scene_info(out / "scene_info" / "wall.0.npz")) == list(NUMBERS)


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_lost_tracking_is_counted(sequence, tmp_path, capsys, value):
    for number in (7, 40):
        (sequence / f"frame-{number:06d}.pose.txt").write_text(f"{value} " * 12 + "0 0 0 1")
    assert command(sequence, tmp_path / "out") == 0
    assert "2 frames left out: tracking lost" in capsys.readouterr().out
    assert stems(load_scene_info(tmp_path / "out" / "scene_info" / "wall.0.npz")) == [3, 11, 20, 21]


def expect_error(capsys, out, *words):
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    assert not (out / "scene_info").exists()


def test_nothing_to_import(sequence, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(tmp_path / "nowhere", out) == 2
    expect_error(capsys, out, "folder not found", "nowhere")
    (tmp_path / "empty").mkdir()
    assert command(tmp_path / "empty", out) == 2
    expect_error(capsys, out, "frame-XXXXXX.color.jpg", "empty")
    assert command(sequence, out, "--first", "22", "--last", "39") == 2
    expect_error(capsys, out, "--first", "frames 3 to 40")
    for path in sequence.glob("*.color.jpg"):
        path.write_text("not an image")
    assert command(sequence, out) == 2
    expect_error(capsys, out, "no frame of", "frame-000003", "not a readable image")
    assert not snapshot(out)


@pytest.mark.parametrize("content, words", [
    (None, "not found"), ("525 0 320 0 525 240", "3x3"), ("0 0 320 0 0 240 0 0 1", "not a camera matrix"),
    ("nan 0 320 0 525 240 0 0 1", "not a camera matrix")])
def test_intrinsics(sequence, tmp_path, capsys, content, words):
    if content is None:
        (sequence / "camera-intrinsics.txt").unlink()
    else:
        (sequence / "camera-intrinsics.txt").write_text(content)
    assert command(sequence, tmp_path / "out") == 2
    expect_error(capsys, tmp_path / "out", "camera-intrinsics.txt", words)


@pytest.mark.parametrize("scene", ["", "..", "a/b", "/tmp", "-"])
def test_scene_is_a_folder_name(sequence, tmp_path, scene):
    with pytest.raises(InputError, match="--scene"):
        import_rgbd(sequence, tmp_path / "out", scene)


def test_two_sequences_do_not_mix_in_one_scene(sequence, tmp_path, capsys):
    out = tmp_path / "out"
    command(sequence, out)
    before = snapshot(out)
    other = tmp_path / "other"
    shutil.copytree(sequence, other)
    cv2.imwrite(str(other / "frame-000020.color.jpg"), np.zeros((H, W, 3), np.uint8))
    assert command(other, out) == 2
    error = capsys.readouterr().err
    assert "frame-000020.jpg" in error and "--scene" in error
    assert snapshot(out) == before


def test_save_path_that_is_a_file(sequence, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert command(sequence, tmp_path / "out") == 2
    expect_error(capsys, tmp_path / "out", "is a file, not a folder to write to")


def test_kitchen(tmp_path):
    if not KITCHEN.is_dir():
        pytest.skip("needs kitchen/ of the shared data folder beside the repository")
    few = tmp_path / "kitchen"
    few.mkdir()
    shutil.copy(KITCHEN / "camera-intrinsics.txt", few)
    for number in range(100, 196, 8):
        for path in KITCHEN.glob(f"frame-{number:06d}.*"):
            shutil.copy(path, few)
    assert import_rgbd(few, tmp_path / "out", "kitchen") == []
    info = load_scene_info(tmp_path / "out" / "scene_info" / "kitchen.0.npz")
    assert len(info["image_paths"]) == 12
    views, descriptors = [], []
    for i in (0, 2):
        image = read_image(tmp_path / "out" / info["image_paths"][i])
        depth = read_depth(tmp_path / "out" / info["depth_paths"][i])
        keypoints, described = cv2.SIFT_create(1500).detectAndCompute(image, None)
        keypoints = cv2.KeyPoint.convert(keypoints)
        views += [keypoints, depth_at(depth, keypoints), info["intrinsics"][i], info["poses"][i]]
        descriptors.append(described)
    assert info["overlap_matrix"][0, 2] > 0.5
    assert len(match_by_projection(*views)) > 100
    # matches by appearance, which know nothing of depth and pose, land where these say
    keypoints0, depth0, K0, pose0, keypoints1, _, K1, pose1 = views
    nearest = cv2.BFMatcher().knnMatch(*descriptors, k=2)
    matches = np.array([(a.queryIdx, a.trainIdx) for a, b in nearest if a.distance < 0.75 * b.distance])
    matches = matches[depth0[matches[:, 0]] > 0]
    landed = reproject(keypoints0[matches[:, 0]], depth0[matches[:, 0]], K0, pose0, K1, pose1)
    error = np.linalg.norm(landed - keypoints1[matches[:, 1]], axis=1)
    assert len(matches) > 50 and (error < 5).mean() > 0.6
