import sys
from importlib.util import find_spec

import cv2
import numpy as np
import poselib
import pytest
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from tools.cli import InputError
from tools.geometry import essential_matrix, make_pose, project, to_camera_coordinates
from tools.metrics import epipolar_error, pose_error
from tools.pose import (
    ESTIMATORS,
    HOMOGRAPHY_ESTIMATORS,
    PROSAC_ITERATIONS,
    PUBLISHED_ESTIMATOR,
    SYSTEMATIC_ERROR,
    estimate_homography,
    estimate_pose,
    pose_uncertainty,
    translation_is_determined,
)

METHODS = [pytest.param(name, marks=pytest.mark.skipif(name == "pycolmap" and not find_spec("pycolmap"),
                                                       reason="pycolmap is an optional extra")) for name in ESTIMATORS]
# two very different cameras: a mean of the two intrinsics would fit neither
K0 = np.array([[520.0, 0, 310], [0, 540, 255], [0, 0, 1]])
K1 = np.array([[1400.0, 0, 900], [0, 1380, 620], [0, 0, 1]])


def two_views(n=300, n_wrong=0, noise=0.0, seed=0):
    """Matched keypoints of points 3 to 9 m before two cameras, and T_0to1; the last n_wrong matches are wrong."""
    rng = np.random.default_rng(seed)
    T_0to1 = make_pose(Rotation.from_rotvec([4, -18, 6], degrees=True).as_matrix(), [1.2, 0.1, 0.3])
    points = np.c_[rng.uniform(-1.5, 1.5, (n, 2)), rng.uniform(3, 9, n)]
    keypoints0, _ = project(points, K0, np.eye(4))
    keypoints1, depth = project(points, K1, T_0to1)
    assert depth.min() > 0
    if n_wrong:
        keypoints1[-n_wrong:] = rng.uniform([0, 0], [1800, 1200], (n_wrong, 2))
    keypoints0 += rng.normal(0, noise, keypoints0.shape)
    keypoints1 += rng.normal(0, noise, keypoints1.shape)
    return keypoints0, keypoints1, T_0to1


@pytest.mark.parametrize("method", METHODS)
def test_exact_points_give_the_exact_pose(method):
    keypoints0, keypoints1, T_0to1 = two_views()
    R, t, inliers = estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, method)
    assert max(pose_error(T_0to1, R, t)) < 0.05
    assert np.linalg.norm(t) == pytest.approx(1) and t @ T_0to1[:3, 3] > 0
    assert np.linalg.det(R) == pytest.approx(1)
    assert inliers.shape == (300,) and inliers.dtype == bool and inliers.mean() > 0.98


@pytest.mark.parametrize("method", METHODS)
def test_wrong_matches_are_found_out(method):
    keypoints0, keypoints1, T_0to1 = two_views(n=400, n_wrong=200, noise=0.5)
    R, t, inliers = estimate_pose(keypoints0, keypoints1, K0, K1, 2.0, method)
    assert max(pose_error(T_0to1, R, t)) < 3
    # in their own order: the wrong ones are the last
    assert inliers[:200].mean() > 0.8 and inliers[200:].mean() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_the_same_arguments_give_the_same_pose(method):
    keypoints0, keypoints1, _ = two_views(n=200, n_wrong=120, noise=1.0)
    results = []
    for seed in (0, 0, 1):
        cv2.setRNGSeed(len(results) + 100)  # what else used OpenCV's generator must not matter
        results.append(estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, method, seed))
    for first, second in zip(results[0], results[1]):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(results[0][0], results[2][0])


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_modified(method):
    arguments = [*two_views(n=60, n_wrong=20)[:2], K0.copy(), K1.copy()]
    copies = [array.copy() for array in arguments]
    for array in arguments:
        array.setflags(write=False)
    estimate_pose(*arguments, 1.0, method)
    for array, copy in zip(arguments, copies):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("method", METHODS)
