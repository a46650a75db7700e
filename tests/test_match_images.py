import csv
import html
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import torch
from eval_scene import CAMERAS, NAMES, POSES, SIZES, flat_pair, make_pair, make_scene, texture, write_warm_weights
from PIL import Image
from PIL.ExifTags import IFD

from eval import draw_overview, image_matcher, match_images, methods
from eval.image_matcher import ImageMatcher, choose_model
from eval.image_matches import describe_pose
from nets import build_matcher
from tools import checkpoint, pretrained
from tools.cli import InputError, run
from tools.files import read_image, write_image
from tools.geometry import essential_matrix, relative_pose, to_camera_coordinates, turn_K, turn_pose
from tools.metrics import epipolar_error, pose_error
from tools.pair_list import Pair, write_pair_list
from tools.visualize import GREEN, RED

KEYS = {"version", "image0", "image1", "image_size0", "image_size1", "turns0", "turns1", "keypoints0", "keypoints1",
        "scores0", "scores1", "matches", "matching_scores", "K0", "K1", "K_source0", "K_source1", "R", "t", "inliers",
        "translation_determined", "planar", "F", "verdict", "summary", "settings"}
pytestmark = pytest.mark.usefixtures("one_thread")
REPORT = ["index.html", "pairs.csv"]
RATIO = ("--matching_method", "NN_ratio", "--max_keypoints", "400")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Folder with images/ and pairs.txt, never written to."""
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network of six iterations that starts as a nearest-neighbour matcher."""
    return write_warm_weights(tmp_path_factory.mktemp("weights") / "warm.pth")


def command(*words):
    return run(match_images.main, [str(word) for word in words])


def numbers(K):
    return [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]


def cameras(i, j):
    return ("--K0", *numbers(CAMERAS[i]), "--K1", *numbers(CAMERAS[j]))


def load(path):
    with np.load(path, allow_pickle=False) as content:
        return {key: content[key] for key in content}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def pose_of(found):
    """Rotation and translation error of an npz of views 0 and 1."""
    error_t, error_R = pose_error(relative_pose(POSES[0], POSES[1]), found["R"], found["t"])
    return error_R, error_t


def matched_errors(found, T_0to1):
    x0 = to_camera_coordinates(found["keypoints0"][found["matches"][:, 0]], found["K0"])
    x1 = to_camera_coordinates(found["keypoints1"][found["matches"][:, 1]], found["K1"])
    return epipolar_error(x0, x1, essential_matrix(T_0to1))


def lines_off(found):
    """Distances (M,) of the matches in view 1 from their epipolar lines by F, in pixels."""
    points0, points1 = (np.c_[found[f"keypoints{v}"][found["matches"][:, v]], np.ones(len(found["matches"]))]
                        for v in (0, 1))
    lines = points0 @ found["F"].T
    return np.abs(np.sum(points1 * lines, axis=1)) / np.linalg.norm(lines[:, :2], axis=1)


def same(found, other, but=("settings", "image0", "image1")):
    for key in KEYS - {"summary", *but}:  # which says how long it took
        np.testing.assert_array_equal(found[key], other[key], err_msg=key)


# two images

def test_two_images_give_a_picture_and_numbers(scene, tmp_path, capsys):
    images = [scene / "images" / name for name in NAMES[:2]]
    assert command(*images, *cameras(0, 1), *RATIO, "--save_path", tmp_path) == 0
    assert names_in(tmp_path) == ["a_sub-b.npz", "a_sub-b.png"]
    found = load(tmp_path / "a_sub-b.npz")
    assert set(found) == KEYS and found["version"] == 3
    assert (str(found["image0"]), str(found["image1"])) == ("a.png", os.path.join("sub", "b.png"))
    assert found["image_size0"].tolist() == list(SIZES[0]) and found["image_size1"].tolist() == list(SIZES[1])
    np.testing.assert_allclose(found["K0"], CAMERAS[0])
    np.testing.assert_allclose(found["K1"], CAMERAS[1])
    assert found["K_source0"] == found["K_source1"] == "given"
    n, m = len(found["keypoints0"]), len(found["matches"])
    assert found["keypoints0"].shape == (n, 2) and found["scores0"].shape == (n,) and 200 < n <= 400
    assert found["matches"].shape == (m, 2) and found["matches"].dtype == np.int64 and m > 50
    assert found["matching_scores"].shape == (m,) and found["inliers"].shape == (m,) and found["inliers"].dtype == bool
    assert np.isclose(np.linalg.norm(found["t"]), 1) and np.allclose(found["R"] @ found["R"].T, np.eye(3))
    assert max(pose_of(found)) < 1.5
    # the inliers are the matches that agree with the true pose, within the threshold of 1 pixel
    errors = matched_errors(found, relative_pose(POSES[0], POSES[1]))
    assert np.mean(errors[found["inliers"]] < 0.005) > 0.95 and found["inliers"].mean() > 0.7
    picture = read_image(tmp_path / "a_sub-b.png", color=True)
    assert picture.shape[0] > 300 and picture.shape[1] == 320 + 8 + 400
    said = capsys.readouterr().out
    assert "NN_ratio, sift\n" in said and f"{m} matches\n" in said and f"{found['inliers'].sum()} inliers" in said
    assert str(tmp_path / "a_sub-b.npz") in said


