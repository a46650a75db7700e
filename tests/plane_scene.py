"""A tiny scene with exact truth for the dump tests: cameras that look at one textured plane."""
import cv2
import numpy as np

from tools.files import write_depth, write_image
from tools.geometry import opencv_to_colmap_K
from tools.scene_info import write_scene_info

SIZE = (320, 240)
K = np.array([[300.0, 0, 159.5], [0, 300, 119.5], [0, 0, 1]])  # OpenCV's convention
PLANE_Z = 4.0
TEXELS_PER_UNIT = 150.0
TEXTURE_SIDE = 1400


def texture(seed=0) -> np.ndarray:
    """Blobs of all sizes, (TEXTURE_SIDE, TEXTURE_SIDE) uint8."""
    rng = np.random.default_rng(seed)
    image = np.full((TEXTURE_SIDE, TEXTURE_SIDE), 128, np.uint8)
    for x, y, radius, value in zip(*rng.integers(0, TEXTURE_SIDE, (2, 4000)), rng.integers(3, 14, 4000),
                                   rng.integers(0, 255, 4000)):
        cv2.circle(image, (int(x), int(y)), int(radius), int(value), -1, cv2.LINE_AA)
    return cv2.GaussianBlur(image, (0, 0), 1.0)


def poses(n) -> list[np.ndarray]:
    """World-to-camera poses (4, 4): each camera is a little further along, and turned a little."""
    found = []
    for i in range(n):
        R, _ = cv2.Rodrigues(np.array([0.02 * i, -0.05 * i, 0.1 * i]))
        pose = np.eye(4)
        pose[:3, :3] = R
        pose[:3, 3] = -R @ [0.6 * i - 0.5, 0.1 * i, 0.15 * i]
        found.append(pose)
    return found


def plane_to_image(pose) -> np.ndarray:
    """Homography (3, 3) from the plane's (x, y) to pixels."""
    return K @ np.c_[pose[:3, :2], pose[:3, 2] * PLANE_Z + pose[:3, 3]]


def view(picture, pose) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W) uint8 and depth (H, W) float32 of a camera at `pose`."""
    w, h = SIZE
    to_plane = np.array([[1, 0, -TEXTURE_SIDE / 2], [0, 1, -TEXTURE_SIDE / 2], [0, 0, TEXELS_PER_UNIT]])
    image = cv2.warpPerspective(picture, plane_to_image(pose) @ to_plane, SIZE)
    rays = np.linalg.inv(K) @ np.stack([*np.mgrid[:h, :w][::-1], np.ones((h, w))]).reshape(3, -1)
    camera = -pose[:3, :3].T @ pose[:3, 3]
    depth = (PLANE_Z - camera[2]) / (pose[:3, :3].T @ rays)[2]
    return image, depth.reshape(h, w).astype(np.float32)


def transfer(keypoints, pose0, pose1) -> np.ndarray:
    """Where pixels (N, 2) of one view are in another, by the plane's homography (N, 2)."""
    H = plane_to_image(pose1) @ np.linalg.inv(plane_to_image(pose0))
    moved = np.c_[keypoints, np.ones(len(keypoints))] @ H.T
    return moved[:, :2] / moved[:, 2:]


def write_megadepth(root, scene="0000", n=4, overlap=0.5, seed=0) -> list[np.ndarray]:
    """A scene of n images in MegaDepth's layout, all overlapping by `overlap`; returns the poses."""
    picture, n_points = texture(seed), 30
    cameras = poses(n)
    image_paths = [f"Undistorted_SfM/{scene}/images/{i}.jpg" for i in range(n)]
    depth_paths = [f"phoenix/S6/zl548/MegaDepth_v1/{scene}/dense0/depths/{i}.h5" for i in range(n)]
    for image_path, depth_path, pose in zip(image_paths, depth_paths, cameras):
        image, depth = view(picture, pose)
        write_image(root / image_path, image)
        write_depth(root / depth_path, depth)
    points = {number: [0.0, 0.0] for number in range(n_points)}
    write_scene_info(root / "scene_info" / f"{scene}.0.npz", {
        "image_paths": image_paths, "depth_paths": depth_paths, "intrinsics": [opencv_to_colmap_K(K)] * n,
        "poses": cameras, "n_points3D": [n_points] * n, "points3D_id_to_2D": [points] * n,
        "points3D_id_to_ndepth": [dict.fromkeys(points, 1.0)] * n,
        "overlap_matrix": np.full((n, n), overlap), "scale_ratio_matrix": np.ones((n, n)), "angles": np.zeros((n, n)),
    })
    return cameras


def files_of(folder) -> dict[str, bytes]:
    """Every file under a folder: relative name -> content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