def test_four_points_give_no_pose_and_repeated_ones_no_error(method):
    keypoints0, keypoints1, _ = two_views(n=4)
    assert estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, method) is None
    assert estimate_pose(keypoints0[:0], keypoints1[:0], K0, K1, 1.0, method) is None
    same0, same1 = np.tile(keypoints0[:1], (20, 1)), np.tile(keypoints1[:1], (20, 1))
    result = estimate_pose(same0, same1, K0, K1, 1.0, method)
    assert result is None or np.isfinite(result[0]).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_minimal_number_of_points_may_have_several_solutions(method):
    # OpenCV then returns essential matrices stacked; whichever is chosen must hold for the points
    keypoints0, keypoints1, _ = two_views(n=5)
    result = estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, method)
    assert result is None or (result[0].shape == (3, 3) and result[1].shape == (3,) and result[2].shape == (5,))


@pytest.mark.parametrize("method", METHODS)
def test_the_threshold_is_in_pixels(method):
    # 4 px of noise: nearly all within 30 px, few within 0.5
    keypoints0, keypoints1, _ = two_views(n=200, noise=4.0)
    counts = [estimate_pose(keypoints0, keypoints1, K0, K1, threshold, method)[2].sum() for threshold in (0.5, 30)]
    assert counts[0] < 80 and counts[1] > 180


def test_magsac_works_in_pixels():
    # given camera coordinates, as is common, it finds a quarter of these poses instead of four fifths
    K = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])
    solved = 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        T_0to1 = make_pose(Rotation.from_rotvec(rng.normal(0, 12, 3), degrees=True).as_matrix(), rng.normal(0, 0.4, 3))
        points = np.c_[rng.uniform(-1.5, 1.5, (100, 2)), rng.uniform(3, 9, 100)]
        keypoints0, keypoints1 = (project(points, K, pose)[0] + rng.normal(0, 0.7, (100, 2))
                                  for pose in (np.eye(4), T_0to1))
        keypoints1[:60] = rng.uniform([0, 0], [640, 480], (60, 2))
        pose = estimate_pose(keypoints0, keypoints1, K, K, 1.5, "magsac")
        solved += pose is not None and max(pose_error(T_0to1, *pose[:2])) < 5
    assert solved >= 15


def test_estimators_get_camera_coordinates_and_the_mean_focal_length(monkeypatch):
    calls = []
    monkeypatch.setitem(ESTIMATORS, "mine", lambda *arguments: calls.append(arguments))
    keypoints0, keypoints1, T_0to1 = two_views(n=5)
    assert estimate_pose(keypoints0[:4], keypoints1[:4], K0, K1, 2.0, "mine") is None and not calls
    estimate_pose(keypoints0, keypoints1, K0, K1, 2.0, "mine", 7, "scores", quick=True)
    estimate_pose(keypoints0, keypoints1, K0, K1, 2.0, "mine", 7, "scores")
    (x0, x1, threshold, focal, seed, scores), (*_, no_scores) = calls
    np.testing.assert_allclose(epipolar_error(x0, x1, essential_matrix(T_0to1)), 0, atol=1e-12)
    np.testing.assert_allclose(x0[:, 0] * 520 + 310, keypoints0[:, 0])
    assert (threshold, seed, scores, no_scores) == (2.0, 7, "scores", None) and focal == (520 + 540 + 1400 + 1380) / 4


def test_a_quick_search_of_poselib_tries_strong_matches_first_and_not_for_long(monkeypatch):
    keypoints0, keypoints1, T_0to1 = two_views(n=30)
    rng = np.random.default_rng(0)
    wrong0, wrong1 = rng.uniform(0, 1000, (2, 570, 2))
    shuffled = rng.permutation(600)
    keypoints0 = np.concatenate([keypoints0, wrong0])[shuffled]
    keypoints1 = np.concatenate([keypoints1, wrong1])[shuffled]
    right = shuffled < 30
    scores = np.where(right, 0.9, 0.1)
    draws, found = [], poselib.estimate_relative_pose

    def watched(*arguments):
        pose, info = found(*arguments)
        draws.append(info["iterations"])
        return pose, info

    monkeypatch.setattr(poselib, "estimate_relative_pose", watched)
    R, t, inliers = estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, "poselib", 0, scores, quick=True)
    assert max(pose_error(T_0to1, R, t)) < 0.5 and inliers[right].all() and inliers[~right].mean() < 0.05
    R, t, _ = estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, "poselib", 0, 1 - scores, quick=True)
    assert max(pose_error(T_0to1, R, t)) > 5
    estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, "poselib", 0, scores)
    estimate_pose(keypoints0[right], keypoints1[right], K0, K1, 1.0, "poselib", 0, scores[right], quick=True)
    least, most = PROSAC_ITERATIONS
    assert draws[:2] == [most] * 2 and draws[2] > most and least <= draws[3] < most


