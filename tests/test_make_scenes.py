"""Procedural scenes: exact geometry, the three layouts and their conventions, determinism, resuming, bad input."""
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from dump import make_scenes as program
from dump.make_scenes import choose_pairs, main, make_scenes
from dump.scenes.render import Atlas, Rectangle, Rectangles, look_at, render, sunlight
from dump.scenes.textures import KINDS, make_texture
from dump.scenes.world import build_world
from tools.cli import run
from tools.files import read_depth, read_image, read_lines
from tools.geometry import colmap_to_opencv_K, lift, make_pose, project
from tools.safe_pickle import load_pickle
from tools.scene_info import load_scene_info

SMALL = {"scenes": 2, "images_per_scene": 4, "size": (160, 120)}


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    assert make_scenes(root, seed=3, workers=1, **SMALL) == ["0000", "0001"]
    return root


@pytest.fixture(scope="module")
def views(root):
    """Image, depth, K (OpenCV's convention) and pose of every view, by scene, from the MegaDepth layout."""
    scenes = {}
    for scene in ("0000", "0001"):
        info = load_scene_info(root / "megadepth" / "scene_info" / f"{scene}.0.npz")
        scenes[scene] = [(read_image(root / "megadepth" / image), read_depth(root / "megadepth" / depth),
                          colmap_to_opencv_K(K), pose)
                         for image, depth, K, pose in zip(*(info[name] for name in (
                             "image_paths", "depth_paths", "intrinsics", "poses")))]
    return scenes


def warp(view0, view1, pose0=None):
    """Pixels of view 0 in view 1: (landed (N, 2), depth there by projection (N,), own gray values (N,))."""
    image, depth, K, pose = view0
    y, x = np.nonzero(depth > 0)
    points = lift(np.stack([x, y], 1), depth[y, x], K, pose if pose0 is None else pose0)
    landed, z = project(points, view1[2], view1[3])
    h, w = view1[1].shape
    inside = (z > 0) & (landed > 1).all(axis=1) & (landed[:, 0] < w - 2) & (landed[:, 1] < h - 2)
    return landed[inside], z[inside], image[y, x][inside]


def sample(array, landed, interpolation=cv2.INTER_LINEAR):
    return cv2.remap(array, landed[:, None].astype(np.float32), None, interpolation)[:, 0]


def agreement(view0, view1, pose0=None):
    """How many pixels of view 0 view 1 sees at the same depth, and the correlation of their gray values."""
    landed, z, gray = warp(view0, view1, pose0)
    seen = np.abs(sample(view1[1], landed, cv2.INTER_NEAREST) - z) < 0.02 * z
    if seen.sum() < 500:
        return seen.sum(), np.nan
    return seen.sum(), np.corrcoef(gray[seen], sample(view1[0], landed[seen]))[0, 1]


def test_depth_of_two_views_agrees(views):
    checked = 0
    for scene in views.values():
        for i, j in np.argwhere(~np.eye(4, dtype=bool)):
            landed, z, _ = warp(scene[i], scene[j])
            inverse = np.where(scene[j][1] > 0, 1 / np.maximum(scene[j][1], 1e-6), 0).astype(np.float32)
            # inverse depth is linear in the pixel on a plane: interpolation costs nothing but rounding
            error = np.abs(sample(inverse, landed) * z - 1)
            same = error < 0.05
            if same.sum() > 2000:
                checked += 1
                assert np.median(error[same]) < 1e-5 and np.percentile(error[same], 75) < 1e-4
            # the rest is hidden: nowhere does view j look through a surface that view i sees
            nearest = sample(cv2.dilate(inverse, np.ones((3, 3))), landed, cv2.INTER_NEAREST)
            assert np.mean(nearest * z < 0.98) < 0.002
    assert checked >= 12


def test_gray_values_agree_under_the_true_pose_only(views):
    right, wrong = [], []
    for scene in views.values():
        for view0, view1 in zip(scene, scene[1:]):
            count, correlation = agreement(view0, view1)
            if count >= 2000:
                right.append(correlation)
                turn = make_pose(cv2.Rodrigues(np.array([0, np.deg2rad(3.0), 0]))[0], [0, 0, 0])
                wrong.append(agreement(view0, view1, turn @ view0[3])[1])
    assert len(right) >= 3
    assert np.median(right) > 0.6
    assert np.nanmedian(wrong) < np.median(right) - 0.25