def test_without_a_camera_there_is_a_fundamental_matrix_but_no_pose(scene, tmp_path, capsys):
    images = [scene / "images" / name for name in NAMES[:2]]
    assert command(*images, *RATIO, "--save_path", tmp_path) == 0
    found = load(tmp_path / "a_sub-b.npz")
    assert set(found) == KEYS and len(found["matches"]) > 50 and found["verdict"] == "trusted"
    errors = matched_errors({**found, "K0": CAMERAS[0], "K1": CAMERAS[1]}, relative_pose(POSES[0], POSES[1]))
    assert np.mean(errors[found["inliers"]] < 0.005) > 0.95 and found["inliers"].mean() > 0.7
    assert lines_off(found)[found["inliers"]].max() < 1.5 and np.linalg.norm(found["F"]) == pytest.approx(1)
    assert found["K_source0"] == found["K_source1"] == "unknown"
    for key, shape in (("K0", (3, 3)), ("K1", (3, 3)), ("R", (3, 3)), ("t", (3,))):
        assert found[key].shape == shape and np.isnan(found[key]).all()
    said = capsys.readouterr().out
    assert "focal length not known: --focal or --K0 gives it" in said and "no pose: K is not known" in said


def test_one_focal_length_or_camera_goes_for_both(scene, tmp_path):
    images = [scene / "images" / NAMES[i] for i in (0, 2)]
    assert command(*images, "--focal", 303, *RATIO, "--save_path", tmp_path / "focal") == 0
    assert command(*images, "--K0", 303, 303, 159.5, 119.5, *RATIO, "--save_path", tmp_path / "K0") == 0
    found = load(tmp_path / "focal" / "a_c.npz")
    same(found, load(tmp_path / "K0" / "a_c.npz"))
    np.testing.assert_array_equal(found["K1"], [[303, 0, 159.5], [0, 303, 119.5], [0, 0, 1]])


def test_an_image_without_keypoints_is_no_problem(scene, tmp_path, weights):
    write_image(tmp_path / "blank.png", np.full((50, 60), 128, np.uint8))
    for options in (RATIO, ("--weights", weights)):
        assert command(tmp_path / "blank.png", scene / "images/a.png", "--focal", 300, *options, "--save_path",
                       tmp_path / "out") == 0
        (path,) = (tmp_path / "out").glob("*.npz")
        found = load(path)
        assert found["matches"].shape == (0, 2) and found["keypoints0"].shape == (0, 2) and np.isnan(found["R"]).all()


def test_keypoints_are_those_of_the_full_image(tmp_path):
    # blobs far apart, of a size that shrinking by 4 leaves intact: their centres are where keypoints are found
    image = np.full((600, 800), 90, np.uint8)
    centers = np.stack(np.meshgrid(np.arange(100, 750, 125), np.arange(100, 550, 125)), axis=-1).reshape(-1, 2)
    for x, y in centers.tolist():
        cv2.circle(image, (x, y), 24, 220, cv2.FILLED, cv2.LINE_AA)
    write_image(tmp_path / "blobs.png", image)
    for resize in (200, 800, 5000):
        view = ImageMatcher("NN_ratio", resize=resize).load(tmp_path / "blobs.png")
        assert view.matched_size == ((200, 150) if resize == 200 else (800, 600))  # nothing is enlarged
        distances = np.linalg.norm(view.keypoints[None] - centers[:, None], axis=2)
        offsets = view.keypoints[distances.argmin(axis=1)] - centers
        # OpenCV's SIFT is a quarter of a pixel off, of the image that it gets; a mistake here would add 3/8 of one
        pixel = 800 / view.matched_size[0]
        assert np.abs(offsets.mean(axis=0) / pixel - 0.25).max() < 0.05


def test_the_threshold_is_in_pixels_of_the_image_as_matched(scene, tmp_path):
    for i in (0, 1):
        image = read_image(scene / "images" / NAMES[i])
        large = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
        write_image(tmp_path / f"{i}.png", large)
    K0, K1 = (np.array([[4 * K[0, 0], 0, 4 * K[0, 2] + 1.5], [0, 4 * K[1, 1], 4 * K[1, 2] + 1.5], [0, 0, 1]])
              for K in CAMERAS[:2])
    found = ImageMatcher("NN_ratio", resize=400, max_keypoints=400)(tmp_path / "0.png", tmp_path / "1.png", K0, K1)
    small = ImageMatcher("NN_ratio", max_keypoints=400)(scene / "images" / NAMES[0], scene / "images" / NAMES[1],
                                                         *CAMERAS[:2])
    assert found.view0.image_size == (1280, 960) and found.keypoints0[:, 0].max() > 1000
    assert abs(found.inliers.mean() - small.inliers.mean()) < 0.08
    error_t, error_R = pose_error(relative_pose(POSES[0], POSES[1]), found.R, found.t)
    assert max(error_t, error_R) < 1.5


def test_a_pose_of_few_inliers_is_called_doubtful(scene):
    images = [scene / "images" / name for name in NAMES[1:]]
    found = ImageMatcher("NN_ratio", max_keypoints=400)(*images, *CAMERAS[1:])
    assert found.verdict == "trusted" and found.remark == ""
    for n_inliers, verdict in ((0, "none"), (29, "doubtful"), (30, "trusted")):
        few = replace(found, inliers=np.arange(len(found.matches)) < n_inliers)
        assert few.verdict == few.summary()["verdict"] == verdict and describe_pose(few).startswith(f"{verdict}: ")
        assert ("by chance" in describe_pose(few)) == (verdict == "doubtful")
    many = replace(found, matches=np.zeros((1000, 2), np.int64), inliers=np.arange(1000) < 49)
    assert many.verdict == "doubtful"
    assert replace(many, inliers=np.arange(1000) < 50).verdict == "trusted"


@pytest.mark.parametrize("options", [[], ["--focal", 300]])
def test_unrelated_photographs_are_not_trusted(tmp_path, capsys, options):
    for name in "abc":
        write_image(tmp_path / "in" / f"{name}.png", texture(np.random.default_rng(ord(name)), 320, 240))
    # all nearest neighbours
    assert command(tmp_path / "in", "--matching_method", "NN", *options, "--save_path", tmp_path / "out") == 0
    assert "3 pairs matched: 0 trusted, " in capsys.readouterr().out
    verdicts = {str(load(path)["verdict"]) for path in (tmp_path / "out").glob("*.npz")}
    assert verdicts <= {"doubtful", "none"}