def test_a_camera_that_turned_on_the_spot_has_its_rotation_by_pycolmap_too():
    pytest.importorskip("pycolmap")
    keypoints0, keypoints1, R = views_of(n_far=200, noise=0.5)
    found, t, inliers = estimate_pose(keypoints0, keypoints1, K0, K0, 2.0, "pycolmap")
    assert max(pose_error(make_pose(R, [0, 0, 0]), found, t)) < 0.5
    assert np.linalg.norm(t) == pytest.approx(1) and inliers.mean() > 0.9


def test_without_pycolmap_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(InputError, match=r"pip install '\.\[colmap\]'"):
        estimate_pose(*two_views(n=20)[:2], K0, K1, 1.0, "pycolmap")


H = np.array([[0.9, 0.15, 20.0], [-0.1, 1.1, 5.0], [1e-4, -2e-4, 1.0]])


def plane_matches(n=200, n_wrong=80, noise=0.5, seed=0):
    """Points (N, 2) and their matches by H, the last n_wrong of which are wrong."""
    rng = np.random.default_rng(seed)
    points0 = rng.uniform([0, 0], [640, 480], (n, 2))
    mapped = np.c_[points0, np.ones(n)] @ H.T
    points1 = mapped[:, :2] / mapped[:, 2:] + rng.normal(0, noise, (n, 2))
    points1[n - n_wrong:] = rng.uniform([0, 0], [640, 480], (n_wrong, 2))
    return points0, points1


@pytest.mark.parametrize("method", HOMOGRAPHY_ESTIMATORS)
def test_homographies_are_found_among_wrong_matches_and_alike_by_the_same_seed(method):
    points0, points1 = plane_matches()
    (found, inliers), again, other = (estimate_homography(points0, points1, 3.0, method, seed) for seed in (0, 0, 1))
    np.testing.assert_allclose(found / found[2, 2], H, atol=0.5, rtol=0.05)
    assert inliers[:120].mean() > 0.95 and inliers[120:].mean() < 0.1 and inliers.dtype == bool
    np.testing.assert_array_equal(found, again[0])
    assert other is not None
    few, many = (estimate_homography(*plane_matches(noise=4.0), threshold, method)[1].sum() for threshold in (0.5, 30))
    assert few < 40 and many >= 120


@pytest.mark.parametrize("method", HOMOGRAPHY_ESTIMATORS)
def test_too_few_or_repeated_points_give_no_homography_and_no_error(method):
    points0, points1 = plane_matches(n=4, n_wrong=0, noise=0)
    assert estimate_homography(points0[:3], points1[:3], 3.0, method) is None
    assert estimate_homography(points0, points1, 3.0, method) is not None
    found = estimate_homography(np.tile(points0[:1], (20, 1)), np.tile(points1[:1], (20, 1)), 3.0, method)
    assert found is None or np.isfinite(found[0]).all()


def test_published_program_counts_every_match_in_front_of_both_cameras():
    keypoints0, keypoints1, T_0to1 = two_views(n=300, n_wrong=100)
    R, t, inliers = estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, PUBLISHED_ESTIMATOR)
    ours = estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, "magsac")[2]
    assert max(pose_error(T_0to1, R, t)) < 0.1
    assert inliers[:200].all() and 20 < inliers[200:].sum() < 100 and ours[200:].sum() < 10
    # in front: both depths of the point between the two rays are positive
    P1 = np.c_[R, t]
    points = cv2.triangulatePoints(np.eye(3, 4), P1, *(to_camera_coordinates(k, K).T for k, K in
                                                       ((keypoints0, K0), (keypoints1, K1))))
    points = (points[:3] / points[3]).T
    agree = inliers == ((points[:, 2] > 0) & ((points @ R.T + t)[:, 2] > 0))
    assert agree.mean() > 0.95