def board(z, size):
    """A square board that faces a camera at the origin which looks along +z (right = x, down = y)."""
    return Rectangle(np.array([-size / 2, -size / 2, z]), np.array([size, 0, 0.0]), np.array([0, size, 0.0]), 0)


K_CENTRED = np.array([[100, 0, 79.5], [0, 100, 59.5], [0, 0, 1.0]])


def test_the_nearer_surface_is_seen_and_backs_are_not():
    turned = board(1, 1)
    turned = Rectangle(turned.corner + turned.right, -turned.right, turned.down, 0)
    near, far = board(2, 0.5), board(4, 3)
    for order in ([near, far, turned], [turned, far, near]):
        index, inverse, _ = Rectangles(order).rasterise(K_CENTRED, np.eye(4), (160, 120))
        # 0.5 m at 2 m and 3 m at 4 m are 25 and 75 pixels with f = 100; pixel centres lie half a pixel off the axis
        seen = [np.isclose(inverse[59], 1 / z, rtol=1e-5).sum() for z in (2, 4)]
        assert seen[0] in (24, 26) and sum(seen) in (74, 76) and inverse[59].astype(bool).sum() == sum(seen)
        assert set(np.unique(index)) == {-1, order.index(near), order.index(far)}


def test_a_plane_through_the_camera_is_clipped_in_front_of_it():
    ground = Rectangle(np.array([-50.0, 1, 50]), np.array([100.0, 0, 0]), np.array([0, 0, -100.0]), 0)
    index, inverse, _ = Rectangles([ground]).rasterise(K_CENTRED, np.eye(4), (160, 120))
    below = np.arange(120) > 59.5 + 100 / 50
    assert (index[below] == 0).all() and (index[~below] == -1).all()
    assert np.allclose(inverse[below, 0], (np.arange(120)[below] - 59.5) / 100, rtol=1e-5)


def test_far_textures_are_averaged_not_aliased():
    # black and white texels, about 16 times too many along x alone or along both: what is left is the mean
    texture = 255 * np.random.default_rng(0).integers(0, 2, (512, 512, 1)).astype(np.uint8)
    atlas = Atlas([np.repeat(texture, 3, axis=2)])
    for width, height, most in ((0.33, 0.31, 12), (0.33, 1.5, 25)):
        corner = np.array([-width / 2, -height / 2, 1])
        rectangles = Rectangles([Rectangle(corner, np.array([width, 0, 0]), np.array([0, height, 0]), 0)])
        index, _, linear = rectangles.rasterise(K_CENTRED, np.eye(4), (160, 120))
        gray = rectangles.paint(atlas, index, linear)[index >= 0]
        assert len(gray) > 800 and abs(gray.mean() - 127) < 5 and gray.std() < most


def test_image_is_in_register_with_the_camera():
    # a white square in the middle of a black board: its centre must appear where the camera projects it
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[112:144, 112:144] = 255
    rectangles, atlas, found = Rectangles([board(2, 8)]), Atlas([picture]), []
    K = K_CENTRED + [[0, 0, 0.3], [0, 0, -0.4], [0, 0, 0]]
    for seed in range(8):
        image, depth = render(np.random.default_rng(seed), rectangles, atlas, K, np.eye(4), (160, 120), 34)
        assert np.allclose(depth, 2, rtol=1e-5)
        window = image[25:95, 45:115].mean(axis=2)
        white = np.maximum(window - np.percentile(window, 10) - 20, 0)
        y, x = np.indices(white.shape)
        found.append([45 + (white * x).sum() / white.sum(), 25 + (white * y).sum() / white.sum()])
    assert np.abs(np.median(found, axis=0) - [79.8, 59.1]).max() < 0.08


