from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tools.geometry import essential_matrix, make_pose
from tools.metrics import bootstrap_interval, epipolar_error, pose_auc, pose_error, precision_at_recall

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")


def test_pose_errors_are_the_published_ones():
    errors = [pose_error(*pose) for pose in zip(GOLDEN["T_0to1"], GOLDEN["R"], GOLDEN["t"])]
    np.testing.assert_allclose(errors, GOLDEN["errors_t_R"], atol=1e-6)


def test_auc_is_the_published_one():
    np.testing.assert_allclose(pose_auc(GOLDEN["pose_errors"], GOLDEN["thresholds"]), GOLDEN["auc"], atol=1e-6)


def test_epipolar_errors_are_the_published_ones():
    errors = epipolar_error(GOLDEN["epi_x0"], GOLDEN["epi_x1"], GOLDEN["epi_E"])
    np.testing.assert_allclose(errors, GOLDEN["epi_error"], atol=1e-6)
    np.testing.assert_array_equal(errors < 5e-3, GOLDEN["epi_inlier_5e3"])


@pytest.mark.parametrize("degrees", [0, 1e-5, 0.3, 89, 179.9999])
def test_rotation_error_is_the_angle_turned_also_when_tiny(degrees):
    T_0to1 = make_pose(Rotation.from_rotvec([0.3, -0.2, 0.7]).as_matrix(), [1, 2, 3])
    turned = T_0to1[:3, :3] @ Rotation.from_rotvec([0, degrees, 0], degrees=True).as_matrix()
    assert pose_error(T_0to1, turned, [1, 2, 3])[1] == pytest.approx(degrees, abs=1e-6)


def test_translation_error_ignores_length_and_sign():
    T_0to1 = make_pose(np.eye(3), [2, 0, 0])
    tilted = np.array([np.cos(np.radians(10)), np.sin(np.radians(10)), 0])
    for t in (tilted, -5 * tilted, tilted[:, None]):
        assert pose_error(T_0to1, np.eye(3), t)[0] == pytest.approx(10)


def test_a_camera_that_only_turned_has_no_direction_to_miss():
    assert pose_error(make_pose(np.eye(3), [0, 0, 0]), np.eye(3), [0, 1, 0]) == (0, 0)


def test_auc_by_hand():
    # recall goes (0, 0) - (2.5, 1/2) - (5, 1/2): 0.625 + 1.25 of 5
    assert pose_auc([np.inf, 2.5], [5]) == pytest.approx([0.375])
    # (0, 0) - (0, 1/4) - (0, 1/2) - (4, 3/4) - (10, 3/4), up to 8
    assert pose_auc([0, 0, 4, 10], [8]) == pytest.approx([(4 * 0.625 + 4 * 0.75) / 8])
    assert pose_auc([0, 0], [5, 20]) == pytest.approx([1, 1])
    assert pose_auc([np.inf, 30], [5, 20]) == [0, 0]
    assert pose_auc([], [5]) == [0]


def test_bootstrap_interval_holds_the_value_and_narrows_with_more_pairs():
    errors = np.random.default_rng(0).exponential(8, 400)
    few, many = (bootstrap_interval(some, [5, 20], seed=1) for some in (errors[:40], errors))
    for (low, high), value in zip(many, pose_auc(errors, [5, 20])):
        assert low < value < high
    assert all(a[1] - a[0] > 2 * (b[1] - b[0]) for a, b in zip(few, many))
    assert many == bootstrap_interval(errors, [5, 20], seed=1) != bootstrap_interval(errors, [5, 20], seed=2)


def test_bootstrap_interval_of_runs_over_the_same_pairs():
    """They say no more about other pairs than one of them, but for what differs between them."""
    errors = np.random.default_rng(0).exponential(8, 60)
    once, twice = (bootstrap_interval(some, [5, 20], seed=1) for some in (errors, np.stack([errors, errors])))
    np.testing.assert_allclose(once, twice)
    other = bootstrap_interval(np.stack([errors, errors + 1]), [5, 20], seed=1)
    worse = bootstrap_interval(errors + 1, [5, 20], seed=1)
    for a, b, c in zip(once, other, worse):
        assert c[0] < b[0] < a[0] and c[1] < b[1] < a[1]


def test_bootstrap_interval_of_a_gain():
    """What both methods find hard cancels: the interval of the difference is narrower than either's."""
    errors = np.random.default_rng(0).exponential(8, 200)
    (alone,) = bootstrap_interval(errors, [20], seed=1)
    (low, high), = bootstrap_interval(errors, [20], seed=1, baseline=errors + 1)
    assert 0.02 < low < high < 0.05 and high - low < (alone[1] - alone[0]) / 4
    assert bootstrap_interval(errors, [20], seed=1, baseline=errors) == [(0, 0)]


def test_epipolar_error_is_a_distance_in_both_views():
    # a camera that moves along x: epipolar lines are the rows of both images
    E = essential_matrix(make_pose(np.eye(3), [1, 0, 0]))
    x0, x1 = np.array([[0.1, 0.2], [0.3, -0.4]]), np.array([[0.5, 0.2], [0.3, -0.37]])
    np.testing.assert_allclose(epipolar_error(x0, x1, E), [0, 0.03], atol=1e-12)


def test_a_point_on_its_epipole_has_no_finite_error():
    forward = essential_matrix(make_pose(np.eye(3), [0, 0, 1]))
    assert epipolar_error(np.zeros((1, 2)), np.zeros((1, 2)), forward) == [np.inf]


def test_precision_at_recall_by_hand():
    scores, correct = [0.6, 0.9, 0.7, 0.8], [True, True, True, False]
    assert precision_at_recall(scores, correct, 4, 0.25) == 1
    assert precision_at_recall(scores, correct, 4, 0.5) == pytest.approx(2 / 3)
    assert precision_at_recall(scores, correct, 4, 0.75) == pytest.approx(3 / 4)
    assert precision_at_recall(scores, correct, 4, 1.0) is None
    assert precision_at_recall(scores, correct, 0, 0.0) is None
    assert precision_at_recall([], [], 4, 0.5) is None


def test_matches_of_equal_score_stand_or_fall_together():
    assert precision_at_recall([0.5] * 4, [True, True, False, False], 4, 0.25) == pytest.approx(0.5)


def test_a_recall_computed_elsewhere_is_reached_by_its_own_threshold():
    # 3 / 49 * 49 is not 3 in floating point for many such pairs of numbers
    for n_true in range(3, 300):
        assert precision_at_recall([3, 2, 1], [True] * 3, n_true, 3 / n_true) == 1