@pytest.mark.parametrize("turned_camera", [False, True])
def test_planes_and_rotations_are_named(turned_camera):
    image0, image1, K, _ = flat_pair(turned_camera)
    matcher = ImageMatcher("NN_ratio", max_keypoints=400)
    unknown, known = matcher(image0, image1), matcher(image0, image1, K, K)
    assert unknown.planar and known.planar and unknown.inliers.sum() > 50 and known.inliers.sum() > 50
    assert unknown.F is unknown.R is None and unknown.verdict == "trusted" and not unknown.translation_determined
    assert unknown.remark.startswith("a plane, or a rotation alone, explains the matches: the translation is not det")
    assert known.translation_determined != turned_camera
    if turned_camera:
        assert known.verdict == "trusted" and known.remark == "a rotation alone explains the matches"
        assert known.knows_rotation and not known.knows_direction
    else:
        assert not known.knows_rotation and not known.knows_direction
        assert known.verdict == "doubtful" and known.remark.startswith("a plane explains the matches: two poses fit")


@pytest.mark.parametrize("method", ["NN", "NN_ratio", "weights"])
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (1, 1), (1, 400), (2, 2), (5, 7)])
def test_hardly_a_keypoint(scene, weights, method, counts):
    options = {"weights": weights} if method == "weights" else {"matching_method": method}
    matcher = ImageMatcher(max_keypoints=400, **options)
    views = [matcher.load(scene / "images" / name) for name in NAMES[:2]]
    for view, n in zip(views, counts):
        for owner in (view, view.features):
            owner.keypoints = owner.keypoints[:n]
        view.picture_keypoints = view.picture_keypoints[:n]
        view.features.scores, view.features.descriptors = view.features.scores[:n], view.features.descriptors[:n]
    for Ks in ((None, None), CAMERAS[:2]):
        found = matcher.match(*views, *Ks)
        assert found.verdict in ("none", "doubtful") and len(found.matches) <= min(counts)
        assert found.draw().ndim == 3 and found.summary()["matches"] >= len(found.matches)


def test_the_picture_is_in_colour_and_tells_inliers_from_rejected(scene, weights, tmp_path):
    for i in (0, 1):
        image = cv2.cvtColor(read_image(scene / "images" / NAMES[i]), cv2.COLOR_GRAY2BGR)
        write_image(tmp_path / f"{i}.png", image // [1, 2, 3])
    found = ImageMatcher(weights=weights, max_keypoints=400)(tmp_path / "0.png", tmp_path / "1.png", *CAMERAS[:2])
    matches, inliers = found.candidates
    assert found.stopped_early and len(matches) > len(found.matches) == inliers.sum() == found.inliers.sum()
    np.testing.assert_array_equal(matches[inliers], found.matches)
    row = found.summary()
    assert (row["matches"], row["inliers"]) == (len(matches), inliers.sum()) and row["seconds"] > 0
    picture = found.draw()
    assert [int((np.abs(picture.astype(int) - color).max(axis=2) < 10).sum() > 50) for color in (GREEN, RED)] == [1, 1]
    background = picture[-240:, :320].astype(int)
    blue = (background[..., 0] > background[..., 1] + 10) & (background[..., 1] > background[..., 2] + 5)
    assert blue.mean() > 0.1


# photographs

def save_turned(path, image, turns, tags=None):
    """Write an image as a camera does that was held turned: np.rot90(stored, turns) is `image`."""
    exif = Image.Exif()
    exif[0x0112] = {0: 1, 1: 8, 2: 3, 3: 6}[turns]
    exif.get_ifd(IFD.Exif).update(tags or {})
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.rot90(image, -turns)).save(path, exif=exif, quality=98)


