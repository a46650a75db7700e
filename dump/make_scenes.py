"""Procedural scenes with exact depth and pose, in the layouts of MegaDepth, YFCC and ScanNet (SPEC 2).

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

from dump.render import Atlas, Rectangle, Rectangles, look_at, render
from dump.textures import make_texture
from dump.workers import available_cores, in_order, stop_on_sigterm, worker_pool
from tools.cli import InputError, run
from tools.covisibility import scene_info_from_depth
from tools.files import (
    atomic_path,
    check_folder,
    hdf5_image,
    read_json,
    remove_strays,
    write_depth,
    write_image,
    write_json,
)
from tools.geometry import opencv_to_colmap_K
from tools.scene_info import write_scene_info

VERSION = 1  # of what is drawn: other pictures for the same settings need another number
LAYOUTS = ("megadepth", "yfcc", "scannet")
MIN_PAIR_OVERLAP = 0.1
SHADOW_RADIUS = 34.0  # metres from the middle within which everything stands that casts a shadow


class World:
    """Rectangles and textures of a scene in the making; metres, z up, the ground at 0."""

    def __init__(self, rng, scale, photographs=()):
        """scale: texels per metre."""
        self.rng, self.scale, self.photographs = rng, scale, photographs
        self.rectangles, self.textures, self.solids = [], [], []

    def texture(self, kind, width, height, scale=None) -> int:
        """Make a texture for a surface of width x height metres; returns its number."""
        scale = scale or self.scale
        w, h = max(round(width * scale), 8), max(round(height * scale), 8)
        self.textures.append(make_texture(self.rng, kind, h, w, scale, self.photographs))
        return len(self.textures) - 1

    def ground(self, half, texture, hole=0.0):
        """A square of side 2 * half at height 0; with `hole`, four strips round a square of side 2 * hole."""
        for turn in range(4 if hole else 1):
            c, s = (1, 0, -1, 0)[turn], (0, 1, 0, -1)[turn]
            R = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
            right, down = (half + hole, half - hole) if hole else (2 * half, 2 * half)
            self.rectangles.append(Rectangle(R @ [-half, half, 0], R @ [right, 0, 0], R @ [0, -down, 0], texture))

    def box(self, center, size, yaw, textures, tilt=0.0):
        """A box that stands with the middle of its foot at `center`; size (width, depth, height).

        textures: of the front (which looks along +x at yaw 0), left, back, right side and top. tilt: radians about
        the vertical's normal, to lean boards and crates.
        """
        c, s, ct, st = np.cos(yaw), np.sin(yaw), np.cos(tilt), np.sin(tilt)
        R = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[ct, 0, -st], [0, 1, 0], [st, 0, ct]])
        width, depth, height = size
        middle = np.asarray(center, float) + R @ [0, 0, height / 2]
        out, side, up = R[:, 0] * depth / 2, R[:, 1] * width / 2, R[:, 2] * height / 2
        for towards, right, texture in zip((out, side, -out, -side), (side, -out, -side, out), textures):
            self.rectangles.append(Rectangle(middle + towards - right + up, 2 * right, -2 * up, texture))
        self.rectangles.append(Rectangle(middle + up - side - out, 2 * side, 2 * out, textures[4]))
        self.solids.append((middle, R, np.array([depth, width, height]) / 2))

    def house(self, center, size, yaw, sides):
        """A box with a front of its own and things that stand out from it, which give parallax on the wall.

        sides: textures of the sides and the top.
        """
        rng, (width, depth, height) = self.rng, size
        front = self.texture("front", width, height)
        self.box(center, size, yaw, [front, sides[0], sides[1], sides[0], sides[1]])
        R = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        for _ in range(int(rng.integers(2, 6))):
            relief = rng.uniform(0.15, 0.9)
            w, h = (rng.uniform(0.25, 0.6), height) if rng.random() < 0.3 else rng.uniform(0.5, 2.5, 2)
            x, z = rng.uniform(-0.5, 0.5) * (width - w), rng.uniform(0, 1) * (height - h)
            texture = self.texture("crate", w, h)
            self.box(np.asarray(center) + R @ [depth / 2 + relief / 2 - 0.05, x, z], (w, relief, h), yaw,
                     [texture, sides[0], texture, sides[0], sides[1]])

    def is_inside(self, point, margin) -> bool:
        return any((np.abs((point - middle) @ R) < half + margin).all() for middle, R, half in self.solids)


def build_world(rng, scale, photographs=()) -> World:
    """A town square. scale: texels per metre; photographs: paths of pictures to cut the textures from."""
    world = World(rng, scale, photographs)
    world.ground(19, world.texture("ground", 38, 38, 0.75 * scale))
    world.ground(40, world.texture("ground", 59, 21, 0.4 * scale), hole=19)
    walls = [world.texture("wall", 6, 8, 0.7 * scale) for _ in range(5)]

    n_houses, turn = int(rng.integers(9, 14)), rng.uniform(0, 2 * np.pi)
    for k in range(n_houses):
        angle, distance = turn + 2 * np.pi * (k + rng.uniform(-0.15, 0.15)) / n_houses, rng.uniform(21, 27)
        size = (rng.uniform(8, 14), 5, rng.uniform(5, 13))
        world.house(distance * np.array([np.cos(angle), np.sin(angle), 0]), size, angle + np.pi + rng.normal(0, 0.12),
                    rng.choice(walls, 2))

    reach = 2.0
    if rng.random() < 0.6:  # a landmark, two of its sides alike
        width, depth, height = rng.uniform(3, 6), rng.uniform(3, 6), rng.uniform(4, 9)
        front, side = world.texture("front", width, height), world.texture("front", depth, height)
        world.box((0, 0, 0), (width, depth, height), rng.uniform(0, 2 * np.pi),
                  [front, side, front, world.texture("front", depth, height), walls[0]])
        reach = 0.7 * np.hypot(width, depth)
    for _ in range(int(rng.integers(9, 16))):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(reach, 13)
        foot, yaw = distance * np.array([np.cos(angle), np.sin(angle), 0]), rng.uniform(0, 2 * np.pi)
        size = rng.uniform(0.7, 2.4, 3)
        for _ in range(int(rng.integers(1, 4))):  # a stack
            sides = world.texture("crate", size[0], size[2]), world.texture("crate", size[1], size[2])
            top = world.texture("crate", size[0], size[1])
            world.box(foot, size, yaw, [sides[0], sides[1], sides[0], sides[1], top])
            foot, yaw, size = foot + [0, 0, size[2]], yaw + rng.normal(0, 0.4), size * rng.uniform(0.5, 0.95, 3)
            if rng.random() < 0.5:
                break
    for _ in range(int(rng.integers(4, 8))):  # boards with a poster on either side, leaning a little
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(reach, 14)
        size = (rng.uniform(1.2, 3.5), 0.12, rng.uniform(1.2, 3))
        front, back = (world.texture("poster", size[0], size[2]) for _ in range(2))
        world.box(distance * np.array([np.cos(angle), np.sin(angle), 0]), size, rng.uniform(0, 2 * np.pi),
                  [front, walls[1], back, walls[1], walls[1]], tilt=rng.normal(0, 0.12))
    return world


def place_cameras(rng, world, rectangles, n, size):
    """n cameras round the square that look inwards: a list of (K (3, 3) in OpenCV's convention, pose (4, 4)).

    They stand on an arc: views from opposite sides share ground that no descriptor recognises. Few cameras stand on
    a short one, so that they still see the same things.
    """
    w, h = size
    arc = np.deg2rad(np.clip(3.5 * n, 40, rng.uniform(70, 120)))
    start = rng.uniform(0, 2 * np.pi)
    cameras = []
    for i in range(n):
        for _ in range(60):
            angle = start + arc * (i + rng.uniform(-0.5, 0.5)) / n
            distance = rng.uniform(6, 18)
            height = rng.uniform(1.3, 3.5) if rng.random() < 0.75 else rng.uniform(3.5, 8)
            center = np.array([distance * np.cos(angle), distance * np.sin(angle), height])
            target = np.append(rng.normal(0, 1.8, 2), rng.uniform(0.8, 3.5))
            roll = rng.normal(0, 0.06) if rng.random() < 0.8 else rng.uniform(-0.6, 0.6)
            f = w * np.exp(rng.uniform(np.log(0.7), np.log(1.35)))
            K = np.array([[f, 0, (w - 1) / 2], [0, f, (h - 1) / 2], [0, 0, 1]])
            pose = look_at(center, target, roll)
            if world.is_inside(center, 0.8):
                continue
            small = K * [[32 / w], [24 / h], [1]]
            _, inverse, _ = rectangles.rasterise(small, pose, (32, 24))
            # a wall before the lens or much sky shows nothing that another view could share
            if np.mean(inverse > 1 / 3) < 0.15 and np.mean(inverse == 0) < 0.35:
                break
        cameras.append((K, pose))
    return cameras


def choose_pairs(rng, overlap, n) -> list[tuple[int, int]]:
    """At most n index pairs (i < j) whose overlap is enough in both directions, spread over the range of overlaps."""
    overlap = np.minimum(overlap, overlap.T)
    i, j = np.triu_indices(len(overlap), 1)
    enough = overlap[i, j] >= MIN_PAIR_OVERLAP
    i, j = i[enough], j[enough]
    # taking turns among ten bins: an even spread, until a bin is empty
    bins = (10 * overlap[i, j]).astype(int)
    shuffled = rng.permutation(len(i))
    turns = np.empty(len(i), int)
    for b in np.unique(bins):
        turns[shuffled[bins[shuffled] == b]] = np.arange(np.sum(bins == b))
    chosen = np.lexsort((bins, turns))[:n]
    return sorted((int(a), int(b)) for a, b in zip(i[chosen], j[chosen]))


def write_matrix(path, matrix) -> None:
    with atomic_path(path) as temporary:
        np.savetxt(temporary, matrix, fmt="%.17g")


def write_text(path, lines) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines))


def write_megadepth_view(root, scene, i, image, depth) -> None:
    image_path, depth_path = megadepth_paths(scene, i)
    write_image(root / image_path, image)
    write_depth(root / depth_path, depth)


def megadepth_paths(scene, i) -> tuple[str, str]:
    """Image and depth path of one view, relative to the root."""
    return (f"Undistorted_SfM/{scene}/images/{i:04d}.jpg",
            f"phoenix/S6/zl548/MegaDepth_v1/{scene}/dense0/depths/{i:04d}.h5")


def write_yfcc_view(root, scene, i, image, depth, K, pose) -> None:
    test = root / "raw_data" / "yfcc100m" / scene / "test"
    write_image(test / "images" / f"{i:04d}.jpg", image)
    write_depth(test / "depths" / f"{i:04d}.h5", depth)
    values = {"K": K, "R": pose[:3, :3], "T": pose[:3, 3], "imsize": np.array([image.shape[1::-1]], np.float64)}
    with atomic_path(test / "calibration" / f"calibration_{i:04d}.h5") as temporary:
        temporary.write_bytes(hdf5_image(lambda file: [file.create_dataset(name, data=value)
                                                       for name, value in values.items()]))


def write_yfcc_scene(root, scene, n, pairs) -> None:
    test = root / "raw_data" / "yfcc100m" / scene / "test"
    write_text(test / "images.txt", [f"images/{i:04d}.jpg" for i in range(n)])
    write_text(test / "calibration.txt", [f"calibration/calibration_{i:04d}.h5" for i in range(n)])
    with atomic_path(root / "raw_data" / "pairs" / f"{scene}-te-{len(pairs)}-pairs.pkl") as temporary:
        temporary.write_bytes(pickle.dumps([list(pair) for pair in pairs], protocol=2))


def write_scannet_view(root, scene, i, image, depth, K, pose) -> None:
    folder = root / f"scene{scene}_00"
    write_image(folder / "img" / f"{i}.jpg", image)
    write_matrix(folder / "extrinsic" / f"{i}.txt", np.linalg.inv(pose))
    write_matrix(folder / "intrinsic" / f"{i}.txt", K)
    millimetres = np.round(depth * 1000)
    png = cv2.imencode(".png", np.where(millimetres < 65535, millimetres, 0).astype(np.uint16),
                       [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
    with atomic_path(folder / "depth" / f"{i}.png") as temporary:
        temporary.write_bytes(png.tobytes())


def make_scene(number, save_path, images_per_scene, size, seed, photographs, layouts, pairs) -> None:
    """Render scene `number` and write it; its marker under scenes/ comes last."""
    save_path, scene, rng = Path(save_path), f"{number:04d}", np.random.default_rng([seed, number])
    world = build_world(rng, 64 * max(size) / 640, photographs)
    rectangles, atlas = Rectangles(world.rectangles), Atlas(world.textures)
    cameras = place_cameras(rng, world, rectangles, images_per_scene, size)
    depths = []
    for i, (K, pose) in enumerate(cameras):
        view_rng = np.random.default_rng([seed, number, 1 + i])
        image, depth = render(view_rng, rectangles, atlas, K, pose, size, SHADOW_RADIUS)
        depths.append(depth)
        if "megadepth" in layouts:
            write_megadepth_view(save_path / "megadepth", scene, i, image, depth)
        if "yfcc" in layouts:
            write_yfcc_view(save_path / "yfcc", scene, i, image, depth, K, pose)
        if "scannet" in layouts:
            write_scannet_view(save_path / "scannet", scene, i, image, depth, K, pose)

    image_paths, depth_paths = zip(*(megadepth_paths(scene, i) for i in range(images_per_scene)))
    info = scene_info_from_depth(image_paths, depth_paths, [opencv_to_colmap_K(K) for K, _ in cameras],
                                 [pose for _, pose in cameras], depths.__getitem__, progress=False)
    chosen = choose_pairs(np.random.default_rng([seed, number, 0]), info["overlap_matrix"], pairs)
    if "yfcc" in layouts:
        write_yfcc_scene(save_path / "yfcc", scene, images_per_scene, chosen)
    if "megadepth" in layouts:
        write_scene_info(save_path / "megadepth" / "scene_info" / f"{scene}.0.npz", info)
    write_json(marker_path(save_path, scene), {"scene": scene, "images": images_per_scene, "pairs": chosen})


def marker_path(save_path, scene) -> Path:
    return Path(save_path) / "scenes" / f"{scene}.json"


def find_photographs(folder) -> list[str]:
    """Every picture under `folder` that OpenCV reads, sorted."""
    if not Path(folder).is_dir():
        raise InputError(f"--textures: no such folder: {folder}")
    found = [str(path) for path in sorted(Path(folder).rglob("*")) if path.is_file() and cv2.haveImageReader(str(path))]
    if not found:
        raise InputError(f"--textures: no pictures that OpenCV reads under {folder}")
    return found


def check_settings(save_path, settings) -> None:
    """Refuse to mix scenes of different settings in one folder; note them in a new one."""
    check_folder(save_path)
    path = Path(save_path) / "make_scenes.json"
    if path.exists():
        there = read_json(path)
        if not isinstance(there, dict):
            raise InputError(f"{path} is damaged: delete it")
        other = [name for name in settings if there.get(name) != settings[name]]
        if other:
            raise InputError(f"{path} was made with other settings ({', '.join(other)}): "
                             "give the same ones or another --save_path")
    write_json(path, settings)


def make_scenes(save_path, scenes=10, images_per_scene=40, size=(640, 480), seed=0, textures=None, layouts=LAYOUTS,
                pairs=50, workers=None, first_scene=0) -> list[str]:
    """Make scenes first_scene .. first_scene + scenes - 1 under `save_path`, those that are not there yet.

    size (w, h) pixels; textures: folder of photographs to cut textures from, else they are drawn; pairs: at most so
    many a scene for YFCC and ScanNet; workers: processes (None: one per core). The result does not depend on
    `workers`, nor that of a scene on which others are made. Returns the scenes' names.
    """
    if scenes < 1 or images_per_scene < 2 or first_scene < 0 or first_scene + scenes > 10000:
        raise InputError("need --scenes >= 1, --images_per_scene >= 2 and scene numbers between 0 and 9999")
    if min(size) < 64:
        raise InputError(f"--size {size[0]} {size[1]}: both sides must be at least 64 pixels")
    if not layouts or set(layouts) - set(LAYOUTS):
        raise InputError(f"--layouts: choose among {' '.join(LAYOUTS)}")
    if seed < 0 or pairs < 0 or (workers is not None and workers < 1):
        raise InputError("need --seed >= 0, --pairs >= 0 and --workers >= 1")
    photographs = find_photographs(textures) if textures else []
    layouts = [layout for layout in LAYOUTS if layout in layouts]
    check_settings(save_path, {
        "version": VERSION, "images_per_scene": images_per_scene, "size": list(size), "seed": seed, "layouts": layouts,
        "pairs": pairs, "textures": [str(Path(path).relative_to(textures)) for path in photographs]})

    for folder in {stray.parent for stray in Path(save_path).rglob(".*.tmp*")}:
        remove_strays(folder)
    numbers = range(first_scene, first_scene + scenes)
    todo = [number for number in numbers if not marker_path(save_path, f"{number:04d}").exists()]
    make = partial(make_scene, save_path=str(save_path), images_per_scene=images_per_scene, size=tuple(size), seed=seed,
                   photographs=photographs, layouts=layouts, pairs=pairs)
    workers = max(1, min(workers or available_cores(), len(todo)))
    with worker_pool(workers) as pool, tqdm(total=scenes, initial=scenes - len(todo), desc="scenes",
                                            unit="scene") as progress:
        for _ in in_order(pool, make, todo, ahead=workers):
            progress.update()
    if "scannet" in layouts:
        done = [read_json(path) for path in sorted((Path(save_path) / "scenes").glob("[0-9]*.json"))]
        write_text(Path(save_path) / "scannet" / "pairs.txt",
                   [f"scene{scene['scene']}_00/img/{i}.jpg scene{scene['scene']}_00/img/{j}.jpg"
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
