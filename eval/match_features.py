"""Features of one's own of two images -> matches and relative pose."""
import functools

import numpy as np
import torch

from eval.image_matcher import choose_model
from eval.iterative import PairMatches
from eval.methods import MATCHERS, Matcher, MatcherSettings, Method, PoseEstimator, PoseSetting, to_data
from eval.pair_sets import EvalPair
from tools.cli import InputError
from tools.distributed import choose_device
from tools.features import FEATURE_TYPES, Features
from tools.pose import ESTIMATORS


def match_features(keypoints0, descriptors0, scores0, image_size0, keypoints1, descriptors1, scores1, image_size1,
                   K0=None, K1=None, *, feature_type: str = "sift", matching_method: str | None = None, weights=None,
                   estimator: str = "poselib", threshold: float = 1.0, one_shot: bool = False, seed: int = 0,
                   device: str = "auto") -> PairMatches:
    """Match two images by their features, iteratively if both K are given.

    keypoints0/1 (N, 2): pixels, (0, 0) is the centre of the top-left pixel; descriptors0/1 (N, D) of unit length (SIFT:
    as RootSIFT); scores0/1 (N,) or None: of the detector; image_size0/1: (w, h); K0, K1 (3, 3) or None. Arrays, tensors
    or lists. feature_type: what they are, a key of `tools.features.FEATURE_TYPES`. matching_method, weights, estimator,
    threshold, one_shot, seed, device: as those of `eval.image_matcher.ImageMatcher`; the matcher is loaded once.

    Returns the matches (M, 2), their scores (M,) and the pose: R (3, 3), t (3,) of unit length with x1 = R x0 + t, and
    inliers (M,) bool; None without both K or without enough matches. InputError names what does not fit.
    """
    for name, value, known in (("feature type", feature_type, FEATURE_TYPES), ("estimator", estimator, ESTIMATORS),
                               ("matching method", matching_method, [None, *MATCHERS])):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}: known are {', '.join(filter(None, known))}")
    features0 = _features("0", keypoints0, descriptors0, scores0, image_size0, feature_type)
    features1 = _features("1", keypoints1, descriptors1, scores1, image_size1, feature_type)
    pair = EvalPair(0, ("0", "1"), ("0", "1"), features0, features1, _camera("K0", K0), _camera("K1", K1))
    device = str(choose_device(device))
    matcher = load_method(matching_method, feature_type, weights and str(weights), device)
    has_cameras = pair.K0 is not None and pair.K1 is not None
    method = Method(matcher, iterative=matcher.iterates and has_cameras and not one_shot)
    (found,) = method.match(to_data(pair, device), [PoseEstimator(pair, PoseSetting(estimator, threshold, seed))])
    return found


@functools.lru_cache(maxsize=4)
def load_method(matching_method: str | None, feature_type: str, weights: str | None, device: str) -> Matcher:
    """A matcher for a feature type, loaded once; None: the best on hand, as `choose_model` says."""
    method, feature_type, weights = choose_model(matching_method, feature_type, weights)
    return MATCHERS[method](MatcherSettings(feature_type=feature_type, weights=weights, device=device))


def _array(name: str, value, dtype=np.float32) -> np.ndarray:
    try:
        return np.asarray(value.detach().cpu().double() if torch.is_tensor(value) else value, dtype)
    except (TypeError, ValueError):
        raise InputError(f"{name} is not an array of numbers") from None


def _features(view: str, keypoints, descriptors, scores, image_size, feature_type: str) -> Features:
    keypoints, descriptors = _array(f"keypoints{view}", keypoints), _array(f"descriptors{view}", descriptors)
    dim = FEATURE_TYPES[feature_type].dim
    if keypoints.ndim != 2 or descriptors.shape != (len(keypoints), dim):
        raise InputError(f"descriptors{view} of shape {descriptors.shape} and keypoints{view} of shape "
                         f"{keypoints.shape}: {feature_type} has (N, {dim}) and (N, 2)")
    scores = np.zeros(len(keypoints), np.float32) if scores is None else _array(f"scores{view}", scores)
    size = _array(f"image_size{view}", image_size, np.float64)
    if size.shape != (2,) or not np.isfinite(size).all():
        raise InputError(f"image_size{view} is {image_size}: expected (w, h)")
    lengths = np.linalg.norm(descriptors, axis=1)
    if len(lengths) and not 0.9 < np.median(lengths) < 1.1:
        raise InputError(f"descriptors{view} are not of unit length: divide each by its norm"
                         + (", after RootSIFT" if feature_type == "sift" else ""))
    return Features(keypoints, scores, descriptors, (int(size[0]), int(size[1])))


def _camera(name: str, K) -> np.ndarray | None:
    if K is None:
        return None
    K = _array(name, K, np.float64)
    if K.shape != (3, 3):
        raise InputError(f"{name} of shape {K.shape} is not a camera matrix (3, 3)")
    return K
