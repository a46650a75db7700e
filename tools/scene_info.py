"""D2-Net's scene_info files (SPEC 2): what is known of the images of one scene, and which of them overlap."""
import itertools
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from tools.cli import InputError
from tools.files import atomic_path
from tools.safe_pickle import load_npz

OBJECT_FIELDS = (
    "image_paths", "depth_paths", "intrinsics", "poses", "n_points3D", "points3D_id_to_2D", "points3D_id_to_ndepth",
)
MATRIX_FIELDS = ("overlap_matrix", "scale_ratio_matrix", "angles")
MIN_OVERLAP, MAX_OVERLAP = 0.1, 0.8
MIN_SHARED_POINTS = 20


def load_scene_info(path) -> dict:
    """Read a scene_info .npz -> dict of arrays, as in SPEC 2; K in COLMAP's pixel convention.

    Raises InputError if the file is missing, damaged, lacks a field, or holds pickled objects other than arrays,
    dicts, lists and numbers.
    """
    info = load_npz(path)
    missing = [name for name in ("image_paths", "depth_paths", "intrinsics", "poses", "overlap_matrix")
               if name not in info]
    if missing:
        raise InputError(f"{path} is no scene_info file: it lacks {', '.join(missing)}")
    return info


def write_scene_info(path, info: dict) -> None:
    """Write a scene_info .npz, atomically. Lists of per-image values become object arrays of length n.

    info: every name of OBJECT_FIELDS (sequences of n) and MATRIX_FIELDS ((n, n) arrays).
    """
    arrays = {name: np.asarray(info[name]) for name in MATRIX_FIELDS}
    for name in OBJECT_FIELDS:
        arrays[name] = np.empty(len(info[name]), dtype=object)
        for i, value in enumerate(info[name]):
            arrays[name][i] = value
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def list_scenes(base_path, scene_list=None) -> dict[str, Path]:
    """Scene id -> its scene_info file under `base_path`/scene_info, in sorted order.

    `0000.0.npz` is scene 0000; other files go by their stem. With `scene_list` (ids), just those, in that order;
    InputError names the ones that are not there.
    """
    folder = Path(base_path) / "scene_info"
    files = {path.stem.removesuffix(".0"): path for path in sorted(folder.glob("*.npz")) if path.name[0] != "."}
    if not files:
        raise InputError(f"no scene_info/*.npz under {base_path}: see dump.preprocess_megadepth or dump.make_scenes")
    if scene_list is None:
        return files
    missing = [scene for scene in scene_list if scene not in files]
    if missing:
        raise InputError(f"{folder} has no scene {', '.join(missing[:5])}"
                         + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""))
    return {scene: files[scene] for scene in scene_list}


def candidate_pairs(info: dict) -> np.ndarray:
    """Ordered pairs (P, 2) of image indices by overlap and shared points (SPEC 4), in lexicographic order.

    info: as from load_scene_info. Images without a path, depth map, K or pose are in no pair.
    """
    n = len(info["image_paths"])
    usable = np.array([all(info[name][i] is not None for name in ("image_paths", "depth_paths", "intrinsics", "poses"))
                       for i in range(n)], bool)
    overlap = np.asarray(info["overlap_matrix"], np.float64)
    wanted = (overlap >= MIN_OVERLAP) & (overlap <= MAX_OVERLAP) & usable[:, None] & usable[None]
    np.fill_diagonal(wanted, False)
    points = [list(info["points3D_id_to_2D"][i] or ()) if usable[i] else [] for i in range(n)]
    ids, columns = np.unique(np.fromiter(itertools.chain.from_iterable(points), np.int64), return_inverse=True)
    starts = np.concatenate([[0], np.cumsum([len(of_image) for of_image in points])])
    sees = csr_matrix((np.ones(len(columns), np.int32), columns, starts), shape=(n, max(len(ids), 1)))
    shared = (sees @ sees.T).toarray()
    return np.argwhere(wanted & (shared >= MIN_SHARED_POINTS))


def check_scene_info(info: dict, path) -> None:
    """Raise InputError, naming the file, if `candidate_pairs` cannot use what load_scene_info read."""
    n = len(info["image_paths"])
    if np.shape(info["overlap_matrix"]) != (n, n):
        raise InputError(f"{path}: overlap_matrix is {np.shape(info['overlap_matrix'])}, for {n} images")
    for name in ("depth_paths", "intrinsics", "poses", "points3D_id_to_2D"):
        if name not in info or len(info[name]) != n:
            raise InputError(f"{path}: {name} is missing, or not for {n} images")
