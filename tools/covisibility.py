"""Which images of a scene see the same surface, from their depth maps: the fields of a scene_info file."""
import numpy as np
from scipy.sparse import csc_matrix
from tqdm import tqdm

from tools.geometry import lift, project

N_SAMPLES = 2400  # pixels of each depth map that stand for its surface
DEPTH_TOLERANCE = 0.05  # of the depth: a larger difference means that something else is seen there
VOXELS_PER_DEPTH = 50  # voxel size = median depth / this, about the spacing of the samples
MAX_POINTS = 2000  # 3D points kept per image
# Points projected at a time: few enough that they stay in the cache, and that BLAS starts no threads for products
# with 3x3 matrices, which would make them many times slower.
CHUNK = 16384


def scene_info_from_depth(image_paths, depth_paths, intrinsics, poses, read_depth, progress=True) -> dict:
    """The dict that `tools.scene_info.write_scene_info` takes, for n images with depth.

    image_paths, depth_paths: n paths relative to the root. intrinsics: n (3, 3), COLMAP's pixel convention. poses: n
    (4, 4) world-to-camera. read_depth: image index -> depth map (H, W), 0 = unknown, in the unit of the poses; it is
    called twice per image, and one map is held at a time. progress: show bars.

    `overlap_matrix[i, j]` is the share of i's samples (`sample_depth`) that image j sees (`is_seen`), 1 on the
    diagonal, -1 elsewhere in row and column of an image without depth. The 3D points are one sample per voxel of the
    scene; an image that sees more than MAX_POINTS keeps those of lowest id, whose order is random, hence the same ones
    as its neighbours. `points3D_id_to_2D` is in COLMAP's pixel convention, `scale_ratio_matrix` -1 for pairs without a
    shared 3D point.
    """
    n = len(image_paths)
    intrinsics, poses = ([np.asarray(matrix, np.float64) for matrix in matrices] for matrices in (intrinsics, poses))

    points, depths = [], []
    for i in tqdm(range(n), desc="depth samples", unit="image", disable=not progress):
        pixels, depth = sample_depth(read_depth(i))
        points.append(lift(pixels, depth, intrinsics[i], poses[i]))
        depths.append(depth)
    n_samples = np.array([len(depth) for depth in depths])
    owner = np.repeat(np.arange(n), n_samples)
    points, depths = np.concatenate(points), np.concatenate(depths)
    voxel_size = np.median(depths) / VOXELS_PER_DEPTH if len(depths) else 1.0
    _, representatives = np.unique(np.floor(points / voxel_size).astype(np.int64), axis=0, return_index=True)
    representatives = np.random.default_rng(0).permutation(representatives)

    overlap = np.zeros((n, n))
    point_ids, point_pixels, point_ndepths = [], [], []
    for j in tqdm(range(n), desc="covisibility", unit="image", disable=not progress):
        depth_map = read_depth(j)
        seen = np.concatenate([is_seen(points[start:start + CHUNK], depth_map, intrinsics[j], poses[j])
                               for start in range(0, max(len(points), 1), CHUNK)])
        overlap[:, j] = np.bincount(owner[seen], minlength=n) / np.maximum(n_samples, 1)
        ids = np.flatnonzero(seen[representatives])[:MAX_POINTS]
        pixels, depth = project(points[representatives[ids]], intrinsics[j], poses[j])
        point_ids.append(ids)
        point_pixels.append(pixels)
        point_ndepths.append(depth / (intrinsics[j][0, 0] + intrinsics[j][1, 1]) * 2)
    overlap[n_samples == 0] = -1
    overlap[:, n_samples == 0] = -1
    np.fill_diagonal(overlap, 1)

    def by_id(values: list) -> list[dict]:
        return [dict(zip(ids.tolist(), row.tolist())) for ids, row in zip(point_ids, values)]

    return {
        "image_paths": list(image_paths), "depth_paths": list(depth_paths), "intrinsics": intrinsics, "poses": poses,
        "overlap_matrix": overlap, "angles": axis_angles(poses),
        "scale_ratio_matrix": pair_matrices(point_ids, point_ndepths, len(representatives))[1],
        "n_points3D": [len(ids) for ids in point_ids],
        "points3D_id_to_2D": by_id(point_pixels), "points3D_id_to_ndepth": by_id(point_ndepths),
    }


def sample_depth(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres of about N_SAMPLES pixels on a regular grid, those with known depth: (N, 2) in COLMAP's pixel
    convention, and their depth (N,) float64. depth: (H, W), 0 = unknown."""
    h, w = depth.shape
    spacing = max(1.0, np.sqrt(h * w / N_SAMPLES))
    n_x, n_y = max(1, round(w / spacing)), max(1, round(h / spacing))
    x, y = np.meshgrid(((np.arange(n_x) + 0.5) * w / n_x).astype(int), ((np.arange(n_y) + 0.5) * h / n_y).astype(int))
    values = depth[y, x].astype(np.float64)
    known = values > 0
    return np.stack([x[known], y[known]], axis=1) + 0.5, values[known]


def is_seen(points: np.ndarray, depth: np.ndarray, K: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Which world points (N, 3) a camera sees: inside the image, in front, and at known depth, within DEPTH_TOLERANCE.

    depth: (H, W), 0 = unknown; K (3, 3), COLMAP's pixel convention; pose (4, 4) world-to-camera. (N,) bool.
    """
    h, w = depth.shape
    pixels, z = project(points, K, pose)
    x, y = pixels.T
    inside = np.flatnonzero((z > 0) & (x >= 0) & (x < w) & (y >= 0) & (y < h))
    z = z[inside]
    stored = depth[y[inside].astype(np.int64), x[inside].astype(np.int64)].astype(np.float64)
    seen = np.zeros(len(points), bool)
    seen[inside] = (stored > 0) & (np.abs(stored - z) <= DEPTH_TOLERANCE * z)
    return seen


def pair_matrices(point_indices: list, ndepths: list, n_points: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlap and scale ratio, as in a scene_info file, of n images: two (n, n) arrays.

    point_indices: per image (M_i,) different indices in [0, n_points); ndepths: per image (M_i,) depth / mean focal
    length, > 0. The overlap is -1 in row and column of an image without points, the scale ratio where no point is
    shared. The work grows with the sum of the squared track lengths, not with n times the number of observations.
    """
    n = len(point_indices)
    counts = np.array([len(indices) for indices in point_indices])
    owner, indices = np.repeat(np.arange(n), counts), np.concatenate([*point_indices, np.zeros(0, np.int64)])
    seen = csc_matrix((np.concatenate([*ndepths, np.zeros(0)]), (owner, indices)), shape=(n, n_points))
    overlap, scale_ratio = np.full((n, n), -1.0), np.full((n, n), -1.0)
    for i in np.flatnonzero(counts):
        tracks = seen[:, point_indices[i]]
        ratio = np.repeat(ndepths[i], np.diff(tracks.indptr)) / tracks.data
        smallest = np.full(n, np.inf)
        np.minimum.at(smallest, tracks.indices, np.maximum(ratio, 1 / ratio))
        scale_ratio[i] = np.where(np.isfinite(smallest), smallest, -1)
        shared = np.bincount(tracks.indices, minlength=n)
        overlap[i] = np.where(counts > 0, shared / counts[i], -1)
    return overlap, scale_ratio


def axis_angles(poses: list) -> np.ndarray:
    """Degrees between the principal axes of n world-to-camera poses (4, 4). (n, n)."""
    axes = np.stack([pose[2, :3] for pose in poses])
    return np.rad2deg(np.arccos(np.clip(axes @ axes.T, -1, 1)))
