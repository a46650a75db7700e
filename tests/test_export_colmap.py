import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_scene import CAMERAS, NAMES, POSES, SIZES, flat_pair, make_pair, make_scene, render, texture
from PIL import Image
from scipy.spatial.transform import Rotation

from eval import export_colmap, sfm_table
from eval.colmap_database import Database, two_view_geometry
from eval.export_colmap import nearest_pairs
from eval.image_matcher import ImageMatcher
from tools.cli import run
from tools.covisibility import scene_info_from_depth
from tools.files import read_image, read_json, write_image, write_json
from tools.geometry import colmap_to_opencv_K, essential_matrix, make_pose, opencv_to_colmap_K, relative_pose
from tools.metrics import pose_error
from tools.pair_list import Pair, write_pair_list
from tools.scene_info import write_scene_info

pycolmap = pytest.importorskip("pycolmap")
KINDS = pycolmap.TwoViewGeometryConfiguration
SETTINGS = {"matching_method": "NN_ratio", "feature_type": "sift", "max_keypoints": 400}
pytestmark = pytest.mark.usefixtures("one_thread")
RATIO = [str(word) for name, value in SETTINGS.items() for word in (f"--{name}", value)]


WEIGHTS = Path(__file__).parents[1] / "weights/imp_sift_open.pth"
WALK = [make_pose(Rotation.from_rotvec([0, 5 * i, 0], degrees=True).as_matrix(), [-0.45 * i, 0.1 * (i % 2), 0])
        for i in range(5)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Folder with images/ and pairs.txt, never written to."""
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def photos(tmp_path, scene):
    """The three images in a folder of one's own, all of one camera as far as COLMAP can tell."""
    shutil.copytree(scene / "images", tmp_path / "photos")
    return tmp_path / "photos"


def command(*words):
    return run(export_colmap.main, [str(word) for word in words])


def tables(path) -> dict:
    """All rows of a database."""
    with closing(sqlite3.connect(path)) as connection:
        names = [name for name, in connection.execute("select name from sqlite_master where type = 'table'")]
        return {name: connection.execute(f"select * from {name}").fetchall() for name in names}


def verified(database) -> dict:
    """Verified pairs, by image ids."""
    ids, geometries = database.db.read_two_view_geometries()
    return {tuple(pycolmap.pair_id_to_image_pair(pair)): geometry for pair, geometry in zip(ids, geometries)}


# what is in the database

def test_the_database_holds_what_was_matched(scene, tmp_path):
    assert command(scene / "images", tmp_path, "--pairs", scene / "pairs.txt", *RATIO) == 0
    matcher = ImageMatcher(**SETTINGS)
    views = [matcher.load(scene / "images" / name, 0, name) for name in NAMES]
    with Database(tmp_path / "database.db") as database:
        assert database.ids == {"a.png": 1, "c.png": 2, "sub/b.png": 3}
        for i, name in enumerate(NAMES):
            image_id, camera = database.ids[name], database.camera(name)
            assert (camera.width, camera.height) == SIZES[i] and camera.has_prior_focal_length
            np.testing.assert_allclose(colmap_to_opencv_K(camera.calibration_matrix()), CAMERAS[i])
            np.testing.assert_array_equal(database.db.read_keypoints(image_id), views[i].keypoints + np.float32(0.5))
            root = database.descriptors(name, 128)
            assert np.sum(root * views[i].features.descriptors, axis=1).min() > 0.999
            frame = next(frame for frame in database.db.read_all_frames() if frame.frame_id == image_id)
            assert [data.id for data in frame.data_ids] == [image_id] and frame.rig_id == camera.camera_id
        assert len(database.db.read_all_rigs()) == len(database.cameras) == 2  # a and c share theirs

        found = matcher.match(views[0], views[1], CAMERAS[0], CAMERAS[1])
        np.testing.assert_array_equal(database.db.read_matches(1, 3), found.matches)
        geometry = database.db.read_two_view_geometry(1, 3)
        np.testing.assert_array_equal(geometry.inlier_matches, found.matches[found.inliers])
        assert geometry.config == KINDS.UNCALIBRATED and not found.knows_direction
        np.testing.assert_allclose(geometry.cam2_from_cam1.matrix(), np.c_[found.R, np.zeros(3)], atol=1e-6)
        # F is for the pixels that are stored
        x0, x1 = (np.c_[database.db.read_keypoints(image_id)[found.matches[found.inliers][:, v]], np.ones(
            np.sum(found.inliers))] for v, image_id in enumerate((1, 3)))
        lines = x0 @ geometry.F.T
        assert np.median(np.abs(np.sum(x1 * lines, axis=1)) / np.hypot(*lines[:, :2].T)) < 0.5
        for (id0, id1), geometry in verified(database).items():
            names = {image_id: NAMES.index(name) for name, image_id in database.ids.items()}
            T_0to1 = relative_pose(POSES[names[id0]], POSES[names[id1]])
            T = geometry.cam2_from_cam1.matrix()
            error_t, error_R = pose_error(T_0to1, T[:, :3], T[:, 3])
            assert error_R < 5 and (error_t < 5 or not T[:, 3].any())
            assert len(geometry.inlier_matches) >= 30


def test_pairs_are_those_of_iterative_matching(scene, tmp_path):
    write_pair_list(tmp_path / "pairs.txt", [make_pair(0, 2)])
    options = {**SETTINGS, "matching_method": "IMP", "weights": str(WEIGHTS), "max_keypoints": 300}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert command(scene / "images", tmp_path / "out", "--pairs", tmp_path / "pairs.txt", *words) == 0
    found = ImageMatcher(**options)(*(scene / "images" / NAMES[i] for i in (0, 2)), CAMERAS[0], CAMERAS[2])
    assert found.steps and found.R is not None
    with Database(tmp_path / "out/database.db") as database:
        np.testing.assert_array_equal(database.db.read_matches(1, 2), found.matches)
        np.testing.assert_array_equal(database.db.read_two_view_geometry(1, 2).inlier_matches,
                                      found.matches[found.inliers])


def test_few_inliers_leave_no_two_view_geometry(scene, tmp_path):
    options = scene / "images", tmp_path, "--pairs", scene / "pairs.txt", *RATIO
    assert command(*options, "--min_inliers", 5000) == 0
    with Database(tmp_path / "database.db") as database:
        assert database.counts() == [3, 3] and not verified(database)


def test_a_list_in_any_order_gives_the_same_pairs(scene, tmp_path):
    lines = [make_pair(0, 1), make_pair(1, 0), make_pair(2, 0)]
    write_pair_list(tmp_path / "pairs.txt", lines)
    assert command(scene / "images", tmp_path / "out", "--pairs", tmp_path / "pairs.txt", *RATIO) == 0
    with Database(tmp_path / "out/database.db") as database:
        assert list(database.db.read_num_matches()[0]) == [pycolmap.image_pair_to_pair_id(1, i) for i in (2, 3)]


def test_cameras_that_are_not_known_are_guessed_and_verified_as_colmap_does(photos, tmp_path):
    assert command(photos, tmp_path / "out", *RATIO) == 0
    with Database(tmp_path / "out/database.db") as database:
        camera = database.camera("sub/b.png")
        assert camera.model.name == "SIMPLE_RADIAL" and not camera.has_prior_focal_length
        np.testing.assert_allclose(camera.params, [480, 200, 150, 0])
        assert {geometry.config for geometry in verified(database).values()} <= {
            KINDS.UNCALIBRATED, KINDS.PLANAR_OR_PANORAMIC, KINDS.PLANAR}
        assert verified(database)


def test_images_of_a_folder_share_a_camera_unless_their_exif_data_differ(photos, tmp_path):
    for name, millimetres in (("d.jpg", 30), ("e.jpg", 30), ("f.jpg", 50)):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0xA405] = millimetres
        Image.fromarray(read_image(photos / "a.png")).save(photos / name, exif=exif)
    assert command(photos, tmp_path / "out", *RATIO, "--sequential", 1) == 0
    with Database(tmp_path / "out/database.db") as database:
        ids = [database.camera_ids[name] for name in ("a.png", "c.png", "d.jpg", "e.jpg", "f.jpg", "sub/b.png")]
        assert ids == [1, 1, 2, 2, 3, 4]
        assert [database.cameras[i].has_prior_focal_length for i in (1, 2, 3, 4)] == [False, True, True, False]
        assert database.cameras[2].params[0] == pytest.approx(30 / np.hypot(36, 24) * 400)


