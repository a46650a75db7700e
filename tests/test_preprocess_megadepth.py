"""Raw MegaDepth -> Undistorted_SfM and scene_info, on a small COLMAP model with distorted cameras made here."""
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cv2  # before pycolmap: in the other order writing a PNG crashes
import numpy as np
import pytest

pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is an optional extra: pip install '.[colmap]'")

import dump.preprocess_megadepth  # noqa: E402  after the skip, and pycolmap after cv2
from dump.preprocess_megadepth import main, preprocess_megadepth, read_model  # noqa: E402
from tools.cli import InputError, run  # noqa: E402
from tools.files import read_image, write_depth, write_image  # noqa: E402
from tools.geometry import project  # noqa: E402
from tools.locks import locked  # noqa: E402
from tools.scene_info import candidate_pairs, load_scene_info  # noqa: E402

W, H = 320, 240
SIDE = 280  # of the undistorted images
N_IMAGES, N_POINTS = 6, 60
DENSE = "phoenix/S6/zl548/MegaDepth_v1/{}/dense0"
NO_DEPTH, MASK = 1, 4  # images, in the order of their names
OBJECTS = ("image_paths", "depth_paths", "intrinsics", "poses", "n_points3D", "points3D_id_to_2D",
           "points3D_id_to_ndepth")


@functools.cache
def make_model():
    pycolmap.set_random_seed(0)
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_frames_per_rig = 2, N_IMAGES // 2
    options.num_points3D, options.track_length = N_POINTS, 4
    options.camera_width, options.camera_height, options.camera_params = W, H, [300.0, 155.0, 124.0, 0.15]
    return pycolmap.synthesize_dataset(options)


def draw(pixels, w, h) -> np.ndarray:
    """Black, with a blob at each of the pixels (M, 2), COLMAP's convention: (h, w) uint8."""
    picture = np.zeros((h, w))
    for x, y in pixels:
        column = np.exp(-(np.arange(h)[:, None] + 0.5 - y) ** 2 / 4)  # the first pixel's centre is at 0.5
        picture += 250 * column * np.exp(-(np.arange(w) + 0.5 - x) ** 2 / 4)
    return picture.clip(0, 255).astype(np.uint8)


