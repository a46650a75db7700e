import cv2
import numpy as np
import pytest

from tools.two_view import estimate_fundamental, homography_explains

K = np.array([[600, 0, 320], [0, 600, 240], [0, 0, 1.0]])
R = cv2.Rodrigues(np.deg2rad([3.0, 20, -5]))[0]
LINE = np.linspace(0, 500, 60)[:, None] * [1, 0.5] + [0, 3]


def see(depth, t, noise=0.5, wrong=0.2, n=300):
    """Matched pixels (N, 2) of points at `depth` (N,) in view 0, of which a share is wrong, and which ones (N,)."""
    rng = np.random.default_rng(0)
    points0 = rng.uniform([120, 0], [640, 480], (n, 2))
    rays = np.c_[points0, np.ones(n)] @ np.linalg.inv(K).T
    points1 = (rays * np.broadcast_to(depth, n)[:, None] @ R.T + t) @ K.T
    points1 = points1[:, :2] / points1[:, 2:]
    is_wrong = rng.random(n) < wrong
    points1[is_wrong] = rng.uniform(0, 480, (is_wrong.sum(), 2))
    return points0 + rng.normal(0, noise, (n, 2)), points1 + rng.normal(0, noise, (n, 2)), is_wrong


def test_a_fundamental_matrix_and_its_inliers():
    depth = np.random.default_rng(1).uniform(3, 6, 300)
    points0, points1, is_wrong = see(depth, [-1.0, 0.2, 0.1])
    F, inliers = estimate_fundamental(points0, points1, 1.5)
    assert inliers[~is_wrong].mean() > 0.9 and inliers[is_wrong].mean() < 0.1
    x, y, z = -1.0, 0.2, 0.1
    true = np.linalg.inv(K).T @ np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ R @ np.linalg.inv(K)
    lines = np.c_[points0, np.ones(300)][~is_wrong] @ (F / np.sign(np.sum(F * true))).T
    truth = np.c_[points0, np.ones(300)][~is_wrong] @ true.T
    normals, true_normals = (v[:, :2] / np.linalg.norm(v[:, :2], axis=1, keepdims=True) for v in (lines, truth))
    assert np.sum(normals * true_normals, axis=1).min() > 0.99
    assert not homography_explains(points0[inliers], points1[inliers], 1.5)
    again = estimate_fundamental(points0, points1, 1.5)
    np.testing.assert_array_equal(again[0], F)


@pytest.mark.parametrize("depth, t, explained", [
    (4.0, [-1.0, 0.2, 0.1], True),  # a plane
    (np.linspace(2, 9, 300), [0, 0, 0], True),  # a rotation
    (np.linspace(3.5, 4.5, 300), [-1.0, 0.2, 0.1], False),
    (np.where(np.arange(300) < 270, 4.0, 3.0), [-1.0, 0.2, 0.1], False)])  # a plane, and something before it
def test_planes_and_rotations_are_told_from_the_rest(depth, t, explained):
    points0, points1, _ = see(depth, t)
    _, inliers = estimate_fundamental(points0, points1, 1.5)
    assert homography_explains(points0[inliers], points1[inliers], 1.5) == explained


@pytest.mark.parametrize("points0, points1", [
    (LINE, LINE + 7), (LINE, LINE[::-1]), (LINE, np.random.default_rng(0).uniform(0, 400, LINE.shape)),
    (LINE * 0, LINE * 0), (LINE[:8], LINE[:8]), (see(4.0, [0, 0, 0])[0],) * 2])
def test_degenerate_points_are_explained(points0, points1):
    assert homography_explains(points0, points1, 1.0)
    found = estimate_fundamental(points0, points1, 1.0)
    assert found is None or found[1].shape == (len(points0),)


def test_too_few_points_have_no_fundamental_matrix():
    for n in range(8):
        assert estimate_fundamental(LINE[:n], LINE[:n], 1.0) is None
