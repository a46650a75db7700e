"""Relative pose from matches: robust estimators behind one function."""
import time

import cv2
import numpy as np
import poselib

from tools.extras import import_pycolmap
from tools.geometry import to_camera_coordinates, to_rays

CONFIDENCE = 0.99999
# Instead of OpenCV's default of 1000: where half of the matches are right, confidence ends the search before either;
# where a fifth are, 1000 draws found 40% of synthetic poses, 5000 found 72%, and 10000 no more.
MAGSAC_ITERATIONS = 5000
RANSAC_ITERATIONS = 1000  # the default: each takes ten times as long, and more were measured to add nothing

# PoseLib draws up to 100,000 from all matches alike, which takes seconds where most are wrong. Strong matches first, a
# hundredth of that was measured to give poses as good.
# At least 100, instead of PoseLib's 1000, takes a fifth of the time where most matches are right, at the same AUC.
PROSAC_ITERATIONS = 100, 1000  # at least, at most

# How many inliers no rotation may explain before there is a translation. At 3 standard deviations, photographs turned
# on the spot had up to 1.4%, hand-held video up to 1.7% with a baseline of 1 to 5 mm, and 60% and up from 3 cm.
PARALLAX_POINTS, PARALLAX_SHARE = 8, 0.02
ROTATION_STEPS = 10

# Errors of inliers in pixels (root mean square) that do not average out, however many they are: rolling shutter, lens,
# features that lean the same way. Of pairs of a hand-held video, 98% have less by SIFT, 79% by ALIKED.
SYSTEMATIC_ERROR = 0.8


def estimate_pose(keypoints0, keypoints1, K0, K1, threshold: float, method: str = "magsac", seed: int = 0,
                  scores=None, quick: bool = False):
    """Pose of camera 1 relative to camera 0 from matched keypoints, or None when there is none.

    keypoints0/1: (N, 2) pixels, row i of one matches row i of the other; K0/1: (3, 3) in the same pixel convention;
    threshold: epipolar error of an inlier in pixels, at most; method: of ESTIMATORS, or PUBLISHED_ESTIMATOR; quick: a
    quick search, which draws matches of high scores (N,) first (PROSAC: Chum and Matas, CVPR 2005), PROSAC_ITERATIONS
    samples; OpenCV and COLMAP have none and search as always.
    Returns R (3, 3), t (3,) of unit length, and inliers (N,) bool. The same arguments give the same result; none of
    them is modified.
    """
    if len(keypoints0) < 5:
        return None
    x0, x1 = to_camera_coordinates(keypoints0, K0), to_camera_coordinates(keypoints1, K1)
    # the threshold in camera coordinates is threshold / focal, by the mean of all four focal lengths, as published
    focal = float(np.mean([K0[0][0], K0[1][1], K1[0][0], K1[1][1]]))
    estimator = _published if method == PUBLISHED_ESTIMATOR else ESTIMATORS[method]
    return estimator(x0, x1, threshold, focal, seed, scores if quick else None)


def estimate_homography(points0, points1, threshold: float, method: str = "magsac", seed: int = 0):
    """Homography from matched points (N, 2) in pixels: H (3, 3) with x1 ~ H x0, and inliers (N,) bool; None without.

    threshold: reprojection error of an inlier in pixels, at most; method: of HOMOGRAPHY_ESTIMATORS. The same arguments
    give the same result.
    """
    if len(points0) < 4:
        return None
    points0, points1 = np.asarray(points0, np.float64), np.asarray(points1, np.float64)
    H, inliers = HOMOGRAPHY_ESTIMATORS[method](points0, points1, threshold, seed)
    if H is None or not np.isfinite(H).all() or not inliers.any():
        return None
    return H, inliers


def timed(function, *arguments) -> tuple:
    """What function(*arguments) returns, and how many seconds it took."""
    start = time.perf_counter()
    found = function(*arguments)
    return found, time.perf_counter() - start


