"""Cameras, poses, projection and epipolar geometry, in NumPy.

Conventions: keypoints (x, y) in pixels with (0, 0) at the centre of the top-left pixel (OpenCV);
poses are 4x4 world-to-camera; T_0to1 = pose1 @ inv(pose0); x1^T E x0 = 0.
"""
import numpy as np


def is_camera_matrix(K: np.ndarray) -> bool:
    """Whether (3, 3) has positive focal lengths, the last row 0, 0, 1, an inverse, and values of a size that occurs."""
    K = np.asarray(K, np.float64)  # products of half precision overflow
    # a comparison with NaN is false
    return bool(np.abs(K).max() < 1e9 and min(K[0, 0], K[1, 1], K[0, 0] * K[1, 1] - K[0, 1] * K[1, 0]) > 1e-6
                and (K[2] == [0, 0, 1]).all())


def is_rigid(pose: np.ndarray) -> bool:
    """Whether (4, 4) is a rotation and a translation, to the precision of a text file."""
    pose = np.asarray(pose, np.float64)
    R = pose[:3, :3]
    # not allclose, which is slow: training comes here for every sample
    return bool(np.abs(pose).max() < 1e12 and np.abs(R @ R.T - np.eye(3)).max() < 1e-2 and np.linalg.det(R) > 0
                and np.abs(pose[3] - [0, 0, 0, 1]).max() < 1e-5)


def colmap_to_opencv_K(K: np.ndarray) -> np.ndarray:
    """Intrinsics for COLMAP's pixel convention (pixel centres at +0.5) -> the same camera in OpenCV's. (..., 3, 3)."""
    K = np.array(K, dtype=np.float64)
    K[..., :2, 2] -= 0.5
    return K


def opencv_to_colmap_K(K: np.ndarray) -> np.ndarray:
    """The inverse of `colmap_to_opencv_K`. (..., 3, 3)."""
    K = np.array(K, dtype=np.float64)
    K[..., :2, 2] += 0.5
    return K


def resize_K(K: np.ndarray, scale_x: float, scale_y: float) -> np.ndarray:
    """Intrinsics (3, 3), OpenCV's convention, of an image resized by (scale_x, scale_y)."""
    K = opencv_to_colmap_K(K)
    K[0] *= scale_x
    K[1] *= scale_y
    return colmap_to_opencv_K(K)


def resize_keypoints(keypoints: np.ndarray, scale_x: float, scale_y: float) -> np.ndarray:
    """Keypoints (N, 2) of an image, after the image is resized by (scale_x, scale_y). (N, 2)."""
    scale = np.array([scale_x, scale_y], dtype=np.float64)
    return (keypoints + 0.5) * scale - 0.5


def relative_pose(pose0: np.ndarray, pose1: np.ndarray) -> np.ndarray:
    """T_0to1 (4, 4) of two world-to-camera poses (4, 4)."""
    return np.asarray(pose1, dtype=np.float64) @ np.linalg.inv(np.asarray(pose0, dtype=np.float64))


def make_pose(R: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(3, 3) rotation and (3,) translation -> (4, 4)."""
    pose = np.eye(4)
    pose[:3, :3] = R
    pose[:3, 3] = np.ravel(t)
    return pose


def essential_matrix(T_0to1: np.ndarray) -> np.ndarray:
    """E = [t]_x R (3, 3) of a relative pose (4, 4)."""
    x, y, z = T_0to1[:3, 3]
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ T_0to1[:3, :3]


def to_camera_coordinates(keypoints: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Pixels (N, 2) -> normalised camera coordinates (N, 2), K (3, 3) in the pixels' convention, skew allowed."""
    rays = np.linalg.solve(np.asarray(K, np.float64), np.c_[keypoints, np.ones(len(keypoints))].T).T
    return rays[:, :2] / rays[:, 2:]


def to_rays(keypoints: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Pixels (N, 2) -> rays (N, 3) in the camera's frame, of z = 1."""
    return np.c_[to_camera_coordinates(keypoints, K), np.ones(len(keypoints))]


def lift(keypoints: np.ndarray, depth: np.ndarray, K: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Keypoints (N, 2) with depth (N,) -> world points (N, 3); K (3, 3) in the keypoints' convention."""
    points = to_rays(keypoints, K) * np.asarray(depth, np.float64)[:, None]
    return (points - pose[:3, 3]) @ pose[:3, :3]


def project(points: np.ndarray, K: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World points (N, 3) -> pixels (N, 2) in K's convention, and depth (N,).

    Pixels of points with depth <= 0 mean nothing; the caller looks at the depth.
    """
    camera = points @ pose[:3, :3].T + pose[:3, 3]
    image = camera @ np.asarray(K, np.float64).T
    depth = camera[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return image[:, :2] / depth[:, None], depth


def turn_K(K: np.ndarray, image_size: tuple[int, int], turns: int) -> np.ndarray:
    """Intrinsics (OpenCV's convention) after np.rot90(image, turns): `turns` times 90 degrees counter-clockwise.

    image_size is (w, h) before turning. A pixel (x, y) goes to (y, w - 1 - x) in one turn. (3, 3).
    """
    w, h = image_size
    K = np.array(K, dtype=np.float64)
    for _ in range(turns % 4):
        fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
        K = np.array([[fy, 0, cy], [0, fx, w - 1 - cx], [0, 0, 1.0]])
        w, h = h, w
    return K


def turn_pose(pose: np.ndarray, turns: int) -> np.ndarray:
    """World-to-camera pose (4, 4) of the camera whose image was turned by np.rot90(image, turns)."""
    quarter = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    return np.linalg.matrix_power(quarter, turns % 4) @ pose


def turn_keypoints(keypoints: np.ndarray, image_size: tuple[int, int], turns: int) -> np.ndarray:
    """Keypoints (N, 2) after np.rot90(image, turns); image_size is (w, h) before turning. (N, 2)."""
    w, h = image_size
    x, y = keypoints[:, 0], keypoints[:, 1]
    for _ in range(turns % 4):
        x, y = y, w - 1 - x
        w, h = h, w
    return np.stack([x, y], axis=1)