def test_published_program_runs_1000_iterations(monkeypatch):
    seen = []
    find = cv2.findEssentialMat
    monkeypatch.setattr(cv2, "findEssentialMat", lambda *a, **k: (seen.append(k["maxIters"]), find(*a, **k))[1])
    keypoints0, keypoints1, _ = two_views()
    for method in (PUBLISHED_ESTIMATOR, "magsac"):
        estimate_pose(keypoints0, keypoints1, K0, K1, 1.0, method)
    assert seen == [1000, 5000]


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_translation_of_a_camera_that_turned_on_the_spot_is_not_determined(noise):
    keypoints0, _, T_0to1 = two_views(seed=1)
    R = T_0to1[:3, :3]
    rays = np.c_[to_camera_coordinates(keypoints0, K0), np.ones(300)] @ R.T
    keypoints1 = rays[:, :2] / rays[:, 2:] * [K1[0, 0], K1[1, 1]] + K1[:2, 2]
    keypoints1 += np.random.default_rng(0).normal(0, noise, keypoints1.shape)
    assert not translation_is_determined(keypoints0, keypoints1, K0, K1, R, 3.0)
    assert not translation_is_determined(keypoints0, keypoints0, K0, K0, np.eye(3), 3.0)
    keypoints0, keypoints1, T_0to1 = two_views(noise=noise)
    assert translation_is_determined(keypoints0, keypoints1, K0, K1, T_0to1[:3, :3], 3.0)
    assert not translation_is_determined(np.zeros((0, 2)), np.zeros((0, 2)), K0, K1, np.eye(3), 3.0)


def views_of(n_far=0, n_near=0, noise=0.0, t=(0.0, 0.0, 0.0), plane=False, seed=0):
    """Matches of points 10 km away and of near ones, 2 to 3 m away or on the plane z = 2, and the rotation between."""
    rng = np.random.default_rng(seed)
    keypoints0 = rng.uniform([0, 0], [640, 480], (n_far + n_near, 2))
    depth = np.r_[np.full(n_far, 1e4), np.full(n_near, 2.0) if plane else rng.uniform(2, 3, n_near)]
    T_0to1 = make_pose(Rotation.from_rotvec([4, -9, 6], degrees=True).as_matrix(), t)
    points = np.c_[to_camera_coordinates(keypoints0, K0), np.ones(len(depth))] * depth[:, None]
    keypoints1, _ = project(points, K0, T_0to1)
    return keypoints0 + rng.normal(0, noise, keypoints0.shape), keypoints1 + rng.normal(0, noise, keypoints1.shape), \
        T_0to1[:3, :3]


@pytest.mark.parametrize("determined, views", [
    (False, {"n_far": 300, "noise": 0.0}), (False, {"n_far": 300, "noise": 0.5}), (False, {"n_far": 300, "noise": 1.2}),
    (False, {"n_far": 2000, "noise": 1.0}), (False, {"n_far": 20, "noise": 0.5}),
    (False, {"n_near": 300, "noise": 0.5, "t": (0.001, 0, 0)}),  # a hand that trembles
    (True, {"n_far": 300, "n_near": 12, "noise": 0.5, "t": (0.1, 0, 0)}),
    (True, {"n_far": 300, "n_near": 12, "noise": 1.0, "t": (0.1, 0.02, 0.05)}),
    (False, {"n_far": 100, "n_near": 5, "noise": 0.5, "t": (0.1, 0, 0)}),  # as many as wrong matches may be
    (True, {"n_near": 300, "noise": 0.5, "t": (0.3, 0, 0)}), (True, {"n_near": 300, "noise": 0.5, "t": (0, 0, 0.3)}),
    (True, {"n_near": 300, "noise": 0.5, "t": (0.5, 0, 0), "plane": True}), (True, {"n_near": 7, "t": (0.5, 0, 0.2)}),
])
def test_a_translation_is_determined_by_what_no_rotation_explains(determined, views):
    for seed in range(5):
        keypoints0, keypoints1, R = views_of(**views, seed=seed)
        assert translation_is_determined(keypoints0, keypoints1, K0, K0, R, 1.0) is determined
        # whatever rotation the estimator gave where it may mix both up
        R = Rotation.from_rotvec([1, 3, -1], degrees=True).as_matrix() @ R
        assert translation_is_determined(keypoints0, keypoints1, K0, K0, R, 1.0) is determined


