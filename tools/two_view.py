"""Two views of which the cameras are not known, or whose matches lie on a plane: robust estimators by PoseLib."""
import numpy as np
import poselib

from tools.pose import CONFIDENCE, stand_out

MAX_ITERATIONS = 10_000  # PoseLib's 100,000 take seconds where most matches are wrong


def estimate_fundamental(points0, points1, threshold: float, seed: int = 0):
    """F (3, 3) with x1^T F x0 = 0 for matched points (N, 2) in pixels, and its inliers (N,) bool; None without one.

    threshold: epipolar error of an inlier in pixels, at most.
    """
    options = {"max_epipolar_error": threshold, "success_prob": CONFIDENCE, "max_iterations": MAX_ITERATIONS,
               "seed": seed}
    return _estimate(poselib.estimate_fundamental, points0, points1, options, 8)


def homography_explains(points0, points1, threshold: float, seed: int = 0) -> bool:
    """Whether one homography maps points (N, 2) to their matches, up to noise and a few outliers: they lie on a plane
    or a line, or the camera turned on the spot, and say little or nothing of the epipolar lines.

    threshold: of the inliers that they are, in pixels.
    """
    if len(points0) < 8 or min(_width(points0), _width(points1)) < 2 * threshold:
        return True
    options = {"max_reproj_error": 3 * threshold, "success_prob": CONFIDENCE, "max_iterations": MAX_ITERATIONS,
               "seed": seed}
    found = _estimate(poselib.estimate_homography, points0, points1, options, 4)
    if found is None:
        return False
    mapped = np.c_[points0, np.ones(len(points0))] @ found[0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.linalg.norm(mapped[:, :2] / mapped[:, 2:] - points1, axis=1)
    return not stand_out(np.nan_to_num(left, nan=np.inf), threshold)


def _width(points) -> float:
    """Standard deviation of points (N, 2) across the line through them."""
    return float(np.linalg.svd(points - np.mean(points, axis=0), compute_uv=False)[-1] / np.sqrt(len(points)))


def _estimate(estimate, points0, points1, options: dict, least: int):
    if len(points0) < least:
        return None
    matrix, info = estimate(np.asarray(points0, np.float64), np.asarray(points1, np.float64), options)
    inliers = np.array(info["inliers"], bool)
    if inliers.sum() < least or not np.isfinite(matrix).all() or not matrix.any():
        return None
    return matrix / np.linalg.norm(matrix), inliers
