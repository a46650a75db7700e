"""An RGB-D sequence (color, depth, pose) -> the MegaDepth layout that dump.dump_megadepth reads.

    python3 -m dump.import_rgbd --sequence_path DIR --save_path OUT --scene NAME

DIR holds `frame-XXXXXX.color.jpg` (or `.color.png`), `frame-XXXXXX.depth.png` (16-bit millimetres in the colour
camera's view, same size as the image, 0 and 65535 unknown), `frame-XXXXXX.pose.txt` (4x4 camera-to-world, metres) and
`camera-intrinsics.txt` (3x3, OpenCV's pixel convention): 7-Scenes' names. OUT gets

    Undistorted_SfM/NAME/images/frame-XXXXXX.jpg
    phoenix/S6/zl548/MegaDepth_v1/NAME/dense0/depths/frame-XXXXXX.h5
    scene_info/NAME.0.npz
    pairs/NAME.txt                   with --eval_pairs: a pair list with ground truth
"""
import argparse
import filecmp
import os
import re
import shutil
import sys
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tools.cli import InputError, reason, report_skipped, run, whole_number
from tools.covisibility import scene_info_from_depth
from tools.files import atomic_path, check_folder, read_depth, read_image, read_matrix, remove_strays, write_depth
from tools.geometry import colmap_to_opencv_K, is_camera_matrix, is_rigid, opencv_to_colmap_K, relative_pose
from tools.pair_list import Pair, write_pair_list
from tools.scene_info import load_scene_info, write_scene_info


class Frame(NamedTuple):
    """One imported frame."""
    image_path: str  # relative to the root of the new layout, as is depth_path
    depth_path: str
    pose: np.ndarray  # (4, 4) world-to-camera


def import_rgbd(sequence_path, save_path, scene, first=None, last=None, eval_pairs=0, min_rotation=15.0,
                max_rotation=50.0, min_overlap=0.3, seed=0, workers=1) -> list[tuple[str, str]]:
    """Bring one RGB-D sequence into the MegaDepth layout under `save_path`, as scene `scene`.

    Parameters as the options of the command. What exists is kept; scene_info is written last, so it says that the
    scene is whole, and describes the frames of the latest run. Frames whose pose is not finite (tracking lost) are left
    out and counted. Returns (frame, reason) of every other frame left out. InputError if nothing can be imported, or if
    the scene already holds images of another sequence.
    """
    sequence_path, save_path = Path(sequence_path), Path(save_path)
    if not re.fullmatch(r"\w[\w.-]*", scene):
        raise InputError(f"--scene {scene!r} is not a plain folder name: letters, digits, `_`, `-` and `.` only")
    names = list_frames(sequence_path, first, last)
    camera_path = sequence_path / "camera-intrinsics.txt"
    K = read_matrix(camera_path, 3)
    if not is_camera_matrix(K):
        raise InputError(f"{camera_path} is not a camera matrix; expected fx 0 cx, 0 fy cy, 0 0 1, in pixels")
    K = opencv_to_colmap_K(K)
    images = save_path / "Undistorted_SfM" / scene / "images"
    for color in [color for name in names if (color := find_color(sequence_path, name))]:
        # all sequences of 7-Scenes have the same file names, and two of them in one scene would go unnoticed
        existing = images / color.name.replace(".color", "")
        if existing.is_file() and not filecmp.cmp(existing, color, shallow=False):
            raise InputError(f"{existing} is not {color}: choose another --scene, or delete that scene first")
    check_folder(save_path)
    depths = save_path / "phoenix/S6/zl548/MegaDepth_v1" / scene / "dense0" / "depths"
    for folder in (images, depths, save_path / "scene_info", save_path / "pairs"):
        remove_strays(folder)

    convert = partial(import_frame, sequence_path=sequence_path, save_path=save_path, images=images, depths=depths)
    with ThreadPool(workers) as pool:
        results = list(tqdm(pool.imap(convert, names), f"{scene}: frames", len(names), unit="frame"))
    frames = [result for result in results if isinstance(result, Frame)]
    skipped = [(name, result) for name, result in zip(names, results) if isinstance(result, str)]
    lost = results.count(None)
    if lost:
        print(f"{lost} frames left out: tracking lost (their pose is not finite)")
    if not frames:
        raise InputError(f"no frame of {sequence_path} can be imported: {lost} with tracking lost"
                         + "".join(f"; {name}: {reason}" for name, reason in skipped[:1]))

    info_path = save_path / "scene_info" / f"{scene}.0.npz"
    info = existing_scene_info(info_path, frames, K)
    is_new = info is None
    if is_new:
        image_paths, depth_paths, poses = zip(*frames)
        info = scene_info_from_depth(image_paths, depth_paths, [K] * len(frames), poses,
                                     lambda i: read_depth(save_path / depth_paths[i]))
    if eval_pairs:
        write_eval_pairs(save_path / "pairs" / f"{scene}.txt", info, eval_pairs, min_rotation, max_rotation,
                         min_overlap, seed)
    if is_new:
        write_scene_info(info_path, info)
    overlap = info["overlap_matrix"]
    print(f"{scene}: {len(frames)} frames, {np.count_nonzero((overlap >= 0.1) & (overlap <= 0.8))} pairs with overlap "
          f"in [0.1, 0.8], each direction counted")
    return skipped