def _opencv(flag: int, max_iterations: int, published: bool = False):
    """An estimator that calls cv2.findEssentialMat with the method `flag`.

    published: as the published program, count each match in front of both cameras as an inlier, however far from its
    epipolar line: it tested `mask >= 0`.
    """

    def estimate(x0, x1, threshold, focal, seed, quick_scores):
        # OpenCV's estimators start their own generators alike at each call: what a seed can change is the points' order
        order = np.random.default_rng(seed).permutation(len(x0))
        x0, x1 = x0[order], x1[order]
        # MAGSAC++ holds constants in pixels: given camera coordinates and an identity K, as is common, it falls far
        # behind (200 indoor pairs at 3 px: AUC@10 16 instead of 31). So both views are put into one ideal camera.
        K = np.diag([focal, focal, 1.0])
        try:
            found, mask = cv2.findEssentialMat(x0 * focal, x1 * focal, K, method=flag, prob=CONFIDENCE,
                                               threshold=threshold, maxIters=max_iterations)
        except cv2.error:  # all points the same, and other degenerate input
            return None
        if found is None or not np.isfinite(found).all():
            return None
        best_count, best = 0, None
        for E in np.split(found, len(found) // 3):  # some methods return every solution of the minimal problem, stacked
            # the last number is how far a point may be, in units of the baseline: as far as it likes
            count, R, t, in_front, _ = cv2.recoverPose(E, x0, x1, np.eye(3), distanceThresh=1e9, mask=mask.copy())
            if count > best_count:
                inliers = np.zeros(len(x0), bool)
                inliers[order] = in_front.ravel() > 0
                best_count, best = count, (R, t.ravel(), inliers)
        if published and best is not None:
            inverse = np.empty_like(order)
            inverse[order] = np.arange(len(order))
            best = *best[:2], _in_front(x0[inverse], x1[inverse], *best[:2])
        return best

    return estimate


def _in_front(x0, x1, R, t) -> np.ndarray:
    """Which matches (N,) lie in front of both cameras: the depths d0, d1 with the least |d0 R x0 + t - d1 x1|."""
    a, b = np.c_[x0, np.ones(len(x0))] @ R.T, np.c_[x1, np.ones(len(x1))]
    aa, bb, ab, at, bt = (np.sum(u * v, axis=1) for u, v in ((a, a), (b, b), (a, b), (a, t), (b, t)))
    return (ab * bt - at * bb > 0) & (aa * bt - ab * at > 0)


def translation_is_determined(points0, points1, K0, K1, R, threshold: float) -> bool:
    """Whether inliers (N, 2) in pixels say where camera 1 is, or just how it is turned: too many of them are far from
    where the best rotation alone would put them.

    R (3, 3): the rotation of their pose; threshold: of inliers, in pixels. Two identical images, or a camera that
    turned on the spot, have a pose with an arbitrary translation; a few near points in front of a far background are
    enough for a true one.
    """
    rays0, rays1 = (rays / np.linalg.norm(rays, axis=1, keepdims=True)
                    for rays in (to_rays(points0, K0), to_rays(points1, K1)))
    focal = np.array([K1[0][0], K1[1][1]])

    def distances(R):
        turned = rays0 @ np.asarray(R).T
        in_front = turned[:, 2] > 1e-9
        turned = turned / np.where(in_front, turned[:, 2], 1)[:, None]
        pixels = np.linalg.norm((turned - rays1 / rays1[:, 2:])[:, :2] * focal, axis=1)
        return np.where(in_front, pixels, np.inf)

    for _ in range(ROTATION_STEPS):
        # least squares up to the threshold, absolute values above: near points do not draw a far background along
        weights = 1 / np.maximum(distances(R), threshold)
        U, _, Vt = np.linalg.svd((rays1 * weights[:, None]).T @ rays0)
        R = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
    return stand_out(distances(R), threshold)


def pose_uncertainty(points0, points1, K0, K1, R, t) -> tuple[float, float]:
    """How far the rotation, and the direction of the translation, may be off, in degrees: the most that errors of
    SYSTEMATIC_ERROR pixels, root mean square, turn them, whatever their pattern.

    points0/1 (N, 2): inliers in pixels; R (3, 3), t (3,) of unit length: their pose. To first order: least squares of
    Sampson errors (Hartley and Zisserman, Multiple View Geometry, 11.4) over rotation and direction. Of fewer than five
    inliers, 180 both.
    """
    if len(points0) < 5:
        return 180.0, 180.0
    x0, x1 = to_rays(points0, K0), to_rays(points1, K1)
    turned = x0 @ np.asarray(R).T
    line0, line1 = np.cross(x1, t) @ R, np.cross(t, turned)
    focal0, focal1 = ([K[0][0], K[1][1]] for K in (K0, K1))
    slope = np.linalg.norm(np.c_[line0[:, :2] / focal0, line1[:, :2] / focal1], axis=1)
    slope = np.maximum(slope, 1e-12)  # a point on its epipole tells nothing
    tangents = np.linalg.svd(np.reshape(t, (1, 3)))[2][1:].T
    of_rotation = np.cross(turned, np.cross(x1, t)) / slope[:, None]
    of_direction = np.cross(turned, x1) @ tangents / slope[:, None]

    def most(jacobian, other):
        # what the other cannot make up for: |turn| <= |errors| / the least singular value
        n = other.shape[1]
        left = np.linalg.qr(np.c_[other, jacobian], mode="r")[n:, n:]
        least = np.linalg.svd(left, compute_uv=False)[-1]
        return float(min(180.0, np.degrees(SYSTEMATIC_ERROR * np.sqrt(len(x0)) / max(least, 1e-12))))

    return most(of_rotation, of_direction), most(of_direction, of_rotation)


def stand_out(left: np.ndarray, threshold: float) -> bool:
    """Whether too many of inliers' distances (N,) in pixels from a simpler model are more than noise.

    threshold: of inliers, in pixels.
    """
    # of noise, half are within 1.18 standard deviations and 0.2% beyond 3.5; along an epipolar line it may be larger
    # than what makes an inlier, but not much
    noise = np.clip(np.median(left) / 1.18, threshold, 2 * threshold) if len(left) else threshold
    needed = max(min(PARALLAX_POINTS, len(left) / 2), PARALLAX_SHARE * len(left))
    return bool(np.sum(left > 3.5 * noise) >= needed > 0)


def _poselib(x0, x1, threshold, focal, seed, quick_scores):
    """LO-RANSAC with non-linear refinement; its minimal solver checks cheirality."""
    camera = {"model": "SIMPLE_PINHOLE", "width": 0, "height": 0, "params": [focal, 0.0, 0.0]}
    options = {"max_epipolar_error": threshold, "success_prob": CONFIDENCE, "seed": seed}
    order = np.arange(len(x0))
    if quick_scores is not None:
        order = np.argsort(-np.asarray(quick_scores), kind="stable")
        options |= {"progressive_sampling": True, "min_iterations": PROSAC_ITERATIONS[0],
                    "max_iterations": PROSAC_ITERATIONS[1]}
    pose, info = poselib.estimate_relative_pose(x0[order] * focal, x1[order] * focal, camera, camera, options)
    length = np.linalg.norm(pose.t)
    if not info["num_inliers"] or not np.isfinite(pose.R).all() or not length > 0:
        return None
    inliers = np.zeros(len(x0), bool)
    inliers[order] = info["inliers"]
    return pose.R, pose.t / length, inliers


def _pycolmap(x0, x1, threshold, focal, seed, quick_scores):
    """COLMAP's geometric verification: LO-RANSAC for an essential matrix and a homography, of which it takes one."""
    pycolmap = import_pycolmap()
    camera = pycolmap.Camera(model="SIMPLE_PINHOLE", width=1, height=1, params=[focal, 0, 0])
    options = pycolmap.TwoViewGeometryOptions(min_num_inliers=5, detect_watermark=False, compute_relative_pose=True)
    options.ransac.mergedict({"max_error": threshold, "confidence": CONFIDENCE, "random_seed": seed})
    matches = np.arange(len(x0), dtype=np.uint32)[:, None].repeat(2, axis=1)
    found = pycolmap.estimate_calibrated_two_view_geometry(camera, x0 * focal, camera, x1 * focal, matches, options)
    if found.cam2_from_cam1 is None or not len(found.inlier_matches):
        return None
    R, t = found.cam2_from_cam1.rotation.matrix(), found.cam2_from_cam1.translation
    length = np.linalg.norm(t)
    inliers = np.zeros(len(x0), bool)
    inliers[found.inlier_matches[:, 0]] = True
    # a camera that turned on the spot has no translation here; the other estimators give an arbitrary one
    return R, t / length if length > 0 else np.array([0.0, 0.0, 1.0]), inliers


ESTIMATORS = {
    "magsac": _opencv(cv2.USAC_MAGSAC, MAGSAC_ITERATIONS),
    "ransac": _opencv(cv2.RANSAC, RANSAC_ITERATIONS),
    "poselib": _poselib,
    "pycolmap": _pycolmap,
}
PUBLISHED_ESTIMATOR = "magsac_published"  # of the published program, with OpenCV's default of iterations
_published = _opencv(cv2.USAC_MAGSAC, 1000, published=True)


def _opencv_homography(flag: int, max_iterations: int):
    def estimate(points0, points1, threshold, seed):
        order = np.random.default_rng(seed).permutation(len(points0))
        try:
            H, mask = cv2.findHomography(points0[order], points1[order], flag, threshold, maxIters=max_iterations,
                                         confidence=CONFIDENCE)
        except cv2.error:  # degenerate input
            return None, None
        inliers = np.zeros(len(points0), bool)
        if mask is not None:
            inliers[order] = mask.ravel() > 0
        return H, inliers

    return estimate


def _poselib_homography(points0, points1, threshold, seed):
    options = {"max_reproj_error": threshold, "success_prob": CONFIDENCE, "seed": seed}
    H, info = poselib.estimate_homography(points0, points1, options)
    return H, np.array(info["inliers"], bool)


HOMOGRAPHY_ESTIMATORS = {
    "magsac": _opencv_homography(cv2.USAC_MAGSAC, MAGSAC_ITERATIONS),
    "ransac": _opencv_homography(cv2.RANSAC, RANSAC_ITERATIONS),
    "poselib": _poselib_homography,
}
