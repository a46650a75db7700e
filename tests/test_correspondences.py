"""Ground-truth correspondences."""
from pathlib import Path

import numpy as np
import pytest

from tools.correspondences import depth_at, match_by_projection, unmatched_by_projection

GOLDEN = Path(__file__).parent / "golden" / "correspondences.npz"
K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])  # COLMAP's convention


def camera(x=0.0, z=0.0):
    pose = np.eye(4)
    pose[:3, 3] = -x, 0, -z
    return pose


def two_views(n, noise=1.0, seed=0, size=(640, 480)):
    """Arguments of match_by_projection: a slanted plane, view 1 turned and moved, keypoints of each with `noise`."""
    rng = np.random.default_rng(seed)
    pose0, pose1 = np.eye(4), np.eye(4)
    pose1[:3, :3] = [[np.cos(0.1), 0, np.sin(0.1)], [0, 1, 0], [-np.sin(0.1), 0, np.cos(0.1)]]
    pose1[:3, 3] = -0.3, 0.1, 0.2
    keypoints0 = rng.random((n, 2)) * size
    depth0 = 4 + keypoints0[:, 0] / size[0]
    points = np.c_[(keypoints0 + 0.5 - K[:2, 2]) / K[0, 0], np.ones(n)] * depth0[:, None]
    points = points @ pose1[:3, :3].T + pose1[:3, 3]
    keypoints1 = points[:, :2] / points[:, 2:] * K[0, 0] + K[:2, 2] - 0.5 + rng.normal(0, noise, (n, 2))
    depth0[rng.random(n) < 0.2] = 0
    depth1 = np.where(rng.random(n) < 0.2, 0, points[:, 2])
    return keypoints0, depth0, K, pose0, keypoints1, depth1, K, pose1


def by_brute_force(keypoints0, depth0, K0, pose0, keypoints1, depth1, K1, pose1, inlier_th=5.0):
    """docs/method.md, "Ground truth", step by step, with all N x N distances."""
    def moved(keypoints, depth, K_from, pose_from, K_to, pose_to):
        points = np.linalg.inv(K_from) @ np.r_[keypoints.T + 0.5, np.ones((1, len(keypoints)))] * depth
        points = pose_to @ np.linalg.inv(pose_from) @ np.r_[points, np.ones((1, len(keypoints)))]
        image = K_to @ points[:3]
        return np.where(image[2] > 0, image[:2] / np.where(image[2] == 0, 1, image[2]) - 0.5, 1e9).T

    landed0 = moved(keypoints0, depth0, K0, pose0, K1, pose1)
    landed1 = moved(keypoints1, depth1, K1, pose1, K0, pose0)
    distances = np.linalg.norm(landed0[:, None] - keypoints1[None], axis=2)
    distances[:, depth1 <= 0] = np.inf
    best = {}
    for i in np.flatnonzero(depth0 > 0):
        j = distances[i].argmin()
        error = distances[i, j]
        if error <= inlier_th and np.linalg.norm(landed1[j] - keypoints0[i]) <= inlier_th:
            if j not in best or error < best[j][0]:
                best[j] = (error, i)
    return {(int(i), int(j)) for j, (_, i) in best.items()}


def test_golden():
    golden = np.load(GOLDEN)
    views = [golden[f"{name}{v}"] for v in (0, 1) for name in ("keypoints", "depth", "K", "pose")]
    found = {tuple(match) for match in match_by_projection(*views, float(golden["inlier_th"])).tolist()}
    expected = {tuple(match) for match in golden["matches"].tolist()}
    assert len(found & expected) >= 0.95 * len(expected)
    assert len(found) <= len(expected) / 0.95


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_same_as_brute_force(noise):
    views = two_views(700, noise)
    matches = match_by_projection(*views)
    assert matches.dtype == np.int32 and matches.shape[1] == 2
    assert len(matches) > 100
    assert {tuple(match) for match in matches.tolist()} == by_brute_force(*views)
    assert (np.diff(matches[:, 0]) > 0).all()
    assert len(set(matches[:, 1].tolist())) == len(matches)


def test_smallest_error_wins():
    at = np.array([[100.0, 100.0]])
    keypoints0 = at + [[3.0, 0], [1.0, 0], [0, 2.0]]
    matches = match_by_projection(keypoints0, [4.0] * 3, K, camera(), at, [4.0], K, camera())
    assert matches.tolist() == [[1, 0]]


