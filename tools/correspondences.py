"""Two views with depth and pose -> which keypoints see the same point (docs/method.md, "Ground truth")."""
import numpy as np
from scipy.spatial import cKDTree

from tools.geometry import lift, project

# Reprojection error of a true match, at most, in pixels: in dumps and evaluation, as published; and in samples made on
# the fly, where keypoints are dense and what lies further away is mostly another one (docs/training.md).
INLIER_TH, ONLINE_INLIER_TH = 5.0, 3.0


def depth_at(depth: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """Depth map (H, W) read at the floor of each keypoint's coordinates; 0 outside the map. (N,) float32."""
    h, w = depth.shape
    x, y = np.floor(np.asarray(keypoints)).astype(np.int64).reshape(-1, 2).T
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    values = np.zeros(len(x), np.float32)
    values[inside] = depth[y[inside], x[inside]]
    return values


def reproject(keypoints: np.ndarray, depth: np.ndarray, K_from, pose_from, K_to, pose_to) -> np.ndarray:
    """Keypoints (N, 2) with depth (N,) of one view -> their place in another (N, 2); inf behind that camera.

    Keypoints in OpenCV's pixel convention, K in COLMAP's.
    """
    points = lift(keypoints + 0.5, depth, K_from, pose_from)
    pixels, depth_to = project(points, K_to, pose_to)
    return np.where(depth_to[:, None] > 0, pixels - 0.5, np.inf)


def match_by_projection(keypoints0, depth0, K0, pose0, keypoints1, depth1, K1, pose1,
                        inlier_th: float = INLIER_TH) -> np.ndarray:
    """True correspondences of two views with depth, one-to-one, sorted by index in view 0.

    keypoints0/1 (N, 2) pixels, OpenCV's convention; depth0/1 (N,), <= 0 = unknown; K0/1 (3, 3), COLMAP's convention;
    pose0/1 (4, 4) world-to-camera; inlier_th in pixels. Returns (M, 2) int32.
    """
    known0, known1 = np.flatnonzero(np.asarray(depth0) > 0), np.flatnonzero(np.asarray(depth1) > 0)
    if not len(known0) or not len(known1):
        return np.zeros((0, 2), np.int32)
    points0 = np.asarray(keypoints0, np.float64)[known0]
    points1 = np.asarray(keypoints1, np.float64)[known1]
    depth0, depth1 = np.asarray(depth0, np.float64)[known0], np.asarray(depth1, np.float64)[known1]

    landed = reproject(points0, depth0, K0, pose0, K1, pose1)
    visible = np.flatnonzero(np.isfinite(landed).all(axis=1))
    error, nearest = cKDTree(points1).query(landed[visible], distance_upper_bound=np.nextafter(inlier_th, np.inf))
    found = error <= inlier_th
    index0, index1, error = visible[found], nearest[found], error[found]

    back = reproject(points1[index1], depth1[index1], K1, pose1, K0, pose0)
    cycle = np.linalg.norm(back - points0[index0], axis=1) <= inlier_th
    index0, index1, error = index0[cycle], index1[cycle], error[cycle]

    # smallest error first, then the first claim of each keypoint of view 1 wins
    order = np.lexsort((index0, error))
    _, first = np.unique(index1[order], return_index=True)
    winners = np.sort(order[first])
    return np.stack([known0[index0[winners]], known1[index1[winners]]], axis=1).astype(np.int32)


def unmatched_by_projection(keypoints0, depth0, K0, pose0, keypoints1, K1, pose1, outlier_th: float) -> np.ndarray:
    """Which keypoints of view 0 have no true match in view 1 for certain, (N0,) bool.

    Those with depth that land further than outlier_th pixels from every keypoint of view 1, or behind its camera.
    Arguments as those of `match_by_projection`.
    """
    unmatched = np.asarray(depth0) > 0
    known = np.flatnonzero(unmatched)
    landed = reproject(np.asarray(keypoints0, np.float64)[known], np.asarray(depth0, np.float64)[known], K0, pose0, K1,
                       pose1)
    visible = np.isfinite(landed).all(axis=1)
    if len(keypoints1):
        distance, _ = cKDTree(np.asarray(keypoints1, np.float64)).query(
            landed[visible], distance_upper_bound=np.nextafter(outlier_th, np.inf))
        unmatched[known[visible]] = distance > outlier_th
    return unmatched