def test_texture_is_upright_and_in_register():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = 200  # top left
    picture[:32, 32:] = 100  # top right
    rectangles = Rectangles([board(1, 0.64)])
    index, _, linear = rectangles.rasterise(K_CENTRED, np.eye(4), (160, 120))
    painted = rectangles.paint(Atlas([picture]), index, linear)[..., 0]
    assert (painted[32:58, 52:78] == 200).all() and (painted[32:58, 82:110] == 100).all()
    assert (painted[62:88, 52:110] == 0).all()


def test_shadow_lies_where_the_sun_is_hidden():
    # a board 2 m above the ground, the sun at the zenith but for a hair: its shadow is its outline
    ground = Rectangle(np.array([-10.0, 10, 0]), np.array([20.0, 0, 0]), np.array([0, -20.0, 0]), 0)
    roof = Rectangle(np.array([-1.0, 1, 2]), np.array([2.0, 0, 0]), np.array([0, -2.0, 0]), 0)
    rectangles = Rectangles([ground, roof])
    pose = look_at(np.array([0, -8.0, 6]), np.array([0, 0, 0.5]))
    index, inverse, _ = rectangles.rasterise(K_CENTRED, pose, (160, 120))
    depth = np.where(inverse > 0, 1 / np.maximum(inverse, 1e-6), 0).astype(np.float32)
    sun = np.array([0, 0.001, 1]) / np.linalg.norm([0, 0.001, 1])
    light = sunlight(rectangles, sun, index, depth, K_CENTRED, pose, 15)
    y, x = np.nonzero(index == 0)
    points = lift(np.stack([x, y], 1), depth[y, x], K_CENTRED, pose)
    off = np.abs(points[:, :2]).max(axis=1)
    assert light[y, x][off < 0.5].max() < 0.1
    assert light[y, x][(off > 2.5) & (off < 6)].min() > 0.9


def test_every_kind_of_texture_is_rich_and_differs_by_seed():
    for kind in KINDS:
        first, again, other = (make_texture(np.random.default_rng(seed), kind, 120, 160, 32) for seed in (1, 1, 2))
        assert first.shape == (120, 160, 3) and first.dtype == np.uint8
        assert np.array_equal(first, again) and not np.array_equal(first, other)
        assert cv2.cvtColor(first, cv2.COLOR_BGR2GRAY).std() > 10


def test_images_at_full_size_have_keypoints_enough():
    rng = np.random.default_rng([0, 0])
    world = build_world(rng, 64)
    rectangles, atlas = Rectangles(world.rectangles), Atlas(world.textures)
    sift, counts = cv2.SIFT_create(contrastThreshold=0.04), []
    for i, (K, pose) in enumerate(program.place_cameras(rng, world, rectangles, 5, (640, 480))):
        image, depth = render(np.random.default_rng(i), rectangles, atlas, K, pose, (640, 480), program.SHADOW_RADIUS)
        counts.append(len(sift.detect(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), None)))
        assert depth.max() < 65
    assert np.median(counts) >= 600


def test_layouts_show_the_same_scene_in_their_own_conventions(root, views):
    for scene, scene_views in views.items():
        yfcc, scannet = root / "yfcc/raw_data/yfcc100m" / scene / "test", root / "scannet" / f"scene{scene}_00"
        images, calibrations = read_lines(yfcc / "images.txt"), read_lines(yfcc / "calibration.txt")
        assert len(images) == len(calibrations) == 4
        info = load_scene_info(root / "megadepth" / "scene_info" / f"{scene}.0.npz")
        for i, (image, depth, K, pose) in enumerate(scene_views):
            # COLMAP's convention in scene_info: the centre of the image is at exactly half its size
            assert info["intrinsics"][i][:2, 2].tolist() == [80, 60]
            with h5py.File(yfcc / calibrations[i]) as file:
                assert np.allclose(file["K"], K) and file["K"][0, 2] == 79.5 and file["K"][1, 2] == 59.5
                assert np.allclose(file["R"], pose[:3, :3]) and file["T"].shape == (3,)
                assert np.allclose(file["T"], pose[:3, 3])
                assert file["imsize"].shape == (1, 2) and file["imsize"][0].tolist() == [160, 120]
            assert np.allclose(np.loadtxt(scannet / "extrinsic" / f"{i}.txt") @ pose, np.eye(4), atol=1e-12)
            assert np.allclose(np.loadtxt(scannet / "intrinsic" / f"{i}.txt"), K)
            assert np.array_equal(read_image(yfcc / images[i]), image)
            assert np.array_equal(read_image(scannet / "img" / f"{i}.jpg"), image)
            assert np.array_equal(read_depth(yfcc / "depths" / f"{i:04d}.h5"), depth)
            assert np.abs(read_depth(scannet / "depth" / f"{i}.png") - depth).max() <= 0.00051


