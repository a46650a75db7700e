"""Procedural scenes with exact depth and pose, in the layouts of MegaDepth, YFCC and ScanNet.

A scene is a town square: a paved ground, house fronts round it, boxes, a landmark and posters in the middle, and
cameras all round that look inwards. The default data set: nothing needs to be downloaded to train, test or show.

    python3 -m dump.make_scenes --save_path data/scenes --scenes 20
"""
import argparse
import pickle
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from dump.scenes.render import Atlas, Rectangles, render
from dump.scenes.world import build_world, place_cameras
from dump.workers import available_cores
from tools.cli import InputError, run
from tools.covisibility import scene_info_from_depth
from tools.files import (
    check_folder,
    read_json,
    remove_strays,
    write_bytes,
    write_depth,
    write_hdf5,
    write_image,
    write_json,
)
from tools.geometry import opencv_to_colmap_K
from tools.manifest import check_fields, check_settings
from tools.processes import in_order, stop_on_sigterm, worker_pool
from tools.scene_info import write_scene_info

VERSION = 1  # of what is drawn: other pictures for the same settings need another number
LAYOUTS = ("megadepth", "yfcc", "scannet")
MIN_PAIR_OVERLAP = 0.1
SHADOW_RADIUS = 34.0  # metres from the middle within which everything stands that casts a shadow


def choose_pairs(rng, overlap, n) -> list[tuple[int, int]]:
    """At most n index pairs (i < j) whose overlap is enough in both directions, spread over the range of overlaps."""
    overlap = np.minimum(overlap, overlap.T)
    i, j = np.triu_indices(len(overlap), 1)
    enough = overlap[i, j] >= MIN_PAIR_OVERLAP
    i, j = i[enough], j[enough]
    # one from each of ten bins, again and again: an even spread, until a bin is empty
    bins = (10 * overlap[i, j]).astype(int)
    shuffled = rng.permutation(len(i))
    turns = np.empty(len(i), int)
    for b in np.unique(bins):
        turns[shuffled[bins[shuffled] == b]] = np.arange(np.sum(bins == b))
    chosen = np.lexsort((bins, turns))[:n]
    return sorted((int(a), int(b)) for a, b in zip(i[chosen], j[chosen]))


def write_lines(path, lines) -> None:
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def write_matrix(path, matrix) -> None:
    write_lines(path, (" ".join(f"{value:.17g}" for value in row) for row in matrix))


def megadepth_paths(scene, i) -> tuple[str, str]:
    """Image and depth path of one view, relative to the root."""
    return (f"Undistorted_SfM/{scene}/images/{i:04d}.jpg",
            f"phoenix/S6/zl548/MegaDepth_v1/{scene}/dense0/depths/{i:04d}.h5")


def write_view(save_path, layout, scene, i, image, depth, K, pose) -> None:
    """Write view i in one of the LAYOUTS."""
    if layout == "megadepth":
        image_path, depth_path = megadepth_paths(scene, i)
        write_image(save_path / layout / image_path, image)
        write_depth(save_path / layout / depth_path, depth)
    elif layout == "yfcc":
        test = save_path / layout / "raw_data" / "yfcc100m" / scene / "test"
        write_image(test / "images" / f"{i:04d}.jpg", image)
        write_depth(test / "depths" / f"{i:04d}.h5", depth)
        size = np.array([image.shape[1::-1]], np.float64)
        write_hdf5(test / "calibration" / f"calibration_{i:04d}.h5",
                   {"K": K, "R": pose[:3, :3], "T": pose[:3, 3], "imsize": size})
    else:
        folder = save_path / layout / f"scene{scene}_00"
        write_image(folder / "img" / f"{i}.jpg", image)
        write_matrix(folder / "extrinsic" / f"{i}.txt", np.linalg.inv(pose))
        write_matrix(folder / "intrinsic" / f"{i}.txt", K)
        millimetres = np.round(depth * 1000)
        png = np.where(millimetres < 65535, millimetres, 0).astype(np.uint16)
        write_bytes(folder / "depth" / f"{i}.png", cv2.imencode(".png", png, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])