def test_threshold_is_inclusive():
    at = np.array([[100.0, 100.0]])
    for shift, n in ((4.99, 1), (5.01, 0)):
        assert len(match_by_projection(at, [4.0], K, camera(), at + [shift, 0], [4.0], K, camera())) == n


def test_behind_the_camera_has_no_match():
    """A point 4 m ahead is behind a camera that moved 8 m on, where its mirror image falls on the same pixel."""
    centre = np.array([[319.5, 239.5]])
    assert len(match_by_projection(centre, [4.0], K, camera(), centre, [4.0], K, camera())) == 1
    assert len(match_by_projection(centre, [4.0], K, camera(), centre, [4.0], K, camera(z=8))) == 0


def test_cycle_check_uses_the_other_depth():
    """The candidate is at the right place, but its own depth puts it elsewhere."""
    moved = np.array([[100.0, 100.0]]) - [500 * 0.4 / 4.0, 0]
    at = np.array([[100.0, 100.0]])
    assert len(match_by_projection(at, [4.0], K, camera(), moved, [4.0], K, camera(x=0.4))) == 1
    assert len(match_by_projection(at, [4.0], K, camera(), moved, [8.0], K, camera(x=0.4))) == 0


def test_nearest_is_among_keypoints_with_depth():
    at = np.array([[100.0, 100.0]])
    keypoints1 = np.concatenate([at, at + 1])
    assert match_by_projection(at, [4.0], K, camera(), keypoints1, [0, 4.0], K, camera()).tolist() == [[0, 1]]


def test_no_depth_no_keypoints():
    at = np.array([[100.0, 100.0]])
    for first, second in ((([0.0], at), ([4.0], at)), (([4.0], at), ([0.0], at)), (([], at[:0]), ([4.0], at))):
        matches = match_by_projection(first[1], first[0], K, camera(), second[1], second[0], K, camera())
        assert matches.shape == (0, 2)


def test_depth_at_floors_and_is_zero_outside():
    depth = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    keypoints = np.array([[0.9, 0.9], [1.0, 0.0], [2.99, 1.5], [-0.1, 0], [3.0, 0], [0, 2.0]])
    assert depth_at(depth, keypoints).tolist() == [1, 2, 6, 0, 0, 0]


def test_unmatched_keypoints_have_depth_and_land_far_from_all_others():
    keypoints0, depth0, K0, pose0, keypoints1, depth1, K1, pose1 = two_views(300, noise=4.0)
    keypoints1 = keypoints1[:200]
    unmatched = unmatched_by_projection(keypoints0, depth0, K0, pose0, keypoints1, K1, pose1, outlier_th=6.0)
    rays = np.c_[keypoints0 + 0.5, np.ones(300)] @ np.linalg.inv(K).T
    points = rays * depth0[:, None] @ pose1[:3, :3].T + pose1[:3, 3]
    landed = points[:, :2] / points[:, 2:] * K[0, 0] + K[:2, 2] - 0.5
    nearest = np.linalg.norm(landed[:, None] - keypoints1[None], axis=2).min(axis=1)
    np.testing.assert_array_equal(unmatched, (depth0 > 0) & (nearest > 6.0))
    assert 30 < unmatched.sum() < 150
    # true matches lie closer, whatever is within 6 px without being one is neither
    matched = match_by_projection(keypoints0, depth0, K0, pose0, keypoints1, depth1[:200], K1, pose1, 3.0)[:, 0]
    assert not unmatched[matched].any()
    assert len(matched) + unmatched.sum() < (depth0 > 0).sum() - 20


def test_what_lands_behind_the_other_camera_is_unmatched():
    keypoints = np.array([[320.0, 240.0], [300.0, 200.0]])
    unmatched = unmatched_by_projection(keypoints, np.array([1.0, 9.0]), K, camera(), keypoints[:1], K, camera(z=5.0),
                                        outlier_th=1e6)
    assert unmatched.tolist() == [True, False]
    assert unmatched_by_projection(keypoints, np.array([1.0, 0.0]), K, camera(), keypoints[:0], K, camera(),
                                   outlier_th=6.0).tolist() == [True, False]