def test_pair_lists_name_overlapping_pairs(root):
    listed = read_lines(root / "scannet" / "pairs.txt")
    expected = []
    for scene in ("0000", "0001"):
        (path,) = (root / "yfcc/raw_data/pairs").glob(f"{scene}-te-*-pairs.pkl")
        pairs = load_pickle(path)
        assert path.name == f"{scene}-te-{len(pairs)}-pairs.pkl" and pairs
        assert path.read_bytes()[:2] == pickle.PROTO + b"\x02"
        overlap = load_scene_info(root / "megadepth" / "scene_info" / f"{scene}.0.npz")["overlap_matrix"]
        good = {(i, j) for i in range(4) for j in range(i + 1, 4) if min(overlap[i, j], overlap[j, i]) >= 0.1}
        assert {tuple(pair) for pair in pairs} == good and all(type(i) is int for pair in pairs for i in pair)
        expected += [f"scene{scene}_00/img/{i}.jpg scene{scene}_00/img/{j}.jpg" for i, j in pairs]
    assert listed == expected


def test_chosen_pairs_spread_over_the_overlaps():
    rng = np.random.default_rng(0)
    overlap = np.where(rng.random((60, 60)) < 0.7, 0.15, rng.uniform(0.2, 0.9, (60, 60)))
    overlap = np.minimum(overlap, overlap.T)
    overlap[3, 7] = 0.95  # one direction is not enough
    overlap[7, 3] = 0.05
    pairs = choose_pairs(np.random.default_rng(1), overlap, 40)
    assert len(set(pairs)) == 40 and (3, 7) not in pairs and all(i < j for i, j in pairs)
    values = np.array([overlap[pair] for pair in pairs])
    assert np.mean(values > 0.2) > 0.7  # though nine in ten are at 0.15
    assert pairs == choose_pairs(np.random.default_rng(1), overlap, 40)
    assert len(choose_pairs(rng, overlap, 10 ** 6)) == (overlap[np.triu_indices(60, 1)] >= 0.1).sum() - 1


def test_workers_do_not_change_a_byte_and_the_seed_does(root, tmp_path):
    make_scenes(tmp_path / "two", seed=3, workers=2, **SMALL)
    assert contents(tmp_path / "two") == contents(root)
    # a scene does not depend on which others are made, nor on the layouts
    make_scenes(tmp_path / "one", seed=3, **{**SMALL, "scenes": 1}, first_scene=1, layouts=["megadepth"])
    one, both = contents(tmp_path / "one" / "megadepth"), contents(root / "megadepth")
    assert len(one) == 9 and all(both[name] == data for name, data in one.items())
    make_scenes(tmp_path / "other", seed=4, **{**SMALL, "scenes": 1}, layouts=["megadepth"])
    other = contents(tmp_path / "other" / "megadepth")
    assert all(both[name] != data for name, data in other.items())


def test_resuming_makes_only_what_is_missing(root, tmp_path, monkeypatch):
    arguments = dict(seed=3, workers=1, layouts=["scannet"], **{**SMALL, "images_per_scene": 2})
    made = []
    real = program.make_scene
    monkeypatch.setattr(program, "make_scene", lambda number, **rest: made.append(number) or real(number, **rest))
    monkeypatch.setattr(program, "choose_pairs", lambda rng, overlap, n: [(0, 1)])
    make_scenes(tmp_path, **arguments)
    before = contents(tmp_path)
    make_scenes(tmp_path, **arguments)
    assert made == [0, 1]
    # a scene that was stopped half-way has no marker, and is made again
    program.marker_path(tmp_path, "0001").unlink()
    (tmp_path / "scannet/scene0001_00/img/1.jpg").unlink()
    make_scenes(tmp_path, **arguments)
    assert made == [0, 1, 1] and contents(tmp_path) == before
    make_scenes(tmp_path, **{**arguments, "scenes": 1}, first_scene=2)
    assert made == [0, 1, 1, 2] and len(read_lines(tmp_path / "scannet" / "pairs.txt")) == 3