def write_raw(root, scene="0000", sfm="MegaDepth_v1_SfM", text=False):
    """A raw scene below `root`; returns its model and the images' names, sorted."""
    model = make_model()
    images = sorted(model.images.values(), key=lambda image: image.name)
    sparse = root / sfm / scene / "sparse" / "manhattan" / "0"
    sparse.mkdir(parents=True)
    (model.write_text if text else model.write)(sparse)
    depth = np.random.default_rng(0).uniform(1, 5, (210, SIDE)).astype(np.float32)
    dense = root / DENSE.format(scene)
    for i, image in enumerate(images):
        write_image(root / sfm / scene / "images" / image.name,
                    draw([point.xy for point in image.get_observation_points2D()], W, H))
        write_image(dense / "imgs" / image.name, np.zeros((210 - i, SIDE - i), np.uint8))
        if i != NO_DEPTH:
            write_depth(dense / "depths" / f"{Path(image.name).stem}.h5", depth[:20] if i == MASK else depth)
    return model, [image.name for image in images]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(root, model, names, scene_info) of a preprocessed scene; tests only read it."""
    root = tmp_path_factory.mktemp("megadepth")
    model, names = write_raw(root)
    assert preprocess_megadepth(root) == (["0000"], [])
    return root, model, names, load_scene_info(root / "scene_info" / "0000.0.npz")


def with_depth():
    return [i for i in range(N_IMAGES) if i not in (NO_DEPTH, MASK)]


def command(root, *options):
    return run(main, ["--base_path", str(root), "--workers", "1", *options])


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
            for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(info0, info1):
    assert info0.keys() == info1.keys()
    for name, value in info0.items():
        if name in ("points3D_id_to_2D", "points3D_id_to_ndepth"):
            for by_id0, by_id1 in zip(value, info1[name]):
                assert (by_id0 is None) == (by_id1 is None)
                if by_id0 is not None:
                    assert by_id0.keys() == by_id1.keys()
                    np.testing.assert_allclose(list(by_id0.values()), list(by_id1.values()), rtol=1e-6)
        elif name in ("intrinsics", "poses"):
            for matrix0, matrix1 in zip(value, info1[name]):
                assert (matrix0 is None) == (matrix1 is None)
                if matrix0 is not None:
                    np.testing.assert_allclose(matrix0, matrix1, atol=1e-6)
        elif name in OBJECTS:
            assert value.tolist() == info1[name].tolist()
        else:
            np.testing.assert_allclose(value, info1[name], atol=1e-4)


def test_paths_and_none_for_images_without_a_depth_map(done):
    root, _, names, info = done
    assert all(info[name].dtype == object and len(info[name]) == N_IMAGES for name in OBJECTS)
    for i, name in enumerate(names):
        if i in (NO_DEPTH, MASK):
            assert all(info[field][i] is None for field in OBJECTS)
            for field in ("overlap_matrix", "scale_ratio_matrix", "angles"):
                assert (info[field][i] == -1).all() and (info[field][:, i] == -1).all()
            continue
        assert info["image_paths"][i] == f"Undistorted_SfM/0000/images/{name}"
        assert info["depth_paths"][i] == f"{DENSE.format('0000')}/depths/{Path(name).stem}.h5"
        assert (root / info["image_paths"][i]).is_file() and (root / info["depth_paths"][i]).is_file()


def test_the_limit_of_a_depth_file_is_100_KB(tmp_path):
    _, names = write_raw(tmp_path)
    files = [tmp_path / DENSE.format("0000") / "depths" / f"{Path(names[i]).stem}.h5" for i in (0, 2)]
    for file, size in zip(files, (100 * 1024, 100 * 1024 - 1)):
        file.write_bytes(bytes(size))
    preprocess_megadepth(tmp_path)
    paths = load_scene_info(tmp_path / "scene_info" / "0000.0.npz")["depth_paths"]
    assert paths[0] is not None and paths[2] is None


def test_images_are_undistorted_at_the_size_of_the_depth_maps(done):
    root, _, _, info = done
    for i in with_depth():
        h, w = read_image(root / info["image_paths"][i]).shape
        assert max(h, w) == SIDE


def test_points_project_to_where_they_are_seen(done):
    _, model, names, info = done
    images = {image.name: image for image in model.images.values()}
    for i in with_depth():
        pixels, ndepth = info["points3D_id_to_2D"][i], info["points3D_id_to_ndepth"][i]
        observed = {point.point3D_id for point in images[names[i]].get_observation_points2D()}
        assert pixels.keys() == ndepth.keys() == observed and info["n_points3D"][i] == len(observed)
        points = np.array([model.points3D[point_id].xyz for point_id in pixels])
        K, pose = info["intrinsics"][i], info["poses"][i]
        projected, depth = project(points, K, pose)
        np.testing.assert_allclose(projected, list(pixels.values()), atol=1e-3)
        np.testing.assert_allclose(depth / (K[0, 0] + K[1, 1]) * 2, list(ndepth.values()))
        np.testing.assert_allclose(pose[:3], images[names[i]].cam_from_world().matrix(), atol=1e-9)
        np.testing.assert_array_equal(pose[3], [0, 0, 0, 1])


def test_images_and_points_agree_in_colmap_convention(done):
    root, _, _, info = done
    for i in with_depth():
        picture = read_image(root / info["image_paths"][i])
        expected = draw(info["points3D_id_to_2D"][i].values(), *picture.shape[::-1])
        shift, _ = cv2.phaseCorrelate(expected.astype(np.float64), picture.astype(np.float64))
        np.testing.assert_allclose(shift, 0, atol=0.2)  # half a pixel would be the other convention


def test_matrices_equal_the_definition(done):
    _, _, _, info = done
    ndepths, overlaps = info["points3D_id_to_ndepth"], set()
    for i in with_depth():
        for j in with_depth():
            shared = ndepths[i].keys() & ndepths[j].keys()
            assert info["overlap_matrix"][i, j] == pytest.approx(len(shared) / len(ndepths[i]))
            ratios = [max(ndepths[i][k] / ndepths[j][k], ndepths[j][k] / ndepths[i][k]) for k in shared]
            assert info["scale_ratio_matrix"][i, j] == pytest.approx(min(ratios))
            cosine = info["poses"][i][2, :3] @ info["poses"][j][2, :3]
            assert info["angles"][i, j] == pytest.approx(np.degrees(np.arccos(min(cosine, 1))), abs=1e-4)
            overlaps.add(round(info["overlap_matrix"][i, j], 6))
    assert len(overlaps) > 8  # different in both directions: a transposed matrix would show


def test_points_behind_a_camera_are_not_seen():
    camera = pycolmap.Camera(model="PINHOLE", width=100, height=80, params=[100, 100, 50, 40], camera_id=1)
    model = pycolmap.Reconstruction()
    model.add_camera_with_trivial_rig(camera)
    image = pycolmap.Image("a.jpg", np.array([[50.0, 40.0], [50, 40]]), 1, 1)
    model.add_image_with_trivial_frame(image, pycolmap.Rigid3d())
    for k, z in enumerate((2.0, -2.0)):
        model.add_point3D(np.array([0, 0, z]), pycolmap.Track([pycolmap.TrackElement(1, k)]))
    points = np.array([[0, 0, 2.0], [0, 0, -2.0]])
    _, _, indices, pixels, depth = dump.preprocess_megadepth.observations(model.images[1], np.array([1, 2]), points)
    assert indices.tolist() == [0] and pixels.tolist() == [[50, 40]] and depth.tolist() == [2]


def test_the_dump_finds_its_pairs(done):
    _, _, _, info = done
    pairs = candidate_pairs(info)
    assert len(pairs) and set(pairs.ravel()) <= set(with_depth())


@pytest.mark.parametrize("sfm", ["MegaDepth_v1_SfM", "phoenix/S6/zl548/MegaDepth_v1_SfM"])
def test_text_models_in_both_places(done, tmp_path, sfm):
    write_raw(tmp_path, sfm=sfm, text=True)
    assert command(tmp_path, "--scene", "0000") == 0
    assert_same(load_scene_info(tmp_path / "scene_info" / "0000.0.npz"), done[3])


@pytest.mark.parametrize("text", [True, False])
def test_a_scene_undistorted_elsewhere_is_not_undistorted_again(done, tmp_path, text, monkeypatch):
    root, _, _, info = done
    shutil.copytree(root / "Undistorted_SfM", tmp_path / "Undistorted_SfM")
    shutil.copytree(root / "phoenix", tmp_path / "phoenix")
    sparse = tmp_path / "Undistorted_SfM" / "0000" / "sparse"
    if text:
        model = pycolmap.Reconstruction(sparse)
        shutil.rmtree(sparse)
        sparse.mkdir()
        model.write_text(sparse)
        for name in ("rigs", "frames"):  # COLMAP before 3.12 wrote none
            (sparse / f"{name}.txt").unlink()
    monkeypatch.setattr(dump.preprocess_megadepth, "undistort", None)
    assert command(tmp_path) == 0
    assert_same(load_scene_info(tmp_path / "scene_info" / "0000.0.npz"), info)


def test_a_second_run_changes_nothing_and_a_deleted_scene_info_is_made_again(tmp_path):
    write_raw(tmp_path)
    assert command(tmp_path) == 0
    before = snapshot(tmp_path)
    assert command(tmp_path) == 0
    assert snapshot(tmp_path) == before
    (tmp_path / "scene_info" / "0000.0.npz").unlink()
    assert command(tmp_path) == 0
    after = snapshot(tmp_path)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["scene_info/0000.0.npz"]


def test_a_killed_undistortion_leaves_nothing_that_counts(tmp_path, monkeypatch):
    write_raw(tmp_path)
    stray = tmp_path / "Undistorted_SfM" / ".0000.tmp" / "images" / "half.jpg"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half")

    def stop(folder):
        if ".0000.tmp" in str(folder):
            raise KeyboardInterrupt
        return read_model(folder)
    with monkeypatch.context() as patch:
        patch.setattr(dump.preprocess_megadepth, "read_model", stop)
        assert command(tmp_path) == 130
    assert list((tmp_path / "Undistorted_SfM").iterdir()) == []
    assert command(tmp_path) == 0
    assert not list((tmp_path / "Undistorted_SfM").rglob("half.jpg"))


def test_ctrl_c_cancels_an_undistortion_that_is_under_way(tmp_path, monkeypatch):
    write_raw(tmp_path)
    began, cancelled = threading.Event(), []

    def endless(*arguments, cancellation_token, **options):
        began.set()
        for _ in range(500):
            if cancellation_token.is_cancelled:
                cancelled.append(True)
                return
            time.sleep(0.01)

    def interrupt():
        began.wait()
        time.sleep(0.3)  # until the main thread waits for the work
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(pycolmap, "undistort_images", endless)
    threading.Thread(target=interrupt).start()
    assert command(tmp_path) == 130
    assert cancelled
    assert list((tmp_path / "Undistorted_SfM").iterdir()) == []


SLOW_COMMAND = """
import sys, time
import dump.preprocess_megadepth as module
def slow(*arguments):
    print("began", flush=True)
    time.sleep(30)