def refine(keypoints0, keypoints1, T_0to1):
    """Rotation vector and shift of t from a pose of unit baseline that minimise the Sampson errors in pixels; how much
    each depends on each error, (5, N); the errors before."""
    tangents = np.linalg.svd(T_0to1[:3, 3][None])[2][1:].T
    x0, x1 = (np.c_[keypoints, np.ones(len(keypoints))] for keypoints in (keypoints0, keypoints1))

    def errors(change):
        R = Rotation.from_rotvec(change[:3]).as_matrix() @ T_0to1[:3, :3]
        E = essential_matrix(make_pose(R, T_0to1[:3, 3] + tangents @ change[3:]))
        F = np.linalg.inv(K1).T @ E @ np.linalg.inv(K0)
        lines0, lines1 = x1 @ F, x0 @ F.T
        return np.sum(x1 * lines1, axis=1) / np.linalg.norm(np.c_[lines0[:, :2], lines1[:, :2]], axis=1)

    found = least_squares(errors, np.zeros(5), x_scale="jac")
    return found.x, np.linalg.pinv(found.jac), errors(np.zeros(5))


@pytest.mark.parametrize("baseline", [1.0, 0.05])
def test_uncertainty_is_what_the_worst_errors_do_to_a_pose(baseline):
    points = np.random.default_rng(0).uniform([-0.5, -0.5, 4], [0.5, 0.5, 6], (200, 3))
    R = Rotation.from_rotvec([4, -18, 6], degrees=True).as_matrix()
    T_0to1 = make_pose(R, baseline * np.array([0.96, 0, 0.28]))
    keypoints0, keypoints1 = project(points, K0, np.eye(4))[0], project(points, K1, T_0to1)[0]
    T_0to1[:3, 3] /= baseline
    _, inverse, _ = refine(keypoints0, keypoints1, T_0to1)
    uncertainty = pose_uncertainty(keypoints0, keypoints1, K0, K1, R, T_0to1[:3, 3])
    bounds = [np.linalg.norm(rows, 2) * SYSTEMATIC_ERROR * np.sqrt(200) for rows in (inverse[:3], inverse[3:])]
    np.testing.assert_allclose(uncertainty, np.degrees(bounds), rtol=1e-3)
    assert (uncertainty[1] > 10) is (baseline < 0.1)

    # across the line of each keypoint, small enough for the first order
    lines = np.c_[keypoints0, np.ones(200)] @ np.linalg.inv(K0).T @ essential_matrix(T_0to1).T @ np.linalg.inv(K1)
    across = lines[:, :2] / np.linalg.norm(lines[:, :2], axis=1, keepdims=True)
    unit = 1e3 * refine(keypoints0, keypoints1 + 1e-3 * across, T_0to1)[2]

    def turns(pattern):
        errors = SYSTEMATIC_ERROR * pattern / np.sqrt(np.mean(pattern ** 2)) / 1000
        change, _, _ = refine(keypoints0, keypoints1 + across * (errors / unit)[:, None], T_0to1)
        return 1000 * np.degrees([np.linalg.norm(change[:3]), np.linalg.norm(change[3:])])

    worst = [np.linalg.svd(rows)[2][0] for rows in (inverse[:3], inverse[3:])]
    np.testing.assert_allclose([turns(pattern)[i] for i, pattern in enumerate(worst)], uncertainty, rtol=0.02)
    rng = np.random.default_rng(1)
    for pattern in (*rng.normal(size=(5, 200)), np.sign(keypoints0[:, 0] - 310), (keypoints0[:, 1] - 255) / 100):
        assert np.all(turns(pattern) < uncertainty)


def test_uncertainty_of_a_direction_that_nothing_tells():
    keypoints0, keypoints1, R = views_of(n_far=300)
    assert pose_uncertainty(keypoints0[:4], keypoints1[:4], K0, K0, R, np.array([1.0, 0, 0])) == (180, 180)
    keypoints0[0] = K0[:2, 2]  # of a forward motion, on the epipole
    assert pose_uncertainty(keypoints0, keypoints1, K0, K0, R, np.array([1.0, 0, 0]))[1] == 180
    assert pose_uncertainty(keypoints0, keypoints0, K0, K0, np.eye(3), np.array([0, 0, 1.0]))[1] == 180
