"""Three images of two textured planes with exact poses and depth, for the tests of evaluation."""
import cv2
import h5py
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from eval.pair_sets import ListPairSet
from nets import build_matcher
from tools.checkpoint import save_checkpoint
from tools.features import Sift
from tools.files import write_depth, write_image
from tools.geometry import essential_matrix, make_pose, relative_pose
from tools.pair_list import Pair, write_pair_list
from training.start import warm_start

NAMES = ["a.png", "sub/b.png", "c.png"]
SIZES = [(320, 240), (400, 300), (320, 240)]
CAMERAS = [np.array([[f, 0, (w - 1) / 2], [0, f * 1.02, (h - 1) / 2], [0, 0, 1]])
           for f, (w, h) in zip((300.0, 420.0, 300.0), SIZES)]
POSES = [make_pose(Rotation.from_rotvec(turn, degrees=True).as_matrix(), t)
         for turn, t in (([0, 0, 0], [0, 0, 0]), ([2, 9, 4], [-0.7, 0.05, 0.1]), ([-6, 4, -8], [-0.3, -0.6, 0.2]))]
# two planes z = const, the nearer one in front of a part of the other
PLANES = [(5.0, (-6, 6, -5, 5)), (3.0, (-0.2, 1.6, -1.2, 1.4))]
TEXELS = 110  # per unit of length


def texture(rng, width, height):
    """Blobs of all sizes, uint8."""
    image = np.full((height, width), 128, np.uint8)
    for _ in range(width * height // 250):
        x, y, radius, value = rng.integers(0, [width, height, 14, 256])
        cv2.circle(image, (int(x), int(y)), int(3 + radius), int(value), -1, cv2.LINE_AA)
    return cv2.GaussianBlur(image, (0, 0), 1.0)


def render(textures, K, pose, size):
    """Image (H, W) uint8 and depth (H, W) of the planes."""
    w, h = size
    image, depth = np.zeros((h, w), np.uint8), np.zeros((h, w), np.float32)
    rays = np.linalg.inv(K) @ np.stack([*np.mgrid[:h, :w][::-1], np.ones((h, w))]).reshape(3, -1)
    for picture, (z, (left, _, top, _)) in zip(textures, PLANES):
        texel_to_plane = np.array([[1 / TEXELS, 0, left], [0, 1 / TEXELS, top], [0, 0, 1]])
        H = K @ np.c_[pose[:3, :2], pose[:3, 2] * z + pose[:3, 3]] @ texel_to_plane
        covered = cv2.warpPerspective(np.full_like(picture, 255), H, size) > 250
        image[covered] = cv2.warpPerspective(picture, H, size)[covered]
        plane_depth = (z + pose[:3, 2] @ pose[:3, 3]) / (pose[:3, 2] @ rays)
        depth[covered] = plane_depth.reshape(h, w)[covered]
    return image, depth


def make_scene(root):
    """Write images/, depths/ and pairs.txt, all three pairs of the three views."""
    rng = np.random.default_rng(0)
    textures = [texture(rng, round((right - left) * TEXELS), round((bottom - top) * TEXELS))
                for _, (left, right, top, bottom) in PLANES]
    for name, K, pose, size in zip(NAMES, CAMERAS, POSES, SIZES):
        image, depth = render(textures, K, pose, size)
        write_image(root / "images" / name, image)
        write_depth((root / "depths" / name).with_suffix(".h5"), depth)
    write_pair_list(root / "pairs.txt", [make_pair(0, 1), make_pair(1, 2), make_pair(0, 2)])
    return root


def make_pair(i, j):
    """The pair of views i and j, as a list has it."""
    return Pair(NAMES[i], NAMES[j], 0, 0, CAMERAS[i], CAMERAS[j], relative_pose(POSES[i], POSES[j]))


def list_set(scene, pairs, **options):
    """The set of some pairs of the scene, 400 keypoints an image."""
    return ListPairSet(pairs, scene / "images", Sift(400, 1e-5), **options)


def write_warm_weights(path):
    """Weights of a network of six iterations that starts as a nearest-neighbour matcher."""
    torch.manual_seed(0)
    network = build_matcher("eimp", descriptor_dim=128, n_layers=6, n_min_tokens=64)
    warm_start(network)
    save_checkpoint(path, {"model": network.state_dict(), "config": {"network": "eimp", "n_min_tokens": 64}})
    return path


def write_hdf5(path, pair_set, sizes=True, text=None, depth=True, numbers=(0, 1)):
    """The evaluation dump's format, from another set."""
    with h5py.File(path, "w") as file:
        for i, pair in zip(numbers, (pair_set[i] for i in range(len(pair_set)))):
            views = (("1", pair.features0, pair.K0, pair.depth0), ("2", pair.features1, pair.K1, pair.depth1))
            for view, features, K, at_keypoints in views:
                name = pair.names[int(view) - 1]
                file[f"img_path{view}/{i}"] = text(name) if text else name
                file[f"K{view}/{i}"] = K
                file[f"kpt{view}/{i}"] = np.c_[features.keypoints, features.scores]
                file[f"desc{view}/{i}"] = features.descriptors.astype(np.float16)
                if sizes:
                    file[f"size{view}/{i}"] = features.image_size
                if depth:
                    file[f"depth{view}/{i}"] = at_keypoints
            file[f"R/{i}"], file[f"T/{i}"] = pair.T_0to1[:3, :3], pair.T_0to1[:3, 3:]
            file[f"e/{i}"] = file[f"f/{i}"] = essential_matrix(pair.T_0to1)


def flat_pair(turned_camera: bool):
    """An image, what a camera sees of it that was moved, or turned on the spot, K of both, and T_0to1."""
    image = texture(np.random.default_rng(3), 400, 300)
    K = np.array([[350, 0, 199.5], [0, 350, 149.5], [0, 0, 1]])
    R, t = cv2.Rodrigues(np.deg2rad([2.0, 12, 3]))[0], np.array([-0.3, 0.05, 0.1]) * (not turned_camera)
    H = K @ (R + np.outer(t, [0, 0, 1])) @ np.linalg.inv(K)
    return image, cv2.warpPerspective(image, H, (400, 300), flags=cv2.INTER_CUBIC), K, make_pose(R, t)