def list_frames(sequence_path: Path, first=None, last=None) -> list[str]:
    """Names of the frames numbered first..last, sorted; a frame is there if any of its files is."""
    if not sequence_path.is_dir():
        raise InputError(f"folder not found: {sequence_path}")
    numbers = {match[1]: int(match[2]) for path in sequence_path.iterdir()
               if (match := re.fullmatch(r"(frame-(\d+))\.(color\.jpg|color\.png|depth\.png|pose\.txt)", path.name))}
    if not numbers:
        raise InputError(f"no frame-XXXXXX.color.jpg (or .color.png), .depth.png, .pose.txt in {sequence_path}")
    chosen = sorted(name for name, number in numbers.items()
                    if (first is None or number >= first) and (last is None or number <= last))
    if not chosen:
        raise InputError(f"no frame in the range of --first and --last: {sequence_path} has frames "
                         f"{min(numbers.values())} to {max(numbers.values())}")
    return chosen


def find_color(sequence_path: Path, name: str) -> Path | None:
    paths = [sequence_path / f"{name}.color.{suffix}" for suffix in ("jpg", "png")]
    return next(filter(Path.is_file, paths), None)


def import_frame(name: str, sequence_path: Path, save_path: Path, images: Path, depths: Path) -> Frame | str | None:
    """Write a frame's image and depth map, unless both exist; None if tracking was lost, or why it cannot be used."""
    color, depth_source = find_color(sequence_path, name), sequence_path / f"{name}.depth.png"
    try:
        pose = read_matrix(sequence_path / f"{name}.pose.txt", 4)
        if not np.isfinite(pose).all():
            return None
        if not is_rigid(pose):
            return f"{name}.pose.txt is not a camera-to-world pose: not a rotation and a translation"
        if not color:
            return "it has no color.jpg or color.png"
        if not depth_source.is_file():
            return "it has no depth.png"
        image_path, depth_path = images / f"{name}{color.suffix}", depths / f"{name}.h5"
        if not (image_path.is_file() and depth_path.is_file()):
            image, depth = read_image(color), read_depth(depth_source)
            if image.shape != depth.shape:
                return "depth is {1}x{0}, the image {3}x{2}".format(*depth.shape, *image.shape)
            write_depth(depth_path, depth)
            link_or_copy(color.resolve(), image_path)
        return Frame(image_path.relative_to(save_path).as_posix(), depth_path.relative_to(save_path).as_posix(),
                     np.linalg.inv(pose))
    except Exception as error:
        return reason(error)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, which takes no space; copy it where links cannot be made, across file systems for one."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def existing_scene_info(path: Path, frames: list[Frame], K: np.ndarray) -> dict | None:
    """The scene_info file of an earlier run if it describes these very frames, else None. K: COLMAP's convention."""
    info = load_scene_info(path) if path.is_file() else {"image_paths": []}
    same = list(info["image_paths"]) == [frame.image_path for frame in frames] and all(
        np.array_equal(K, other) and np.array_equal(frame.pose, pose)
        for frame, other, pose in zip(frames, info["intrinsics"], info["poses"]))
    return info if same else None


def write_eval_pairs(path: Path, info: dict, n_pairs: int, min_rotation: float, max_rotation: float,
                     min_overlap: float, seed: int) -> None:
    """Draw pairs as import_rgbd says, and write them as a ground-truth pair list, image names relative to the scene's
    images; say how many if there are fewer than asked for. No pair at all: no file."""
    names, poses, overlap = [Path(name).name for name in info["image_paths"]], info["poses"], info["overlap_matrix"]
    R = np.stack([pose[:3, :3].ravel() for pose in poses])
    angles = np.rad2deg(np.arccos(np.clip((R @ R.T - 1) / 2, -1, 1)))  # R_i : R_j = trace(R_i R_j^T)
    good = (angles >= min_rotation) & (angles <= max_rotation) & (np.minimum(overlap, overlap.T) >= min_overlap)
    candidates = np.argwhere(np.triu(good, k=1))
    drawn = candidates[np.sort(np.random.default_rng(seed).permutation(len(candidates))[:n_pairs])]
    if len(drawn) < n_pairs:
        print(f"only {len(drawn)} of {n_pairs} evaluation pairs: no more are turned by {min_rotation:g} to "
              f"{max_rotation:g} degrees with overlap >= {min_overlap:g}")
    if not len(drawn):
        path.unlink(missing_ok=True)
        return
    K = [colmap_to_opencv_K(K) for K in info["intrinsics"]]
    write_pair_list(path, [Pair(names[i], names[j], K0=K[i], K1=K[j], T_0to1=relative_pose(poses[i], poses[j]))
                           for i, j in drawn])
    print(f"{len(drawn)} evaluation pairs: {path}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m dump.import_rgbd", description=__doc__.splitlines()[0])
    parser.add_argument("--sequence_path", required=True, help="folder of frame-XXXXXX.{color.jpg,depth.png,pose.txt}")
    parser.add_argument("--save_path", required=True, help="root of the MegaDepth layout; may hold other scenes")
    parser.add_argument("--scene", required=True, help="name of the scene there")
    parser.add_argument("--first", type=int, help="first frame number, inclusive")
    parser.add_argument("--last", type=int, help="last frame number, inclusive")
    parser.add_argument("--eval_pairs", type=whole_number(0), default=0, help="also write so many ground-truth pairs")
    parser.add_argument("--min_rotation", type=float, default=15, help="of these pairs, degrees (default 15)")
    parser.add_argument("--max_rotation", type=float, default=50, help="of these pairs, degrees (default 50)")
    parser.add_argument("--min_overlap", type=float, default=0.3, help="the smaller of the two (default 0.3)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the draw of these pairs (default 0)")
    parser.add_argument("--workers", type=whole_number(1), default=os.cpu_count() or 1, help="threads")
    args = parser.parse_args(argv)
    return report_skipped(import_rgbd(**vars(args)), "frames")


if __name__ == "__main__":
    sys.exit(run(main))
