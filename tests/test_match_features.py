"""Matching features that a caller brings, without images."""
import numpy as np
import pytest
import torch
from eval_scene import CAMERAS, POSES, list_set, make_pair, make_scene, write_warm_weights

from eval.match_features import match_features
from tools.cli import InputError
from tools.geometry import relative_pose
from tools.metrics import pose_error

VIEW = ("keypoints", "descriptors", "scores", "image_size")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_warm_weights(tmp_path_factory.mktemp("weights") / "warm.pth")


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Features of the two views of a pair, as arguments."""
    pair = list_set(make_scene(tmp_path_factory.mktemp("scene")), [make_pair(0, 1)])[0]
    return [getattr(features, name) for features in (pair.features0, pair.features1) for name in VIEW]


@pytest.mark.parametrize("method", ["EIMP", "NN_ratio"])
def test_matches_and_pose(method, views, weights):
    options = {"matching_method": method, "weights": weights if method == "EIMP" else None}
    found = match_features(*views, *CAMERAS[:2], **options)
    assert bool(found.steps) == (method == "EIMP")  # iterative
    R, t, inliers = found.pose
    assert max(pose_error(relative_pose(*POSES[:2]), R, t)) < 2
    assert len(found.matches) == len(found.scores) == len(inliers) and inliers.sum() > 50
    again = match_features(*(torch.as_tensor(value) for value in views), *map(torch.as_tensor, CAMERAS[:2]), **options)
    np.testing.assert_array_equal(again.matches, found.matches)
    once = match_features(*views, *CAMERAS[:2], one_shot=True, **options)
    assert not once.steps and once.pose is not None
    without = match_features(*views, CAMERAS[0], None, **options)
    assert not without.steps and without.pose is None
    np.testing.assert_array_equal(without.matches, once.matches)


def test_scores_may_be_missing_and_views_empty(views, weights):
    given = list(views)
    given[2] = given[6] = None
    assert len(match_features(*given, *CAMERAS[:2], weights=weights).matches) > 50
    given[4:7] = np.zeros((0, 2)), np.zeros((0, 128)), None
    found = match_features(*given, *CAMERAS[:2], weights=weights)
    assert found.matches.shape == (0, 2) and found.pose is None


@pytest.mark.parametrize("place, value, words", [
    (0, np.zeros((400, 3)), "keypoints0"), (0, "points", "keypoints0 is not an array of numbers"),
    (0, None, "keypoints0 of shape"), (0, np.full((400, 2), np.nan), "keypoints0: not finite"),
    (1, np.ones((400, 64)), r"sift has \(N, 128\)"), (4, np.zeros((3, 2)), "descriptors1"),
    (1, np.full((400, 128), 100.0), "descriptors0 are not of unit length"),
    (6, np.zeros(3), "scores1"), (7, (480, 640, 3), "image_size1"), (7, (0, 10), "image_size1"),
    (8, np.eye(4), "K0"), (9, np.zeros((3, 3)), "K1 is not a camera matrix")])
def test_what_does_not_fit_is_said(place, value, words, views):
    given = [*views, *CAMERAS[:2]]
    n = len(given[0])
    given[place] = value[:n] if isinstance(value, np.ndarray) and len(value) == 400 else value
    with pytest.raises(InputError, match=words):
        match_features(*given, matching_method="NN")


@pytest.mark.parametrize("option", ["feature_type", "matching_method", "estimator"])
def test_an_unknown_name_is_said(views, option):
    with pytest.raises(InputError, match=f"unknown {option.replace('_', ' ')} 'orb': known are .*[a-z]"):
        match_features(*views, **{option: "orb"})
