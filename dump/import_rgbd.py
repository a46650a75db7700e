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
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tools.cli import InputError, reason, report_skipped, run
from tools.covisibility import scene_info_from_depth
from tools.files import atomic_path, check_folder, read_depth, read_image, read_matrix, remove_strays, write_depth
from tools.geometry import colmap_to_opencv_K, is_camera_matrix, is_rigid, opencv_to_colmap_K, relative_pose
from tools.pair_list import Pair, write_pair_list
from tools.scene_info import load_scene_info, write_scene_info

COLOR_SUFFIXES = ("color.jpg", "color.png")


@dataclass
class Frame:
    """One frame of the sequence: its files there, its files in the new layout (relative to its root), its pose."""
    name: str
    color: Path
    depth: Path
    image_path: str
    depth_path: str
    pose: np.ndarray  # (4, 4) world-to-camera


def import_rgbd(sequence_path, save_path, scene, first=None, last=None, eval_pairs=0, min_rotation=15.0,
                max_rotation=50.0, min_overlap=0.3, seed=0, workers=1) -> list[tuple[str, str]]:
    """Bring one RGB-D sequence into the MegaDepth layout under `save_path`, as scene `scene`.

    first, last: frame numbers, inclusive; by default all. eval_pairs: how many pairs of the ground-truth pair list to
    draw, with a generator seeded by `seed`, among those turned by min_rotation..max_rotation degrees whose smaller
    overlap is at least min_overlap; 0: no list. workers: threads that convert frames.

    What exists is kept; scene_info is written last, so it says that the scene is whole, and describes the frames of
    the latest run. Frames whose pose is not finite (tracking lost) are left out and counted. Returns (frame, reason)
    of every other frame left out: a file is missing or unreadable, or depth and image differ in size. InputError if
    nothing can be imported, or if the scene already holds images of another sequence.
    """
    sequence_path, save_path = Path(sequence_path), Path(save_path)
    if not re.fullmatch(r"\w[\w.-]*", scene):
        raise InputError(f"--scene {scene!r} is not a plain folder name: letters, digits, `_`, `-` and `.` only")
    frames, lost, skipped = list_frames(sequence_path, scene, first, last)
    K = opencv_to_colmap_K(read_intrinsics(sequence_path / "camera-intrinsics.txt"))
    if lost:
        print(f"{lost} frames left out: tracking lost (their pose is not finite)")
    check_same_sequence(frames, save_path)
    check_folder(save_path)
    folders = {Path(path).parent for frame in frames for path in (frame.image_path, frame.depth_path)}
    for folder in folders | {Path("scene_info"), Path("pairs")}:
        remove_strays(save_path / folder)

    with ThreadPool(workers) as pool:
        reasons = list(tqdm(pool.imap(partial(convert_frame, save_path=save_path), frames), total=len(frames),
                            desc=f"{scene}: frames", unit="frame"))
    skipped += [(frame.name, reason) for frame, reason in zip(frames, reasons) if reason]
    frames = [frame for frame, reason in zip(frames, reasons) if not reason]
    if not frames:
        raise InputError(f"no frame of {sequence_path} can be imported: {lost} with tracking lost"
                         + "".join(f"; {name}: {reason}" for name, reason in skipped[:1]))

    info_path = save_path / "scene_info" / f"{scene}.0.npz"
    info = existing_scene_info(info_path, frames, K)
    is_new = info is None
    if is_new:
        info = scene_info_from_depth(
            [frame.image_path for frame in frames], [frame.depth_path for frame in frames],
            [K] * len(frames), [frame.pose for frame in frames],
            lambda i: read_depth(save_path / frames[i].depth_path))
    if eval_pairs:
        write_eval_pairs(save_path / "pairs" / f"{scene}.txt", info, eval_pairs, min_rotation, max_rotation,
                         min_overlap, seed)
    if is_new:
        write_scene_info(info_path, info)
    overlap = info["overlap_matrix"]
    print(f"{scene}: {len(frames)} frames, {np.count_nonzero((overlap >= 0.1) & (overlap <= 0.8))} pairs with overlap "
          f"in [0.1, 0.8], each direction counted")
    return sorted(skipped)


def read_intrinsics(path) -> np.ndarray:
    """Camera matrix (3, 3) of a text file; InputError if it is none."""
    K = read_matrix(path, 3)
    if not is_camera_matrix(K):
        raise InputError(f"{path} is not a camera matrix; expected fx 0 cx, 0 fy cy, 0 0 1, in pixels")
    return K


def list_frames(sequence_path: Path, scene: str, first=None, last=None) -> tuple[list[Frame], int, list]:
    """Frames numbered first..last by name, the number of those with tracking lost, and (name, reason) of bad ones.

    A frame is there if any of its files is. InputError if the folder is missing or no frame is in that range.
    """
    if not sequence_path.is_dir():
        raise InputError(f"folder not found: {sequence_path}")
    names = {match[1]: int(match[2]) for path in sequence_path.iterdir()
             if (match := re.fullmatch(r"(frame-(\d+))\.(color\.jpg|color\.png|depth\.png|pose\.txt)", path.name))}
    if not names:
        raise InputError(f"no frame-XXXXXX.color.jpg (or .color.png), .depth.png, .pose.txt in {sequence_path}")
    chosen = sorted(name for name, number in names.items()
                    if (first is None or number >= first) and (last is None or number <= last))
    if not chosen:
        raise InputError(f"no frame in the range of --first and --last: {sequence_path} has frames "
                         f"{min(names.values())} to {max(names.values())}")
    frames, lost, skipped = [], 0, []
    for name in chosen:
        colors = [path for suffix in COLOR_SUFFIXES if (path := sequence_path / f"{name}.{suffix}").is_file()]
        depth = sequence_path / f"{name}.depth.png"
        try:
            pose = read_matrix(sequence_path / f"{name}.pose.txt", 4)
        except InputError as error:
            skipped.append((name, str(error)))
            continue
        if not np.isfinite(pose).all():
            lost += 1
        elif not is_rigid(pose):
            skipped.append((name, f"{name}.pose.txt is not a camera-to-world pose: not a rotation and a translation"))
        elif not colors:
            skipped.append((name, "it has no color.jpg or color.png"))
        elif not depth.is_file():
            skipped.append((name, "it has no depth.png"))
        else:
            frames.append(Frame(name, colors[0], depth,
                                f"Undistorted_SfM/{scene}/images/{name}{colors[0].suffix}",
                                f"phoenix/S6/zl548/MegaDepth_v1/{scene}/dense0/depths/{name}.h5", np.linalg.inv(pose)))
    return frames, lost, skipped