def test_keypoints_are_those_of_the_image_as_stored(photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = read_image(photos / "a.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(image))).save(photos / "a.png", exif=exif)
    assert command(photos, tmp_path / "out", "--focal", 300, *RATIO) == 0
    with Database(tmp_path / "out/database.db") as database:
        camera, keypoints = database.camera("a.png"), database.db.read_keypoints(1)
        assert (camera.width, camera.height) == (240, 320) and keypoints[:, 1].max() > 250


def write_images(folder, poses) -> list[np.ndarray]:
    """Render the scene from world-to-camera poses into 0.png, 1.png, ...; returns the depth maps."""
    rng = np.random.default_rng(0)
    textures = [texture(rng, 1320, 1100), texture(rng, 198, 286)]
    views = [render(textures, CAMERAS[0], pose, SIZES[0]) for pose in poses]
    for i, (image, _) in enumerate(views):
        write_image(folder / f"{i}.png", image)
    return [depth for _, depth in views]


def mapped(database, geometry) -> np.ndarray:
    """How far H puts the inliers from their matches, in pixels."""
    rays = np.c_[database.db.read_keypoints(1), np.ones(400)][geometry.inlier_matches[:, 0]] @ geometry.H.T
    there = database.db.read_keypoints(2)[geometry.inlier_matches[:, 1]]
    return np.linalg.norm(rays[:, :2] / rays[:, 2:] - there, axis=1)


def test_a_turn_on_the_spot_is_panoramic(scene, tmp_path):
    poses = [np.eye(4), make_pose(Rotation.from_rotvec([2, 8, 3], degrees=True).as_matrix(), [0, 0, 0])]
    write_images(tmp_path / "images", poses)
    assert command(tmp_path / "images", tmp_path / "out", *RATIO, "--K", 300, 306, 159.5, 119.5) == 0
    with Database(tmp_path / "out/database.db") as database:
        geometry = database.db.read_two_view_geometry(1, 2)
        assert geometry.config == KINDS.PANORAMIC
        assert np.median(mapped(database, geometry)) < 1


def test_a_plane_gives_no_pose(tmp_path):
    *images, K, right = flat_pair(turned_camera=False)
    for i, image in enumerate(images):
        write_image(tmp_path / f"images/{i}.png", image)
    assert command(tmp_path / "images", tmp_path / "out", *RATIO, "--K", *K[[0, 1, 0, 1], [0, 1, 2, 2]]) == 0
    with Database(tmp_path / "out/database.db") as database:
        geometry = database.db.read_two_view_geometry(1, 2)
        assert geometry.config == KINDS.PLANAR and geometry.cam2_from_cam1 is geometry.F is geometry.E is None
        assert len(geometry.inlier_matches) > 50 and np.median(mapped(database, geometry)) < 0.5
        wrong = make_pose(Rotation.from_rotvec([0, 0, 90], degrees=True).as_matrix(), [1, 0, 0])
        for T_0to1, mismatched in ((right, 0), (wrong, 1)):
            judged = sfm_table.judge_pairs(database, {"0.png": np.eye(4), "1.png": T_0to1})
            assert judged["verified"] == 1 and judged["posed"] == judged["wrong"] == 0
            assert judged["mismatched"] == mismatched


def test_of_a_pose_only_what_is_known_is_written(scene):
    found = ImageMatcher(**SETTINGS)(*(scene / "images" / name for name in NAMES[:2]), *CAMERAS[:2])
    cameras = [pycolmap.Camera(model="PINHOLE", width=w, height=h, has_prior_focal_length=True,
                               params=opencv_to_colmap_K(K)[[0, 1, 0, 1], [0, 1, 2, 2]])
               for (w, h), K in zip(SIZES, CAMERAS)]
    for uncertainty, kind, t in (((1, 1), KINDS.CALIBRATED, found.t), ((1, 11), KINDS.UNCALIBRATED, np.zeros(3)),
                                 ((11, 1), KINDS.UNCALIBRATED, None)):
        found.rotation_uncertainty, found.direction_uncertainty = uncertainty
        geometry = two_view_geometry(found, *cameras[:2], 30, 0)
        assert geometry.config == kind and geometry.F is not None
        np.testing.assert_array_equal(geometry.inlier_matches, found.matches[found.inliers])
        if kind == KINDS.CALIBRATED:
            np.testing.assert_allclose(geometry.E, essential_matrix(make_pose(found.R, found.t)))
        else:
            assert geometry.E is None
        if t is None:
            assert geometry.cam2_from_cam1 is None
        else:
            np.testing.assert_allclose(geometry.cam2_from_cam1.matrix(), np.c_[found.R, t], atol=1e-6)


def test_a_short_baseline_gives_no_direction(scene, tmp_path):
    write_images(tmp_path / "images", [np.eye(4), make_pose(np.eye(3), [0.15, 0, 0])])
    assert command(tmp_path / "images", tmp_path / "out", *RATIO, "--K", 300, 306, 159.5, 119.5) == 0
    with Database(tmp_path / "out/database.db") as database:
        geometry = database.db.read_two_view_geometry(1, 2)
        assert geometry.config == KINDS.UNCALIBRATED and geometry.E is None
        judged = sfm_table.judge_pairs(database, {"0.png": np.eye(4), "1.png": make_pose(np.eye(3), [0, 0.15, 0])})
        assert judged["verified"] == judged["posed"] == 1 and judged["directed"] == judged["wrong"] == 0
        T = geometry.cam2_from_cam1.matrix()
        assert not T[:, 3].any() and pose_error(np.eye(4), T[:, :3], np.ones(3))[1] < 2
        x0, x1 = (np.c_[database.db.read_keypoints(image_id)[geometry.inlier_matches[:, v]],
                        np.ones(len(geometry.inlier_matches))] for v, image_id in enumerate((1, 2)))
        lines = x0 @ geometry.F.T
        assert np.median(np.abs(np.sum(x1 * lines, axis=1)) / np.hypot(*lines[:, :2].T)) < 0.5


def test_pairs_of_neighbours_and_of_similar_images(tmp_path):
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(2, 16))
    local = [kinds[i % 2] + rng.normal(size=(50, 16)) for i in range(6)] + [np.zeros((0, 16))]
    assert set(nearest_pairs(local, 2)) >= {(0, 2), (0, 4), (2, 4), (1, 3), (1, 5), (3, 5)}
    assert not any((i + j) % 2 for i, j in nearest_pairs(local[:6], 2))

    for i in range(4):
        write_image(tmp_path / "images" / f"{i}.png", texture(np.random.default_rng(i), 80, 80))
    for words, pairs in ((("--sequential", 1), [(1, 2), (2, 3), (3, 4)]), (("--nearest", 3), 6)):
        assert command(tmp_path / "images", tmp_path / words[0], *words, *RATIO) == 0
        with Database(tmp_path / words[0] / "database.db") as database:
            there = [tuple(pycolmap.pair_id_to_image_pair(pair)) for pair in database.db.read_num_matches()[0]]
            assert there == pairs or len(there) == pairs


# resume

DIES = """
import os, shutil, signal, sys
from eval import export_colmap
from eval.colmap_database import Database

class Dies:
    def __init__(self, db):
        self.db = db

    def __getattr__(self, name):
        if name in ("write_keypoints", "write_matches"):  # in the middle of a transaction
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(self.db, name)

def run_and_die(method, count):
    write = getattr(Database, method)

    def write_or_die(self, *arguments):
        nonlocal count
        count -= 1
        if not count:
            db, transaction = self.db, self.colmap.DatabaseTransaction
            self.colmap.DatabaseTransaction = lambda _: transaction(db)
            self.db = Dies(db)
        write(self, *arguments)

    setattr(Database, method, write_or_die)
    export_colmap.main(sys.argv[1:])

for method, count in (("add_image", 2), ("add_pair", 2)):
    pid = os.fork()
    if not pid:
        run_and_die(method, count)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    shutil.copytree(sys.argv[-1], f"{sys.argv[-1]}_{method}")
"""


def test_killed_at_any_moment_the_same_command_ends_with_an_equal_database(scene, tmp_path):
    options = [str(scene / "images"), "--pairs", str(scene / "pairs.txt"), *RATIO]
    assert command(*options, tmp_path / "whole") == 0
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", DIES, *options, str(out)], check=True, cwd=Path(__file__).parents[1])
    for method, n_images, n_pairs in (("add_image", 1, 0), ("add_pair", 3, 1)):
        killed = tmp_path / f"out_{method}"
        assert not (killed / "database.db").exists()
        there = tables(killed / "unfinished.db")
        assert len(there["images"]) == n_images
        assert len(there["matches"]) == len(there["two_view_geometries"]) == n_pairs
    threads = read_json(out / "settings.json")["threads"]
    torch.set_num_threads(threads + 1)
    assert command(*options, out) == 0
    assert torch.get_num_threads() == threads
    assert tables(out / "database.db") == tables(tmp_path / "whole/database.db")
    assert sorted(path.name for path in out.iterdir()) == ["database.db", "settings.json"]


def test_images_that_were_bad_or_not_there_are_added_later(photos, tmp_path, capsys):
    good = (photos / "c.png").read_bytes()
    (photos / "c.png").write_bytes(b"no image")
    options = photos, tmp_path / "out", "--focal", 300, *RATIO
    assert command(*options) == 1
    said = capsys.readouterr()
    assert "2 images, 1 pairs with matches" in said.out
    assert "1 images or pairs skipped" in said.err and "c.png" in said.err
    before = tables(tmp_path / "out/database.db")
    (photos / "c.png").write_bytes(good)
    assert command(*options) == 0
    assert "3 images, 3 pairs with matches" in capsys.readouterr().out
    after = tables(tmp_path / "out/database.db")
    assert set(before["matches"]) < set(after["matches"]) and len(after["matches"]) == 3


def test_images_can_be_added_where_a_camera_was_given(photos, tmp_path, capsys):
    (photos / "c.png").rename(tmp_path / "c.png")
    options = photos, tmp_path / "out", *RATIO
    K = "--K", 300, 306, 159.5, 119.5
    assert command(*options, *K) == 0
    (tmp_path / "c.png").rename(photos / "c.png")
    (photos / "a.png").rename(tmp_path / "a.png")
    assert command(*options, *K) == 0
    (tmp_path / "a.png").rename(photos / "a.png")
    with Database(tmp_path / "out/database.db") as database:
        assert database.counts() == [3, 2] and len(database.cameras) == 2  # as sub/b.png is in another folder
    capsys.readouterr()
    for words in ((), ("--K", 300, 306, 160, 119.5)):
        assert command(*options, *words) == 2
        error = capsys.readouterr().err
        assert "of a.png, now it is" in error and error.count("\n") == 1


def test_pairs_can_be_added_to_a_list(photos, tmp_path, capsys):
    few, many = tmp_path / "few.txt", tmp_path / "many.txt"
    write_pair_list(few, [make_pair(0, 1)])
    write_pair_list(many, [make_pair(0, 2), make_pair(0, 1)])
    options = photos, tmp_path / "out", *RATIO
    assert command(*options, "--pairs", few) == 0
    before = tables(tmp_path / "out/database.db")["matches"]
    assert command(*options, "--pairs", many) == 0
    after = tables(tmp_path / "out/database.db")["matches"]
    assert set(before) < set(after) and len(after) == 2
    capsys.readouterr()
    for words, said in ((("--pairs", few), f"has the pair {NAMES[0]} {NAMES[2]}, which is not in the list"),
                        ((), "was made with pairs of a list, now it is None")):
        assert command(*options, *words) == 2
        assert said in capsys.readouterr().err
    assert tables(tmp_path / "out/database.db")["matches"] == after


@pytest.mark.parametrize("in_the_middle", [False, True])
def test_a_database_that_another_program_has_open_is_whole(photos, tmp_path, capsys, monkeypatch, in_the_middle):
    readers, add_pairs = [], export_colmap.Export.add_pairs

    def peek(job, pairs):
        readers.append(sqlite3.connect(tmp_path / "out/unfinished.db", timeout=0))
        rows = readers[0].execute("select name from images")
        rows.fetchone() if in_the_middle else rows.fetchall()
        readers.append(rows)
        add_pairs(job, pairs)

    monkeypatch.setattr(export_colmap.Export, "add_pairs", peek)
    options = photos, tmp_path / "out", "--focal", 300, *RATIO
    assert command(*options) == (2 if in_the_middle else 0)
    monkeypatch.undo()
    if in_the_middle:
        assert "another program is reading" in capsys.readouterr().err
        readers.pop().close()
        readers.pop().close()
        assert command(*options) == 0
    assert len(tables(tmp_path / "out/database.db")["matches"]) == 3


@pytest.mark.parametrize(("change", "said"), [
    (["--focal", "301"], "was made with focal 300.0, now it is 301.0"), (["--min_inliers", "20"], "min_inliers None"),
    (["--max_keypoints", "300"], "max_keypoints 400"), (["--sequential", "1"], "sequential None")])
def test_other_settings_are_refused(photos, tmp_path, capsys, change, said):
    assert command(photos, tmp_path / "out", "--focal", 300, *RATIO) == 0
    before = (tmp_path / "out/database.db").read_bytes()
    capsys.readouterr()
    assert command(photos, tmp_path / "out", "--focal", 300, *RATIO, *change) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (tmp_path / "out/database.db").read_bytes() == before


def test_a_database_is_resumed_in_its_precision(photos, tmp_path, capsys):
    def used():
        return read_json(tmp_path / "out/settings.json")["precision"]

    options = photos, tmp_path / "out", "--focal", 300, "--weights", WEIGHTS, "--max_keypoints", 60
    assert command(*options, "--precision", "bfloat16") == 0 and used() == "bfloat16"
    assert command(*options) == 0 and used() == "bfloat16"
    # of an earlier version: made in float32
    settings = read_json(tmp_path / "out/settings.json")
    del settings["precision"]
    write_json(tmp_path / "out/settings.json", settings)
    capsys.readouterr()
    assert command(*options, "--precision", "bfloat16") == 2
    assert "was made with precision float32, now it is bfloat16" in capsys.readouterr().err
    assert command(*options) == 0 and used() == "float32"


def test_an_image_that_changed_is_refused(photos, tmp_path, capsys):
    options = photos, tmp_path / "out", "--focal", 300, *RATIO
    assert command(*options) == 0
    write_image(photos / "a.png", read_image(photos / "a.png")[::-1])
    assert command(*options) == 2
    assert "a.png was changed after" in capsys.readouterr().err


# keypoints that are there

@pytest.mark.parametrize("columns", [2, 6])
def test_the_keypoints_of_a_database_are_matched(scene, tmp_path, columns):
    words = scene / "images", tmp_path / "old", "--pairs", scene / "pairs.txt", *RATIO
    assert command(*words) == 0
    old = tmp_path / "old/database.db"
    if columns > 2:
        with Database(old) as database:
            for image_id in (1, 2, 3):
                there = database.db.read_keypoints(image_id)
                database.db.update_keypoints(image_id, np.c_[there, np.ones((len(there), columns - 2), np.float32)])
    before = old.read_bytes()
    assert command(scene / "images", tmp_path / "new", "--rematch", old, "--matching_method", "NN_ratio") == 0
    assert old.read_bytes() == before
    made, remade = tables(old), tables(tmp_path / "new/database.db")
    for name in ("cameras", "images", "keypoints", "descriptors", "frames", "rigs"):
        assert made[name] == remade[name], name
    with Database(old) as first, Database(tmp_path / "new/database.db") as second:
        assert second.counts() == [3, 3]
        for pair in ((1, 2), (1, 3), (2, 3)):  # descriptors were rounded
            matches = [set(map(tuple, database.db.read_matches(*pair).tolist())) for database in (first, second)]
            assert len(matches[0] & matches[1]) > 0.9 * len(matches[0] | matches[1])
        assert verified(first).keys() == verified(second).keys()


def test_descriptors_of_another_kind_are_named(scene, tmp_path, capsys):
    assert command(scene / "images", tmp_path / "old", "--focal", 300, *RATIO) == 0
    with Database(tmp_path / "old/database.db") as database:
        wide = pycolmap.FeatureDescriptors(type=pycolmap.FeatureExtractorType.UNDEFINED,
                                           data=np.zeros((400, 64), np.uint8))
        database.db.clear_descriptors()
        for image_id in (1, 2, 3):
            database.db.write_descriptors(image_id, wide)
    capsys.readouterr()
    assert command(scene / "images", tmp_path / "new", "--rematch", tmp_path / "old/database.db", *RATIO) == 1
    assert "64 bytes" in capsys.readouterr().err


# models

def test_a_model_comes_out(tmp_path, capsys):
    write_images(tmp_path / "images", WALK)
    options = tmp_path / "images", tmp_path / "out", "--map", "--K", 300, 306, 159.5, 119.5, *RATIO
    assert command(*options) == 0
    said = capsys.readouterr().out
    model = pycolmap.Reconstruction(tmp_path / "out/0")
    assert model.num_reg_images() == 5 and f"{model.num_points3D():d}" in said
    centers = {image.name: image.projection_center() for image in model.images.values()}
    there = np.array([centers[f"{i}.png"] for i in range(5)])
    true = np.array([np.linalg.inv(pose)[:3, 3] for pose in WALK])
    sim3d = pycolmap.estimate_sim3d(there, true)
    assert np.linalg.norm(np.array([sim3d * point for point in there]) - true, axis=1).max() < 0.05

    made = (tmp_path / "out/0/points3D.bin").read_bytes()
    time = (tmp_path / "out/0/points3D.bin").stat().st_mtime_ns
    assert command(*options) == 0 and capsys.readouterr().out == said
    assert (tmp_path / "out/0/points3D.bin").stat().st_mtime_ns == time  # left as it was
    (tmp_path / "out/models.json").unlink()
    assert command(*options) == 0
    assert (tmp_path / "out/0/points3D.bin").read_bytes() == made


def test_the_largest_model_is_the_first(tmp_path, monkeypatch):
    mapping = pycolmap.incremental_mapping

    def fail_first(database, images, out, options):
        models = mapping(database, images, out, options)
        (out / "0").rename(out / "1")
        (out / "0").mkdir()
        pycolmap.Reconstruction().write(out / "0")
        return {0: pycolmap.Reconstruction(), 1: models[0]}

    write_images(tmp_path / "images", WALK[:3])
    monkeypatch.setattr(pycolmap, "incremental_mapping", fail_first)
    assert command(tmp_path / "images", tmp_path / "out", "--map", "--K", 300, 306, 159.5, 119.5, *RATIO) == 0
    rows = read_json(tmp_path / "out/models.json")["models"]
    assert [(row["name"], row["images"]) for row in rows] == [("0", 3), ("1", 0)]
    assert [pycolmap.Reconstruction(tmp_path / "out" / name).num_reg_images() for name in "01"] == [3, 0]


def test_the_table_of_methods(tmp_path, capsys, monkeypatch):
    poses = list(WALK)
    names, depths = [f"images/{i}.png" for i in range(5)], write_images(tmp_path / "images", poses)
    K = opencv_to_colmap_K(CAMERAS[0])
    # the last pose of the ground truth is wrong, so that the four pairs with that image are
    poses[4] = make_pose(Rotation.from_rotvec([40, 0, 0], degrees=True).as_matrix(), poses[4][:3, 3])
    write_scene_info(tmp_path / "scene.npz", scene_info_from_depth(names, names, [K] * 5, poses, depths.__getitem__,
                                                                   progress=False))
    words = [tmp_path / "scene.npz", tmp_path, tmp_path / "out", "--methods", "NN_ratio", "--max_keypoints", 400]
    assert run(sfm_table.main, [str(word) for word in words]) == 0
    said = capsys.readouterr().out
    row = read_json(tmp_path / "out/NN_ratio/table.json")["row"]
    assert row["verified"] > row["wrong"] == row["wrong_rotation"] >= 3
    assert row["images"] == 5 and row["seconds"] > 0
    numbers = [row[name] for name in sfm_table.COUNTED]
    assert row["at least 30 inliers"] == "{}, {}, {}, {}, {}, {}".format(*numbers)
    assert row["center_error"] > 0.05  # the wrong pose draws all of them along
    assert f"| NN_ratio | {row['verified']} | {row['posed']} | {row['directed']} | {row['wrong']} |" in said

    with Database(tmp_path / "out/NN_ratio/database.db") as database:  # cameras above each other: no direction is right
        above = {name: make_pose(pose[:3, :3], pose[:3, :3] @ [0, -i, 0]) for i, (name, pose) in
                 enumerate(zip(names, WALK))}
        there = sfm_table.judge_pairs(database, above)
        assert there["verified"] >= there["directed"] == there["wrong"] > there["wrong_rotation"] == 0
        assert there["at least 30 inliers"] == ", ".join(str(there[name]) for name in sfm_table.COUNTED)
        assert there["at least 100 inliers"] != there["at least 30 inliers"]
    monkeypatch.setattr(sfm_table, "run_method", None)  # what is there is not run again
    assert run(sfm_table.main, [str(word) for word in words]) == 0
    assert capsys.readouterr().out.endswith(said[said.index("5 images, 10 pairs\n"):])


def test_no_model_is_said(photos, tmp_path, capsys):
    assert command(photos, tmp_path / "out", "--map", "--min_inliers", 5000, *RATIO) == 1
    assert "no model: too few verified pairs" in capsys.readouterr().err


# mistakes

def test_without_pycolmap(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    assert command(photos, tmp_path / "out", *RATIO) == 2
    assert capsys.readouterr().err == "error: pycolmap is not installed: pip install '.[colmap]'\n"


def test_mistakes_are_one_line(photos, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/database.db").write_bytes(b"")
    write_pair_list(tmp_path / "two.txt", [Pair("a.png", "c.png", 1, 0), Pair("a.png", "sub/b.png", 2, 0)])
    write_pair_list(tmp_path / "out.txt", [Pair("a.png", "../c.png")])
    for words, said in (
            ([photos, tmp_path / "file"], "file is a file, not a folder"),
            ([photos / "none", tmp_path / "out"], "none is not a folder of images"),
            ([photos, tmp_path / "foreign"], "holds a database that was not made here"),
            ([photos, tmp_path / "out", "--rematch", tmp_path / "file"], "file is not a database of COLMAP"),
            ([photos, tmp_path / "out", "--rematch", tmp_path / "no.db"], "database not found"),
            ([photos, tmp_path / "out2", "--pairs", tmp_path / "two.txt"], "gives a.png two cameras"),
            ([photos, tmp_path / "out2", "--pairs", tmp_path / "out.txt"], "must lie below its folder"),
            ([photos, tmp_path / "out2", "--K", "0", "1", "0", "0"], "--K: fx and fy must be more than 0")):
        capsys.readouterr()
        assert command(*words, *RATIO) == 2, said
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert (tmp_path / "foreign/database.db").read_bytes() == b""


@pytest.mark.parametrize("options", [
    ["--focal", "0"], ["--focal", "3", "--K", "1", "1", "0", "0"], ["--min_inliers", "4"],
    ["--sequential", "2", "--nearest", "2"], ["--rematch", "a.db", "--focal", "3"]])
def test_options_that_do_not_go(options):
    with pytest.raises(SystemExit) as exit:
        export_colmap.main(["images", "out", *options])
    assert exit.value.code == 2