def make_scene(number, save_path, images_per_scene, size, seed, photographs, layouts, pairs) -> None:
    """Render scene `number` and write it; its marker under scenes/ comes last."""
    scene, rng = f"{number:04d}", np.random.default_rng([seed, number])
    world = build_world(rng, 64 * max(size) / 640, photographs)
    rectangles, atlas = Rectangles(world.rectangles), Atlas(world.textures)
    cameras = place_cameras(rng, world, rectangles, images_per_scene, size)
    depths = []
    for i, (K, pose) in enumerate(cameras):
        view_rng = np.random.default_rng([seed, number, 1 + i])
        image, depth = render(view_rng, rectangles, atlas, K, pose, size, SHADOW_RADIUS)
        depths.append(depth)
        for layout in layouts:
            write_view(save_path, layout, scene, i, image, depth, K, pose)

    image_paths, depth_paths = zip(*(megadepth_paths(scene, i) for i in range(images_per_scene)))
    intrinsics, poses = zip(*((opencv_to_colmap_K(K), pose) for K, pose in cameras))
    info = scene_info_from_depth(image_paths, depth_paths, intrinsics, poses, depths.__getitem__, progress=False)
    chosen = choose_pairs(np.random.default_rng([seed, number, 0]), info["overlap_matrix"], pairs)
    if "yfcc" in layouts:
        raw = save_path / "yfcc" / "raw_data"
        for file, line in (("images", "images/{:04d}.jpg"), ("calibration", "calibration/calibration_{:04d}.h5")):
            write_lines(raw / "yfcc100m" / scene / "test" / f"{file}.txt", map(line.format, range(images_per_scene)))
        write_bytes(raw / "pairs" / f"{scene}-te-{len(chosen)}-pairs.pkl",
                    pickle.dumps([list(pair) for pair in chosen], protocol=2))
    if "megadepth" in layouts:
        write_scene_info(save_path / "megadepth" / "scene_info" / f"{scene}.0.npz", info)
    write_json(marker_path(save_path, scene), {"scene": scene, "images": images_per_scene, "pairs": chosen})


def marker_path(save_path, scene) -> Path:
    return Path(save_path) / "scenes" / f"{scene}.json"


def make_scenes(save_path, scenes=10, images_per_scene=40, size=(640, 480), seed=0, textures=None, layouts=LAYOUTS,
                pairs=50, workers=None, first_scene=0) -> list[str]:
    """Make scenes first_scene .. first_scene + scenes - 1 under `save_path`, those that are not there yet.

    size (w, h) pixels; textures: folder of photographs to cut textures from, else they are drawn; pairs: at most so
    many a scene for YFCC and ScanNet; workers: processes (None: one per core). The result does not depend on
    `workers`, nor that of a scene on which others are made. Returns the scenes' names.
    """
    if scenes < 1 or images_per_scene < 2 or first_scene < 0 or first_scene + scenes > 10000:
        raise InputError("need --scenes >= 1, --images_per_scene >= 2 and scene numbers between 0 and 9999")
    if min(size) < 64 or seed < 0 or pairs < 0 or (workers is not None and workers < 1):
        raise InputError("need --size of at least 64 64, --seed >= 0, --pairs >= 0 and --workers >= 1")
    if not layouts or set(layouts) - set(LAYOUTS):
        raise InputError(f"--layouts: choose among {' '.join(LAYOUTS)}")
    paths = sorted(Path(textures).rglob("*")) if textures else []
    photographs = [str(path) for path in paths if path.is_file() and cv2.haveImageReader(str(path))]
    if textures and not photographs:
        raise InputError(f"--textures: no pictures that OpenCV reads under {textures}")
    save_path, layouts = Path(save_path), [layout for layout in LAYOUTS if layout in layouts]
    check_folder(save_path)
    settings_path = save_path / "make_scenes.json"
    settings = {"version": VERSION, "images_per_scene": images_per_scene, "size": list(size), "seed": seed,
                "layouts": layouts, "pairs": pairs,
                "textures": [str(Path(path).relative_to(textures)) for path in photographs]}
    if settings_path.exists():  # scenes of different settings are not mixed
        check_settings(check_fields(read_json(settings_path), {}, settings_path), settings, settings_path)
    write_json(settings_path, settings)

    for folder in {stray.parent for stray in save_path.rglob(".*.tmp*")}:
        remove_strays(folder)
    numbers = range(first_scene, first_scene + scenes)
    todo = [number for number in numbers if not marker_path(save_path, f"{number:04d}").exists()]
    make = partial(make_scene, save_path=save_path, images_per_scene=images_per_scene, size=tuple(size), seed=seed,
                   photographs=photographs, layouts=layouts, pairs=pairs)
    workers = max(1, min(workers or available_cores(), len(todo)))
    with worker_pool(workers) as pool:
        for _ in tqdm(in_order(pool, make, todo, ahead=workers), "scenes", scenes, initial=scenes - len(todo),
                      unit="scene"):
            pass
    if "scannet" in layouts:
        done = [read_json(path) for path in sorted((save_path / "scenes").glob("[0-9]*.json"))]
        write_lines(save_path / "scannet" / "pairs.txt", [
            f"scene{scene['scene']}_00/img/{i}.jpg scene{scene['scene']}_00/img/{j}.jpg"
            for scene in done for i, j in scene["pairs"]])
    return [f"{number:04d}" for number in numbers]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="dump.make_scenes", description=__doc__.split("\n")[0])
    parser.add_argument("--save_path", required=True, metavar="DIR")
    parser.add_argument("--scenes", type=int, default=10)
    parser.add_argument("--images_per_scene", "--images-per-scene", type=int, default=40)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("W", "H"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--textures", metavar="DIR", help="cut the textures from the photographs in here")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--pairs", type=int, default=50, help="at most so many a scene, for YFCC and ScanNet")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    parser.add_argument("--first_scene", "--first-scene", type=int, default=0, help="number of the first scene")
    arguments = parser.parse_args(argv)
    stop_on_sigterm()
    make_scenes(**vars(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