def check_same_sequence(frames: list[Frame], save_path: Path) -> None:
    """InputError if an image that the scene already holds is not the sequence's: every 7-Scenes sequence has the same
    file names, and two of them in one scene would go unnoticed."""
    for frame in frames:
        existing = save_path / frame.image_path
        if existing.is_file() and not filecmp.cmp(existing, frame.color, shallow=False):
            raise InputError(f"{existing} is not {frame.color}: choose another --scene, or delete that scene first")


def convert_frame(frame: Frame, save_path: Path) -> str | None:
    """Write a frame's image and depth map, unless both exist; None, or why the frame cannot be used."""
    image_path, depth_path = save_path / frame.image_path, save_path / frame.depth_path
    if image_path.is_file() and depth_path.is_file():
        return None
    try:
        image, depth = read_image(frame.color), read_depth(frame.depth)
        if image.shape != depth.shape:
            return "depth is {1}x{0}, the image {3}x{2}".format(*depth.shape, *image.shape)
        write_depth(depth_path, depth)
        link_or_copy(frame.color.resolve(), image_path)
    except Exception as error:
        return reason(error)
    return None


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, which takes no space; copy it where links cannot be made, across file systems for one."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def existing_scene_info(path, frames: list[Frame], K: np.ndarray) -> dict | None:
    """The scene_info file of an earlier run if it describes these very frames, else None. K: COLMAP's convention."""
    if not Path(path).is_file():
        return None
    info = load_scene_info(path)
    same = (list(info["image_paths"]) == [frame.image_path for frame in frames]
            and all(np.array_equal(K, other) for other in info["intrinsics"])
            and all(np.array_equal(frame.pose, pose) for frame, pose in zip(frames, info["poses"])))
    return info if same else None


def rotation_angles(poses) -> np.ndarray:
    """Relative rotation angle, degrees, between any two of n poses (4, 4). (n, n)."""
    R = np.stack([pose[:3, :3].ravel() for pose in poses])
    return np.rad2deg(np.arccos(np.clip((R @ R.T - 1) / 2, -1, 1)))  # R_i : R_j = trace(R_i R_j^T)


def draw_eval_pairs(info: dict, n_pairs: int, min_rotation: float, max_rotation: float, min_overlap: float,
                    seed: int) -> np.ndarray:
    """Up to n_pairs pairs (i, j), i < j, sorted, whose rotation angle is in [min_rotation, max_rotation] degrees and
    whose smaller overlap is >= min_overlap; all there are if they are fewer. (M, 2)."""
    angles, overlap = rotation_angles(info["poses"]), info["overlap_matrix"]
    good = (angles >= min_rotation) & (angles <= max_rotation) & (np.minimum(overlap, overlap.T) >= min_overlap)
    candidates = np.argwhere(np.triu(good, k=1))
    chosen = np.random.default_rng(seed).permutation(len(candidates))[:n_pairs]
    return candidates[np.sort(chosen)]


def write_eval_pairs(path, info: dict, n_pairs: int, min_rotation: float, max_rotation: float, min_overlap: float,
                     seed: int) -> None:
    """Draw pairs and write them as a ground-truth pair list, image names relative to the scene's images; say how many
    if there are fewer than asked for. No pair at all: no file."""
    drawn = draw_eval_pairs(info, n_pairs, min_rotation, max_rotation, min_overlap, seed)
    if len(drawn) < n_pairs:
        print(f"only {len(drawn)} of {n_pairs} evaluation pairs: no more are turned by {min_rotation:g} to "
              f"{max_rotation:g} degrees with overlap >= {min_overlap:g}")
    if not len(drawn):
        Path(path).unlink(missing_ok=True)
        return
    names, poses = [Path(name).name for name in info["image_paths"]], info["poses"]
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
    parser.add_argument("--eval_pairs", type=int, default=0, help="also write this many ground-truth pairs (default 0)")
    parser.add_argument("--min_rotation", type=float, default=15, help="of these pairs, degrees (default 15)")
    parser.add_argument("--max_rotation", type=float, default=50, help="of these pairs, degrees (default 50)")
    parser.add_argument("--min_overlap", type=float, default=0.3, help="the smaller of the two (default 0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of these pairs (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one per core)")
    args = parser.parse_args(argv)
    for name, smallest in (("eval_pairs", 0), ("seed", 0), ("workers", 1)):
        if getattr(args, name) < smallest:
            parser.error(f"--{name} must be at least {smallest}")
    return report_skipped(import_rgbd(**vars(args)), "frames")


if __name__ == "__main__":
    sys.exit(run(main))