def test_marker_is_written_last(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(program, "write_scene_info", fail)
    with pytest.raises(OSError):
        make_scenes(tmp_path, workers=1, **{**SMALL, "scenes": 1, "images_per_scene": 2})
    assert not program.marker_path(tmp_path, "0000").exists()


def test_textures_are_cut_from_the_photographs_given(tmp_path):
    photographs = tmp_path / "photos" / "deep"
    photographs.mkdir(parents=True)
    pure_blue = np.zeros((60, 90, 3), np.uint8)
    pure_blue[..., 0] = 255
    cv2.imwrite(str(photographs / "a.png"), pure_blue)
    (photographs / "notes.txt").write_text("no picture")
    make_scenes(tmp_path / "out", scenes=1, images_per_scene=2, size=(160, 120), textures=tmp_path / "photos",
                layouts=["megadepth"], workers=1)
    info = load_scene_info(tmp_path / "out/megadepth/scene_info/0000.0.npz")
    for image_path, depth_path in zip(info["image_paths"], info["depth_paths"]):
        image = read_image(tmp_path / "out/megadepth" / image_path, color=True).astype(int)
        ground = read_depth(tmp_path / "out/megadepth" / depth_path) > 0
        blue, green, red = np.median(image[cv2.erode(ground.astype(np.uint8), np.ones((9, 9))) > 0], axis=0)
        assert blue > 60 and max(green, red) < 0.4 * blue


@pytest.mark.parametrize("arguments, word", [
    (["--size", "63", "120"], "--size"),
    (["--scenes", "0"], "--scenes"),
    (["--images-per-scene", "1"], "--images_per_scene"),
    (["--first-scene", "9999", "--scenes", "2"], "9999"),
    (["--workers", "0"], "--workers"),
    (["--seed", "-1"], "--seed"),
    (["--textures", "nowhere"], "nowhere"),
    (["--textures", "."], "--textures"),
])
def test_bad_input_ends_in_one_line_and_status_2(arguments, word, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert run(main, ["--save_path", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and word in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_no_stray(tmp_path, capsys):
    """No file may grow beyond a few bytes: images, depth maps and calibrations all say so."""
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000)); " \
             "from dump.make_scenes import main; from tools.cli import run; sys.exit(run(main))"
    arguments = ["--scenes", "1", "--images_per_scene", "2", "--size", "80", "64", "--workers", "1"]
    result = subprocess.run([sys.executable, "-c", script, "--save_path", tmp_path / "out", *arguments], text=True,
                            cwd=Path(__file__).parents[1], capture_output=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob(".*.tmp*"))


def test_a_file_for_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(main, ["--save_path", str(tmp_path / "file"), "--workers", "1"]) == 2
    assert "file is a file" in capsys.readouterr().err


def test_a_large_surface_is_a_patchwork_of_photographs(tmp_path):
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((50, 50, 3), 40 * i, np.uint8))
    paths = sorted(str(path) for path in tmp_path.iterdir())
    rng = np.random.default_rng(0)
    assert make_texture(rng, "ground", 700, 2001, 32, paths).shape == (700, 2001, 3)
    assert len(np.unique(make_texture(rng, "ground", 3000, 1500, 32, paths))) > 2
    assert len(np.unique(make_texture(rng, "front", 700, 900, 32, paths))) == 1


def test_other_settings_in_the_same_folder_are_refused(root, capsys):
    before = contents(root)
    assert run(main, ["--save_path", str(root), "--scenes", "2", "--images_per_scene", "4", "--size", "160", "120",
                      "--seed", "5"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "seed" in error and "make_scenes.json" in error
    assert contents(root) == before


def test_damaged_settings_are_one_line(tmp_path, capsys):
    (tmp_path / "make_scenes.json").write_text("[]")
    assert run(main, ["--save_path", str(tmp_path)]) == 2
    assert "make_scenes.json is damaged" in capsys.readouterr().err