module.undistort = slow
sys.exit(module.run(module.main))
"""


def test_sigterm_ends_as_ctrl_c_does(tmp_path):
    write_raw(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", SLOW_COMMAND, "--base_path", tmp_path], text=True,
                               cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "began\n"
        process.terminate()
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and errors.endswith("stopped\n")


def test_bad_scenes_are_listed_and_the_others_done(tmp_path, capsys):
    for scene in ("0000", "0001", "0002", "0003", "0004", "0005"):
        write_raw(tmp_path, scene)
    sfm = tmp_path / "MegaDepth_v1_SfM"
    images = sfm / "0001" / "sparse" / "manhattan" / "0" / "images.bin"
    images.write_bytes(images.read_bytes()[:300])
    shutil.rmtree(sfm / "0002" / "sparse")
    shutil.rmtree(tmp_path / DENSE.format("0003") / "imgs")
    shutil.rmtree(tmp_path / DENSE.format("0004") / "depths")
    (tmp_path / "Undistorted_SfM" / "0005" / "images").mkdir(parents=True)
    assert command(tmp_path) == 1
    output = capsys.readouterr()
    assert "1 scenes complete" in output.out and "5 scenes skipped" in output.err
    for reason in ("0001: no readable COLMAP model", "0002: no COLMAP model", "0003: no readable image",
                   "0004: no image of scene 0004 has", "0005: "):
        assert reason in output.err
    assert [path.name for path in (tmp_path / "scene_info").iterdir()] == ["0000.0.npz"]
    assert sorted(path.name for path in (tmp_path / "Undistorted_SfM").iterdir()) == ["0000", "0004", "0005"]


def test_shards_share_the_scenes_and_one_process_is_at_each(tmp_path, capsys):
    for scene in ("0000", "0001", "0002"):
        write_raw(tmp_path, scene)
    assert command(tmp_path, "--shard", "1/2") == 0
    assert [path.name for path in (tmp_path / "scene_info").iterdir()] == ["0001.0.npz"]
    with locked(tmp_path / "Undistorted_SfM" / ".0002.lock"):
        assert command(tmp_path, "--shard", "0/2") == 2
        assert "another process is at scene 0002" in capsys.readouterr().err
    assert command(tmp_path, "--shard", "0/2") == 0 and "2 scenes complete" in capsys.readouterr().out
    assert len(list((tmp_path / "scene_info").iterdir())) == len(list((tmp_path / "Undistorted_SfM").iterdir())) == 3


def test_distorted_models_are_not_taken_for_undistorted_ones(tmp_path):
    write_raw(tmp_path)
    target = tmp_path / "Undistorted_SfM" / "0000"
    shutil.copytree(tmp_path / "MegaDepth_v1_SfM" / "0000" / "sparse" / "manhattan" / "0", target / "sparse")
    shutil.copytree(tmp_path / "MegaDepth_v1_SfM" / "0000" / "images", target / "images")
    complete, skipped = preprocess_megadepth(tmp_path)
    assert not complete and "are distorted" in skipped[0][1]


def test_missing_and_damaged_images_are_left_out(tmp_path):
    _, names = write_raw(tmp_path)
    images = tmp_path / "MegaDepth_v1_SfM" / "0000" / "images"
    (images / names[0]).unlink()
    (images / names[2]).write_bytes(b"no image")
    assert command(tmp_path) == 0
    paths = load_scene_info(tmp_path / "scene_info" / "0000.0.npz")["image_paths"]
    assert [path is None for path in paths] == [True, True, True, False, True, False]


def test_an_image_of_another_size_than_its_camera_is_left_out_and_named(tmp_path, capsys):
    for scene in ("0000", "0001"):
        _, names = write_raw(tmp_path, scene)
    turned = np.zeros((W, H), np.uint8)
    write_image(tmp_path / "MegaDepth_v1_SfM" / "0000" / "images" / names[0], turned)
    assert command(tmp_path, "--workers", "2") == 1
    assert f"  0000 {names[0]}: the image is {H}x{W}, its COLMAP camera {W}x{H}\n" in capsys.readouterr().err
    infos = [load_scene_info(tmp_path / "scene_info" / f"{scene}.0.npz")["image_paths"] for scene in ("0000", "0001")]
    assert [path is None for path in infos[0]] == [True, True, False, False, True, False]
    assert [path is None for path in infos[1]] == [False, True, False, False, True, False]
    # undistorted elsewhere: the same check
    write_image(tmp_path / infos[1][2], turned)
    (tmp_path / "scene_info" / "0001.0.npz").unlink()
    assert command(tmp_path) == 1 and f"  0001 {names[2]}: the image is" in capsys.readouterr().err


def test_a_name_in_the_model_that_leaves_its_folder_is_refused():
    images = {1: SimpleNamespace(name="../a.jpg", camera=SimpleNamespace(width=1, height=1))}
    usable, skipped = dump.preprocess_megadepth.usable_images(SimpleNamespace(images=images), "images")
    assert not usable and "must lie below" in skipped[0][1]


def test_an_image_that_could_not_be_written_stops_the_scene(tmp_path, monkeypatch):
    write_raw(tmp_path)
    undistort_images = pycolmap.undistort_images

    def full_disk(output_path, *arguments, **options):
        undistort_images(output_path, *arguments, **options)
        next(Path(output_path, "images").iterdir()).unlink()
    monkeypatch.setattr(pycolmap, "undistort_images", full_disk)
    complete, skipped = preprocess_megadepth(tmp_path)
    assert not complete and "is the disk full?" in skipped[0][1]
    assert list((tmp_path / "Undistorted_SfM").iterdir()) == []


def test_full_disk(tmp_path, monkeypatch, capsys):
    """No file may grow: pycolmap does not say so. If the disk is indeed full, the other scenes are not tried."""
    for scene in ("0000", "0001"):
        write_raw(tmp_path, scene)
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); " \
             "from dump.preprocess_megadepth import main; from tools.cli import run; sys.exit(run(main))"
    result = subprocess.run([sys.executable, "-c", script, "--base_path", tmp_path, "--workers", "1"], text=True,
                            cwd=Path(__file__).parents[1], capture_output=True)
    assert result.returncode == 2 and result.stderr.count("is the disk full?") == 2
    assert list((tmp_path / "Undistorted_SfM").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(pycolmap, "undistort_images", lambda *arguments, **options: None)
    assert command(tmp_path) == 2
    assert capsys.readouterr().err == \
        f"error: cannot write to {tmp_path}: No space left on device; what is done is kept\n"
    assert list((tmp_path / "Undistorted_SfM").iterdir()) == []


def test_mistakes_end_with_one_line(tmp_path, capsys, monkeypatch):
    assert command(tmp_path / "nowhere") == 2
    assert "is not a folder" in capsys.readouterr().err
    assert command(tmp_path) == 2
    assert "no scene in MegaDepth_v1_SfM" in capsys.readouterr().err
    write_raw(tmp_path)
    assert command(tmp_path, "--scene", "0000", "0099") == 2
    assert "no scene 0099" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(InputError, match=r"pip install '\.\[colmap\]'"):
        preprocess_megadepth(tmp_path)
    assert not (tmp_path / "scene_info").exists()