@pytest.mark.parametrize("turns0, turns1", [(3, 0), (1, 2)])
def test_photographs_are_matched_upright_and_reported_as_stored(scene, tmp_path, capsys, turns0, turns1):
    upright, stored = [], []
    for i, turns in ((0, turns0), (1, turns1)):
        image = read_image(scene / "images" / NAMES[i])
        save_turned(tmp_path / "in" / f"{i}.png", image, turns)
        upright_size = (image.shape[1], image.shape[0])
        stored.append((turn_K(CAMERAS[i], upright_size, -turns), turn_pose(POSES[i], -turns)))
        upright.append(scene / "images" / NAMES[i])
    (K0, pose0), (K1, pose1) = stored
    assert command(tmp_path / "in/0.png", tmp_path / "in/1.png", "--K0", *numbers(K0), "--K1", *numbers(K1), *RATIO,
                   "--save_path", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("turned upright") == 1 + (turns1 != 0)
    found = load(tmp_path / "out" / "0_1.npz")
    assert (found["turns0"], found["turns1"]) == (turns0, turns1)
    assert found["image_size0"].tolist() == list(read_image(tmp_path / "in/0.png").shape[::-1])
    error_t, error_R = pose_error(relative_pose(pose0, pose1), found["R"], found["t"])
    assert max(error_t, error_R) < 1.5
    assert np.mean(matched_errors(found, relative_pose(pose0, pose1))[found["inliers"]] < 0.005) > 0.95
    # the same matches as of the images turned by hand
    assert command(*upright, *cameras(0, 1), *RATIO, "--save_path", tmp_path / "upright") == 0
    np.testing.assert_array_equal(load(tmp_path / "upright" / "a_sub-b.npz")["matches"], found["matches"])
    assert command(tmp_path / "in/0.png", tmp_path / "in/1.png", *RATIO, "--resize", 250, "--save_path",
                   tmp_path / "F") == 0
    fundamental = load(tmp_path / "F" / "0_1.npz")
    assert lines_off(fundamental)[fundamental["inliers"]].max() < 2 * 400 / 250
    assert np.linalg.norm(fundamental["F"]) == pytest.approx(1)
    errors = matched_errors({**fundamental, "K0": K0, "K1": K1}, relative_pose(pose0, pose1))
    assert np.mean(errors[fundamental["inliers"]] < 0.01) > 0.95
    pictures = [read_image(tmp_path / name, color=True) for name in ("out/0_1.png", "upright/a_sub-b.png")]
    np.testing.assert_array_equal(*(picture[60:] for picture in pictures))


def test_the_focal_length_is_guessed_and_said(scene, tmp_path, capsys):
    # 400 pixels on the diagonal of 320x240: 300 of focal length are 32.4 mm
    for i in (0, 2):
        save_turned(tmp_path / "in" / f"{i}.jpg", read_image(scene / "images" / NAMES[i]), 0, {0xA405: 32})
    assert command(tmp_path / "in/0.jpg", tmp_path / "in/2.jpg", *RATIO, "--save_path", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("focal length 296 pixels guessed from EXIF") == 2
    found = load(tmp_path / "out" / "0_2.npz")
    assert found["K_source0"] == found["K_source1"] == "EXIF"
    np.testing.assert_allclose(found["K0"], [[295.8, 0, 159.5], [0, 295.8, 119.5], [0, 0, 1]], atol=0.1)
    error_t, error_R = pose_error(relative_pose(POSES[0], POSES[2]), found["R"], found["t"])
    assert max(error_t, error_R) < 5
    # what is given comes before a guess
    assert command(tmp_path / "in/0.jpg", tmp_path / "in/2.jpg", *cameras(0, 2), *RATIO, "--save_path",
                   tmp_path / "given") == 0
    assert "guessed" not in capsys.readouterr().out
    assert load(tmp_path / "given" / "0_2.npz")["K_source0"] == "given"


# many pairs

@pytest.fixture
def folder(scene, tmp_path):
    """A folder of three images in two folders, one that cannot be read, and what is not an image."""
    for name in NAMES:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scene / "images" / name, tmp_path / "in" / name)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "notes.txt").write_text("no image either")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    return tmp_path / "in"


def test_a_folder_gives_all_pairs_and_bad_images_are_listed(scene, folder, tmp_path, capsys, monkeypatch):
    read = []
    load_view = ImageMatcher.load
    monkeypatch.setattr(ImageMatcher, "load", lambda self, image, *rest: read.append(image.name) or
                        load_view(self, image, *rest))
    assert command(folder, "--focal", 300, *RATIO, "--save_path", folder / "out") == 1
    said, errors = capsys.readouterr()
    assert "3 pairs matched: 1 trusted, 2 doubtful, 0 without a result: " in said
    assert "1 images or pairs skipped" in errors and "broken.jpg: not a readable image" in errors
    assert names_in(folder / "out") == ["a_c.npz", "a_c.png", "a_sub-b.npz", "a_sub-b.png", "c_sub-b.npz",
                                        "c_sub-b.png", *REPORT]
    assert sorted(read) == ["a.png", "b.png", "broken.jpg", "c.png"]  # each once
    # the pictures made are no images of the folder
    assert command(folder, "--focal", 300, *RATIO, "--save_path", folder / "out") == 1
    assert "0 pairs matched" in (said := capsys.readouterr().out) and "; 3 were there already" in said
    assert command(*(scene / "images" / name for name in NAMES[:2]), "--focal", 300, *RATIO, "--save_path",
                   tmp_path / "pair") == 0
    same(load(tmp_path / "pair" / "a_sub-b.npz"), load(folder / "out" / "a_sub-b.npz"))


def test_a_pair_that_fails_does_not_end_the_others(folder, tmp_path, capsys, monkeypatch):
    match = ImageMatcher.match

    def fail(self, view0, view1, *rest):
        if (view0.name, view1.name) == ("a.png", "c.png"):
            raise ZeroDivisionError("of\na library")
        return match(self, view0, view1, *rest)
    monkeypatch.setattr(ImageMatcher, "match", fail)
    assert command(folder, *RATIO, "--save_path", tmp_path / "out") == 1
    said, errors = capsys.readouterr()
    assert "2 pairs matched" in said and "a.png c.png: ZeroDivisionError: of a library" in errors
    assert names_in(tmp_path / "out") == ["a_sub-b.npz", "a_sub-b.png", "c_sub-b.npz", "c_sub-b.png", *REPORT]


def test_what_is_complete_is_left_as_it_is(folder, tmp_path, capsys):
    (folder / "broken.jpg").unlink()
    out = tmp_path / "out"

    def again(*options):
        capsys.readouterr()
        assert command(folder, *options, *RATIO, "--save_path", out) == 0
        return capsys.readouterr().out

    again()
    assert "0 pairs matched" in again() and "3 were there already" in again()
    assert "3 pairs matched" in again("--focal", 300)
    (out / "a_c.npz").unlink()
    (out / "a_sub-b.npz").write_bytes(b"damaged")
    (out / "c_sub-b.png").unlink()
    assert "3 pairs matched" in again("--focal", 300)
    os.utime(folder / "c.png", (2 ** 31, 2 ** 31))  # changed since
    assert "2 pairs matched" in again("--focal", 300)
    other = shutil.copytree(folder, tmp_path / "other")  # other images of the same names
    assert command(other, "--focal", 300, *RATIO, "--save_path", out) == 0
    assert "3 pairs matched" in capsys.readouterr().out


