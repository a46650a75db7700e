"""D2-Net's scene_info files: what is known of the images of one scene, and which of them overlap."""
import itertools
import sys
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from tools.cli import InputError, reason
from tools.files import atomic_path, below
from tools.geometry import colmap_to_opencv_K, is_camera_matrix, is_rigid, relative_pose
from tools.pair_list import Pair
from tools.safe_pickle import load_npz, numbers

OBJECT_FIELDS = (
    "image_paths", "depth_paths", "intrinsics", "poses", "n_points3D", "points3D_id_to_2D", "points3D_id_to_ndepth",
)
MATRIX_FIELDS = ("overlap_matrix", "scale_ratio_matrix", "angles")
MIN_OVERLAP, MAX_OVERLAP = 0.1, 0.8
MIN_SHARED_POINTS = 20


def check_camera(K, pose) -> tuple[np.ndarray, np.ndarray]:
    """K (3, 3) and world-to-camera pose (4, 4) of a file as new float64 arrays; InputError if they cannot be used."""
    K, pose = numbers(K, 3, 3, name="intrinsics"), numbers(pose, 4, 4, name="pose")
    if not is_camera_matrix(K):
        raise InputError("the intrinsics are not a camera matrix")
    if not is_rigid(pose):
        raise InputError("the pose is not a rotation and translation")
    return K, pose


def check_name(name) -> str:
    """A path from a file that is relative to the root of a data set; InputError if it leads out of it."""
    if not isinstance(name, str):
        raise InputError("a path is not text")
    below(".", name)
    return str(name)


def load_scene_info(path) -> dict:
    """Read a scene_info .npz -> dict of arrays by the names of OBJECT_FIELDS and MATRIX_FIELDS that are there.

    intrinsics and poses are float64, K in COLMAP's pixel convention. An image whose paths, K, pose or points cannot be
    used has None for them all, and is in the entry `left_out`: [[name, reason]], which is there if there are such.
    InputError if the file is missing, damaged, lacks a field, holds pickled objects other than arrays, dicts, lists and
    numbers, or has no image that can be used.
    """
    info = load_npz(path)
    needed = ("image_paths", "depth_paths", "intrinsics", "poses", "overlap_matrix", "points3D_id_to_2D")
    missing = [name for name in needed if not isinstance(info, dict) or name not in info]
    if missing:
        raise InputError(f"{path} is not a scene_info file: it lacks {', '.join(missing)}")
    n = len(np.atleast_1d(info["image_paths"]))
    matrices, objects = ([name for name in fields if name in info] for fields in (MATRIX_FIELDS, OBJECT_FIELDS))
    for name in matrices:
        if np.shape(info[name]) != (n, n):
            raise InputError(f"{path}: {name} is {np.shape(info[name])}, for {n} images")
        info[name] = numbers(info[name], n, n, name=f"{path}: {name}")
    for name in objects:
        if not isinstance(info[name], np.ndarray | list) or getattr(info[name], "ndim", 1) == 0 or len(info[name]) != n:
            raise InputError(f"{path}: {name} is missing, or not for {n} images")
        info[name] = np.fromiter(info[name], object, n)
    left_out = []
    for i in range(n):
        try:
            for name in ("image_paths", "depth_paths"):
                info[name][i] = None if info[name][i] is None else check_name(info[name][i])
            if info["intrinsics"][i] is not None and info["poses"][i] is not None:
                info["intrinsics"][i], info["poses"][i] = check_camera(info["intrinsics"][i], info["poses"][i])
            points = info["points3D_id_to_2D"][i]
            if not isinstance(points, dict | None) or not all(
                    isinstance(id, int | np.integer) and 0 <= id < 2 ** 63 for id in points or ()):
                raise InputError("its 3D points are no dict by number")
        except InputError as error:
            left_out.append([str(info["image_paths"][i]), str(error)])
            for name in objects:
                info[name][i] = None
    if left_out and len(left_out) == n:
        raise InputError(f"{path} has no image that can be used; the first: {left_out[0][1]}")
    return {**info, "left_out": left_out} if left_out else info


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
    """Ordered pairs (P, 2) of image indices that overlap as training pairs should, in lexicographic order.

    info: as from load_scene_info. Images without a path, depth map, K or pose are in no pair.
    """
    known = ("image_paths", "depth_paths", "intrinsics", "poses")
    usable = np.array([all(info[name][i] is not None for name in known) for i in range(len(info["image_paths"]))], bool)
    overlap = np.asarray(info["overlap_matrix"], np.float64)
    wanted = (overlap >= MIN_OVERLAP) & (overlap <= MAX_OVERLAP) & usable[:, None] & usable[None]
    np.fill_diagonal(wanted, False)
    points = [list(seen or ()) if is_usable else [] for seen, is_usable in zip(info["points3D_id_to_2D"], usable)]
    ids, columns = np.unique(np.fromiter(itertools.chain.from_iterable(points), np.int64), return_inverse=True)
    starts = np.cumsum([0, *map(len, points)])
    sees = csr_matrix((np.ones(len(columns), np.int32), columns, starts), shape=(len(points), max(len(ids), 1)))
    return np.argwhere(wanted & ((sees @ sees.T).toarray() >= MIN_SHARED_POINTS))


def read_megadepth1500(folder) -> list[Pair]:
    """The pairs of MegaDepth-1500 from its files `<scene>_<min>_<max>.npz` in a folder, file by file.

    A pair that cannot be used is left out, and counted on stderr. InputError if a file cannot be read, or has no pair.
    """
    paths = sorted(Path(folder).glob("*_*_*.npz"))
    if not paths:
        raise InputError(f"no files of MegaDepth-1500 in {folder}: expected 0015_0.1_0.3.npz and four more")
    return [pair for path in paths for pair in _read_pair_infos(path)]


def _read_pair_infos(path) -> list[Pair]:
    info, pairs, left_out = load_npz(path), [], []
    fields = ("image_paths", "intrinsics", "poses", "pair_infos")
    if not isinstance(info, dict) or not all(
            isinstance(info.get(name), list) or getattr(info.get(name), "ndim", 0) for name in fields):
        raise InputError(f"{path} is not a file of MegaDepth-1500: it lacks one of {', '.join(fields)}")
    n = min(len(info[name]) for name in fields[:3])
    for entry in info["pair_infos"]:
        try:
            if not isinstance(entry, list | tuple | np.ndarray) or getattr(entry, "ndim", 1) == 0 or len(entry) == 0:
                raise InputError("it holds what is no pair")
            indices = numbers(entry[0], 2, name="a pair")
            if not ((indices >= 0) & (indices < n)).all():  # nor nan
                raise InputError(f"images {indices[0]:g} and {indices[1]:g}, which the file does not have")
            i, j = indices.astype(int)
            (K0, pose0), (K1, pose1) = (check_camera(info["intrinsics"][k], info["poses"][k]) for k in (i, j))
            names = [check_name(info["image_paths"][k]) for k in (i, j)]
            pairs.append(Pair(*names, 0, 0, colmap_to_opencv_K(K0), colmap_to_opencv_K(K1),
                              relative_pose(pose0, pose1)))
        except Exception as error:
            left_out.append(reason(error))
    if not pairs:
        raise InputError(f"{path} has no pair of MegaDepth-1500 that can be used: {(left_out or ['it is empty'])[0]}")
    if left_out:
        print(f"note: {path}: {len(left_out)} pairs are left out; the first: {left_out[0]}", file=sys.stderr)
    return pairs