def test_the_table_and_the_page_of_a_folder(scene, tmp_path, capsys):
    names = ["=a <b>\"& it's.png", "-c%20#?.png", "z.png"]
    (tmp_path / "in").mkdir()
    for name, image in zip(names, NAMES):
        shutil.copy(scene / "images" / image, tmp_path / "in" / name)
    words = tmp_path / "in", "--focal", 300, *RATIO, "--save_path", tmp_path / "out"
    assert command(*words) == 0
    with open(tmp_path / "out" / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {rows[0]["image0"], rows[0]["image1"]} == {"'" + names[0], "'" + names[1]}
    found = load(tmp_path / "out" / f"{rows[0]['files'][1:]}.npz")
    assert rows[0]["inliers"] == str(found["inliers"].sum()) and rows[0]["verdict"] == found["verdict"]
    assert rows[0]["K_source0"] == rows[0]["K_source1"] == "given"
    assert float(rows[0]["rotation"]) > 0 and float(rows[0]["seconds"]) > 0 and rows[0]["error_R"] == ""
    page = (tmp_path / "out" / "index.html").read_text()
    links = [unquote(html.unescape(link)) for link in re.findall(r'src="([^"]*)"', page)]
    assert len(links) == 3 and all((tmp_path / "out" / link).is_file() for link in links)
    assert "<b>\"" not in page and "=a &lt;b&gt;&quot;&amp; it&#x27;s.png" in page and "<script" not in page
    ranks = [("doubtful", "trusted", "none").index(verdict) for verdict in re.findall(r'<b class="(\w+)"', page)]
    assert ranks == sorted(ranks) and len(set(ranks)) > 1
    # made again from what is there, the same
    table = (tmp_path / "out" / "pairs.csv").read_bytes()
    for name in REPORT:
        (tmp_path / "out" / name).unlink()
    assert command(*words) == 0 and "3 were there already: 1 trusted" in capsys.readouterr().out
    assert (tmp_path / "out" / "pairs.csv").read_bytes() == table
    assert (tmp_path / "out" / "index.html").read_text() == page


def test_results_of_the_first_version_name_their_model(tmp_path):
    settings = {"matching_method": "IMP", "feature_type": "sift", "weights": "w.pth", "version": 1}
    np.savez(tmp_path / "a_b.npz", version=1, settings=json.dumps(settings))
    assert match_images.settings_used_before(tmp_path, None) == settings
    assert match_images.settings_used_before(tmp_path, "IMP") == settings
    assert match_images.settings_used_before(tmp_path, "EIMP") == {}
    assert match_images.read_complete(tmp_path / "a_b", settings, []) is None


def test_results_of_the_second_version_are_made_again(scene, tmp_path, capsys):
    images = [scene / "images" / name for name in NAMES]
    assert command(*images[:2], *RATIO, "--save_path", tmp_path) == 0
    old = load(tmp_path / "a_sub-b.npz")
    summary, settings = json.loads(str(old["summary"])), json.loads(str(old["settings"]))
    del summary["rotation_uncertainty"]
    np.savez(tmp_path / "a_sub-b.npz", **{**old, "version": 2, "summary": json.dumps(summary),
                                          "settings": json.dumps({**settings, "version": 2})})
    assert command(*images, *RATIO, "--save_path", tmp_path) == 0
    assert "3 pairs matched" in capsys.readouterr().out
    assert "rotation_uncertainty" in (tmp_path / "pairs.csv").read_text().splitlines()[0]


def test_more_than_two_images_are_paired_too(scene, tmp_path):
    images = [scene / "images" / name for name in NAMES]
    assert command(*images, *RATIO, "--save_path", tmp_path) == 0
    assert names_in(tmp_path) == ["a_c.npz", "a_c.png", "a_sub-b.npz", "a_sub-b.png", *REPORT, "sub-b_c.npz",
                                  "sub-b_c.png"]


def test_a_list_of_names(scene, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"# two pairs\n{NAMES[0]} {NAMES[1]}\n\n{NAMES[2]} none.png\n{NAMES[2]} a.png\n")
    assert command(tmp_path / "list.txt", "--image_dir", scene / "images", "--focal", 300, *RATIO, "--save_path",
                   tmp_path / "out") == 1
    said, errors = capsys.readouterr()
    assert "2 pairs matched" in said and "none.png: image not found" in errors
    assert names_in(tmp_path / "out") == ["a_sub-b.npz", "a_sub-b.png", "c_a.npz", "c_a.png", *REPORT]


def test_a_list_with_ground_truth_brings_its_cameras_and_errors(scene, tmp_path, capsys):
    pair = make_pair(0, 1)
    write_pair_list(scene / "one.txt", [pair])
    assert command(scene / "one.txt", "--image_dir", scene / "images", *RATIO, "--save_path", tmp_path) == 0
    said = capsys.readouterr().out
    found = load(tmp_path / "a_sub-b.npz")
    np.testing.assert_allclose(found["K1"], CAMERAS[1])
    error_R, error_t = pose_of(found)
    assert f"{error_R:.1f} and {error_t:.1f} degrees off" in said


def test_turns_of_a_list_come_before_exif(scene, tmp_path):
    image = read_image(scene / "images" / NAMES[0])
    for name, orientation_turns in (("0.png", 1), ("1.png", 0)):
        save_turned(tmp_path / "in" / name, image, orientation_turns)
    K = CAMERAS[0]
    write_pair_list(tmp_path / "in" / "list.txt", [Pair("0.png", "1.png"), Pair("1.png", "0.png", 2, 1),
                                                   Pair("0.png", "0.png", 0, 0, K, K)])
    assert command(tmp_path / "in/list.txt", *RATIO, "--save_path", tmp_path / "out") == 0
    turns = [(int(found["turns0"]), int(found["turns1"]))
             for found in (load(tmp_path / "out" / f"{name}.npz") for name in ("0_1", "1_0", "0_0"))]
    assert turns == [(1, 0), (2, 1), (0, 0)]


def test_every_pair_has_a_file_of_its_own():
    pairs = [Pair("a.png", "b.png"), Pair("a.jpg", "b.jpg"), Pair("a.png", "b_2.png"), Pair("/x/a.jpg", "../b.jpg"),
             Pair("a_b.png", "2.png")]
    names = match_images.output_names(pairs)
    assert len(set(names)) == 5 and names[:2] == ["a_b", "a_b_2"]
    assert not any("/" in name for name in names)


# networks

def test_a_network_matches_iteratively_and_draws_it(scene, tmp_path, weights, capsys):
    options = ("--image_dir", scene / "images", "--max_keypoints", 400, "--weights", weights, "--draw_iterations")
    write_pair_list(tmp_path / "list.txt", [make_pair(0, 1)])
    for folder in ("one", "two"):
        assert command(tmp_path / "list.txt", *options, "--save_path", tmp_path / folder) == 0
    said = capsys.readouterr().out
    assert f"EIMP, sift, {weights}" in said and "of 6 iterations" in said
    assert names_in(tmp_path / "one") == ["a_sub-b.npz", "a_sub-b.png", "a_sub-b_iterations.gif",
                                          "a_sub-b_iterations.png"]
    for name in names_in(tmp_path / "one"):  # bit for bit
        if not name.endswith(".npz"):  # which holds the time of writing
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    found = load(tmp_path / "one" / "a_sub-b.npz")
    same(found, load(tmp_path / "two" / "a_sub-b.npz"), but=())
    assert max(pose_of(found)) < 1.5

    result = ImageMatcher(weights=weights, max_keypoints=400)(scene / "images" / NAMES[0], scene / "images" / NAMES[1],
                                                              *CAMERAS[:2])
    np.testing.assert_array_equal(result.matches, found["matches"])
    first, second, *_, last = result.stages()
    assert (first.title, second.title) == ("two images", "iteration 4")
    assert last.title == f"iteration {result.n_iterations} of 6: result"
    assert len(first.kept0) == len(result.keypoints0) > len(last.kept0) > 64
    np.testing.assert_array_equal(last.kept0, result.steps[-1].kept0)
    np.testing.assert_array_equal(last.matches, found["matches"])
    with Image.open(tmp_path / "one" / "a_sub-b_iterations.gif") as gif:
        assert gif.n_frames == len(result.stages()) == 1 + len(result.steps)
    # nothing is left of the pictures when they are not drawn again
    assert command(tmp_path / "list.txt", *options[:-1], "--save_path", tmp_path / "one") == 0
    assert names_in(tmp_path / "one") == ["a_sub-b.npz", "a_sub-b.png"]


def test_one_shot_keeps_all_matches(scene, weights):
    images = scene / "images" / NAMES[0], scene / "images" / NAMES[1]
    found, one_shot = (ImageMatcher(weights=weights, max_keypoints=400, one_shot=flag)(*images, *CAMERAS[:2])
                       for flag in (False, True))
    assert found.stopped_early and found.inliers.all() and found.steps
    assert not one_shot.stopped_early and not one_shot.steps and one_shot.n_iterations == 6
    assert not one_shot.inliers.all() and one_shot.R is not None
    with pytest.raises(InputError, match="no iterations to draw"):
        one_shot.draw_iterations()


def test_changes_of_pose_are_drawn_where_the_truth_is_not_known(scene, weights):
    matcher = ImageMatcher(weights=weights, max_keypoints=400)
    views = [matcher.load(scene / "images" / name) for name in NAMES[:2]]
    T_0to1 = relative_pose(POSES[0], POSES[1])
    known, unknown = (matcher.match(*views, *CAMERAS[:2], truth) for truth in (T_0to1, None))
    stages, changes = known.stages(), unknown.stages()
    assert len(stages) > 2 and stages[0].errors is None and changes[1].errors is None
    error_t, error_R = pose_error(T_0to1, *known.steps[0].pose[:2])
    assert stages[1].errors == (error_R, error_t)
    R, t, inliers = unknown.steps[0].pose
    turned = cv2.Rodrigues(np.deg2rad([0.0, 0, 5]))[0] @ R
    unknown.steps[0] = replace(unknown.steps[0], pose=(turned, t, inliers))
    assert unknown.stages()[2].errors == pytest.approx((5, 0), abs=0.5)
    unknown.steps[0] = replace(unknown.steps[0], pose=None)
    assert unknown.stages()[1].errors == (np.inf, np.inf) and unknown.stages()[2].errors is None
    assert (known.draw_iterations() != unknown.draw_iterations()).any()


def test_the_python_way(scene, weights):
    images = [scene / "images" / name for name in NAMES[:2]]
    found = match_images.match_images(*images, *CAMERAS[:2], weights=weights, max_keypoints=400)
    arrays = match_images.match_images(*(read_image(image, color=True) for image in images), *CAMERAS[:2],
                                       weights=weights, max_keypoints=400)
    np.testing.assert_array_equal(found.matches, arrays.matches)
    np.testing.assert_array_equal(found.R, arrays.R)
    points0 = found.keypoints0[found.matches[:, 0]]
    assert points0.shape == (len(found.matches), 2) and found.inliers.sum() > 50
    assert found.draw().ndim == 3


def test_overview(scene, tmp_path, weights, capsys, monkeypatch):
    write_pair_list(tmp_path / "pair.txt", [make_pair(0, 1)])
    words = ["--weights", weights, "--pairs", tmp_path / "pair.txt", "--save_path", tmp_path / "out",
             "--matching_method", "EIMP", "--max_keypoints", 400, "--image_dir"]
    assert run(draw_overview.main, [str(word) for word in (*words, scene / "images")]) == 0
    assert names_in(tmp_path / "out") == ["iterations.gif", "overview.png"]
    assert run(draw_overview.main, [str(word) for word in (*words, tmp_path / "none")]) == 2
    words[5] = tmp_path / "pair.txt"
    monkeypatch.setattr(draw_overview, "ImageMatcher", None)  # before any work
    assert run(draw_overview.main, [str(word) for word in (*words, scene / "images")]) == 2
    assert "pair.txt is a file, not a folder to write to" in capsys.readouterr().err


# which model

def put(folder, name, dim=128, network="imp", **entries):
    torch.manual_seed(0)
    content = {"model": build_matcher(network, descriptor_dim=dim, n_layers=4).state_dict(), **entries}
    checkpoint.save_checkpoint(folder / name, content)
    return folder / name


def test_the_best_weights_on_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    for name, dim, method, feature in (("eimp_sift.pth", 128, "EIMP", "sift"), ("imp_sift.pth", 128, "IMP", "sift"),
                                       ("imp_spp.pth", 256, "IMP", "sift"), ("superpoint_v1.pth", 256, "IMP", "spp")):
        path = put(tmp_path, name, dim)
        chosen = choose_model(None, None, None)
        assert chosen == (method, feature, str(tmp_path / f"{method.lower()}_{feature}.pth"))
        assert path.name == "superpoint_v1.pth" or path.name == "imp_spp.pth" or chosen[2] == str(path)
    assert choose_model("EIMP", None, None)[1:] == ("sift", str(tmp_path / "eimp_sift.pth"))
    assert choose_model(None, "sift", None)[2] == str(tmp_path / "imp_sift.pth")


def test_lightglue_stands_between_published_weights_and_ours(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    monkeypatch.setattr(image_matcher, "lightglue_is_installed", lambda: True)
    own = put(tmp_path, "imp_sift_open.pth")
    assert choose_model(None, None, None) == ("LightGlue", "aliked", None)
    assert capsys.readouterr().err == "no published weights of IMP in weights/: taking LightGlue with ALIKED\n"
    assert choose_model("IMP", None, None) == choose_model(None, "sift", None) == ("IMP", "sift", str(own))
    monkeypatch.setattr(image_matcher, "lightglue_is_installed", lambda: False)
    assert choose_model(None, None, None) == ("IMP", "sift", str(own))
    # a folder is resumed with what it was begun with
    images = [scene / "images" / name for name in NAMES]
    words = "--save_path", tmp_path / "out", "--max_keypoints", 50, "--focal", 300
    assert command(*images[:2], *words) == 0
    monkeypatch.setattr(image_matcher, "lightglue_is_installed", lambda: True)
    capsys.readouterr()
    assert command(*images, *words) == 0
    assert capsys.readouterr().out.startswith(f"IMP, sift, {own}\n")
    published = put(tmp_path, "eimp_sift.pth")
    assert choose_model(None, None, None) == ("EIMP", "sift", str(published))


def test_weights_say_what_they_are_for(tmp_path):
    assert choose_model(None, None, put(tmp_path, "a.pth"))[:2] == ("IMP", "sift")
    assert choose_model(None, None, put(tmp_path, "b.pth", 256))[:2] == ("IMP", "spp")
    assert choose_model(None, None, put(tmp_path, "c.pth", config={"network": "adagmn"}))[:2] == ("EIMP", "sift")
    assert choose_model(None, None, put(tmp_path, "d.pth", network="gm"))[:2] == ("GM", "sift")
    assert choose_model("EIMP", None, put(tmp_path, "a.pth"))[:2] == ("EIMP", "sift")


def test_without_weights_the_command_says_so(scene, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    monkeypatch.setattr(image_matcher, "lightglue_is_installed", lambda: False)
    monkeypatch.chdir(tmp_path)
    images = [scene / "images" / name for name in NAMES[:2]]
    assert command(*images, "--focal", 300) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no weights for IMP with sift") and said.count("\n") == 1
    assert "make demo" in said and "--weights" in said and "--matching_method NN_ratio" in said
    assert not list(tmp_path.iterdir())
    assert command(*images, *RATIO) == 0  # which takes none


def test_what_is_not_installed_or_not_reached_is_one_line(scene, tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise OSError("no route to host")
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    images = [scene / "images" / name for name in NAMES[:2]]
    words = *images, "--matching_method", "LightGlue", "--save_path", tmp_path / "out"
    if importlib.util.find_spec("kornia"):
        for module in (pretrained, methods):
            monkeypatch.setattr(module, "find_pretrained", lambda file_name: None)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(socket, "getaddrinfo", fail)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before it is tried again
        assert command(*words) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("error: no weights ") and "no route to host" in said[-1]
        assert "put the file at weights/" in said[-1] and len(said) == 2
    monkeypatch.setitem(sys.modules, "kornia.feature", None)
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ALIKED, DISK and LightGlue need kornia: pip install") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# mistakes

@pytest.mark.parametrize("words, said", [
    (["a.png"], "one image, a.png, makes no pair"),
    (["a.png", "none.png"], "image not found: "),
    (["none.txt"], "file not found: none.txt"),
    (["empty"], "empty holds 0 images"),
    (["a.png", "empty"], "empty is a folder"),
    (["a.png", "b.png", "--image_dir", "empty"], "--image_dir goes with a list"),
    (["a.png", "b.png", "c.png", "--K0", "1", "1", "0", "0", "--K1", "1", "1", "0", "0"], "--K1 goes with two images"),
    (["bad.txt"], "bad.txt, line 3: 3 values; expected `image0 image1`"),
    (["list.txt", "--image_dir", "none"], "--image_dir: no such folder: none"),
    (["list.txt"], "none of the 2 pairs could be matched; the first reason: image not found: "),
    (["a.png", "a.png", "--weights", "none.pth"], "no checkpoint at none.pth"),
    (["a.png", "a.png", "--device", "foo"], "unknown device 'foo'"),
    (["a.png", "a.png", "--device", "cuda:99"], "device cuda:99: there are "),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "a.png", np.zeros((40, 40), np.uint8))
    (tmp_path / "list.txt").write_text("x.png y.png\ny.png z.png\n")
    (tmp_path / "bad.txt").write_text("a.png b.png\n# a comment\na.png b.png 1\n")
    options = () if "--weights" in words else RATIO
    assert command(*words, *options, "--save_path", "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "out").exists()


def test_results_do_not_go_to_a_file(scene, tmp_path, capsys):
    images = [scene / "images" / name for name in NAMES[:2]]
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        assert command(*images, *RATIO, "--save_path", path) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'file'} is a file, not a folder" in error and error.count("\n") == 1


@pytest.mark.parametrize("options", [
    ["--K1", "1", "1", "0", "0"], ["--K0", "0", "1", "0", "0"], ["--focal", "nan"], ["--focal", "-3"],
    ["--focal", "3", "--K0", "1", "1", "0", "0"], ["--resize", "0"], ["--seed", "-1"],
    ["--max_keypoints", "0"], ["--max_keypoints", "99999999999"], ["--draw_iterations", "--one_shot"],
    ["--draw_iterations", "--matching_method", "NN_ratio"], ["--matching_method", "none"]])
def test_options_that_do_not_go(options):
    with pytest.raises(SystemExit) as exit:
        match_images.main(["a.png", "b.png", *options])
    assert exit.value.code == 2


def test_settings_are_in_the_file(scene, tmp_path):
    images = [scene / "images" / name for name in NAMES[:2]]
    assert command(*images, *RATIO, "--estimator", "magsac", "--seed", 3, "--device", "auto", "--save_path",
                   tmp_path) == 0
    settings = json.loads(str(load(tmp_path / "a_sub-b.npz")["settings"]))
    assert settings["estimator"] == "magsac" and settings["seed"] == 3 and settings["matching_method"] == "NN_ratio"


# real people's folders

def test_results_beside_the_images_are_no_images(scene, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in NAMES[:2]:
        (folder / Path(name).name).write_bytes((scene / "images" / name).read_bytes())
    (folder / "more").symlink_to(folder)  # a loop
    images = match_images.find_images(folder)
    assert len(images) == 2
    for _ in range(2):
        assert command(folder, *RATIO, "--save_path", folder) == 0
        assert match_images.find_images(folder) == images


def test_a_folder_that_is_a_link_is_followed(scene, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(scene / "images")
    assert len(match_images.find_images(tmp_path / "photos")) == len(match_images.find_images(scene / "images")) > 1


def test_names_too_long_for_one_are_shortened():
    long = [Pair("a" * 200 + ".jpg", "é" * 100 + f"{number}.jpg") for number in range(3)]
    names = match_images.output_names(long)
    assert len(set(names)) == 3 and names == match_images.output_names(long)
    assert all(len(os.fsencode(f"{name}_iterations.png")) <= 255 for name in names)


def test_two_identical_images_determine_no_translation(scene, capsys):
    image = cv2.imread(str(scene / "images" / NAMES[0]), cv2.IMREAD_GRAYSCALE)
    found = match_images.match_images(image, image.copy(), CAMERAS[0], CAMERAS[0], matching_method="NN_ratio",
                                      feature_type="sift")
    assert found.R is not None and not found.translation_determined
    assert describe_pose(found).endswith("translation (not determined); a rotation alone explains the matches")
    found.T_0to1 = np.eye(4)  # a true pose judges the rotation: the translation is arbitrary
    assert "(not determined); 0.0 degrees off; a rotation alone" in describe_pose(found)
    found.translation_determined, found.planar = True, False
    found.rotation_uncertainty, found.direction_uncertainty = 1.0, 1.0
    assert describe_pose(found).endswith("; 0.0 and 0.0 degrees off") and found.knows_direction
    found.direction_uncertainty = 14.8
    assert found.verdict == "trusted" and found.knows_rotation and not found.knows_direction
    assert describe_pose(found).endswith("; the direction of the translation may be 15 degrees off")
    found.rotation_uncertainty = 11.4
    assert found.verdict == "doubtful" and not found.knows_rotation and not found.knows_direction
    assert describe_pose(found).endswith("off; the rotation may be 11 degrees off")
    assert [found.summary()[f"{name}_uncertainty"] for name in ("rotation", "direction")] == [11.4, 14.8]


@pytest.mark.parametrize("image, said", [
    (np.zeros((40, 50)), "float64"), (np.zeros((40, 50, 4), np.uint8), "uint8"), (np.zeros(40, np.uint8), "(40,)"),
    (np.zeros((0, 50), np.uint8), "(0, 50)"), (np.zeros((40, 50), bool), "bool")])
def test_arrays_that_are_no_images(image, said):
    with pytest.raises(InputError, match="an image is an array .*" + re.escape(said)):
        match_images.match_images(image, image, matching_method="NN_ratio", feature_type="sift")


@pytest.mark.parametrize("wrong", [[300, 300, 160, 120], np.diag([-1, 1, 1]), np.full((3, 3), np.nan), "K", np.eye(4)])
def test_what_is_no_camera_matrix(wrong):
    image = np.zeros((40, 50), np.uint8)
    with pytest.raises(InputError, match="K is not a camera matrix"):
        match_images.match_images(image, image, wrong, np.eye(3), matching_method="NN_ratio", feature_type="sift")


def test_a_backend_of_a_notebook_that_is_not_here_is_no_hindrance():
    subprocess.run([sys.executable, "-c", "import tools.visualize"], check=True, cwd=Path(__file__).parent.parent,
                   env={**os.environ, "MPLBACKEND": "module://not_here.backend"})
