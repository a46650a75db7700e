"""Offline step: raw YFCC or ScanNet evaluation data -> one HDF5 file of features and pairs (SPEC 2, 3, 13).

    python3 -m dump.dump --config configs/yfcc_eval_sift.yaml [--raw_data_dir DIR] [--output FILE] [--KEY VALUE ...]

The file has one group per quantity, and in each one dataset per pair, named by its number "0" .. "n-1":

    K1 K2              (3, 3) float64, OpenCV's pixel convention, for the images as stored
    R T                (3, 3) and (3,) float64: camera 1 -> camera 2, T in the raw data's unit of length
    e f                (3, 3) float64: essential matrix [T]_x R and fundamental matrix; x2^T e x1 = 0
    img_path1 img_path2    string, relative to raw_data_dir
    kpt1 kpt2          (N, 3) float32: x, y in pixels of the image as stored, and the score
    desc1 desc2        (N, D) float32
    size1 size2        (2,) int32: w, h
    depth1 depth2      (N,) float32: depth at the keypoints, 0 = unknown; only for images that have a depth map, that
                       is YFCC test/depths/<image stem>.h5, ScanNet depth/<N>.png (16-bit millimetres) or depth/<N>.h5

kpt, desc, size and depth are stored once per image under images/<img_path>/ and hard-linked into the pairs. A pair of
which an image, its camera or its pose cannot be read is left out, and the numbers close up. File attributes: `format`
"imp-eval", `version` 1, `dataset`, `feature_type`, `settings` (JSON); the string dataset `skipped` lists, as JSON, what
was left out.

It may be stopped at any moment: the features of each image wait in OUTPUT.parts/, which the next run goes on with, and
the HDF5 file appears when it is whole. The folder goes when nothing had to be left out.
"""
import argparse
import json
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import h5py
import numpy as np
from tqdm import tqdm

from dump.workers import available_cores, each_image, extractor, stop_on_sigterm, worker_pool
from tools.cli import InputError, report_skipped, run
from tools.config import overlay, parse_overrides, read_yaml
from tools.correspondences import depth_at
from tools.files import atomic_path, read_depth, read_image, read_lines
from tools.geometry import essential_matrix, make_pose, relative_pose, resize_keypoints
from tools.manifest import check_settings, claim
from tools.pair_list import read_pair_list
from tools.records import read_record, write_record
from tools.safe_pickle import load_pickle

FORMAT = "imp-eval"
VERSION = 1
YFCC_SCENES = ["buckingham_palace", "notre_dame_front_facade", "reichstag", "sacre_coeur"]
DEFAULTS = {
    "dataset": "yfcc",  # yfcc or scannet
    "feature_type": "sift",  # sift or spp
    "raw_data_dir": None,  # yfcc: the folder of yfcc100m/ and pairs/; scannet: the folder of the scenes
    "output": None,  # HDF5 file
    "scenes": YFCC_SCENES,  # yfcc; []: all there are
    "pair_list": None,  # scannet: `scene/img/a.jpg scene/img/b.jpg` lines, or a pair list with ground truth
    "resize": [],  # []: full size; [longer side]; [w, h]
    "extractor": {},
}
EXTRACTOR_DEFAULTS = {  # SPEC 3, "Evaluation"
    "sift": {"max_keypoints": 2000, "contrast_threshold": 1e-5, "unique_locations": False},
    "spp": {"max_keypoints": 2000, "keypoint_threshold": 0.0025, "nms_radius": 4},
}
MAX_ASPECT_DIFFERENCE = 0.02


@dataclass(frozen=True)
class View:
    """One image and what belongs to it; paths relative to raw_data_dir."""

    image_path: str
    camera_paths: tuple[str, ...]  # yfcc: calibration; scannet: intrinsic, extrinsic
    depth_paths: tuple[str, ...]  # where a depth map may be


@dataclass(frozen=True)
class ViewTask:
    """One image to extract features from."""

    raw_data_dir: str
    view: View
    part_path: Path
    config: dict
    device: str


def load_config(path, arguments: list[str]) -> dict:
    """Defaults, overlaid by a YAML file and by `--key value` arguments; `--extractor.max_keypoints 500` reaches in.

    Raises InputError for a key that is unknown, naming the nearest known one, of the wrong type, or missing.
    """
    config, extractor_values = dict(DEFAULTS), []
    for values, source in ((read_yaml(path), str(path)), (parse_overrides(arguments), "command line")):
        nested = values.pop("extractor", None) or {}
        if not isinstance(nested, dict):
            raise InputError(f"{source}: extractor should hold keys and values, not {nested!r}")
        nested |= {key.partition(".")[2]: values.pop(key) for key in list(values) if key.startswith("extractor.")}
        extractor_values.append((nested, f"{source}, extractor"))
        for key in ("scenes", "resize"):
            if values.get(key, []) is None:
                values[key] = []
            elif isinstance(values.get(key), (str, int)):
                values[key] = [values[key]]
        config = overlay(config, values, source)
    for key, known in (("dataset", ("yfcc", "scannet")), ("feature_type", tuple(EXTRACTOR_DEFAULTS))):
        if config[key] not in known:
            raise InputError(f"{key} {config[key]!r} is unknown: known are {', '.join(known)}")
    needed = ["raw_data_dir", "output"] + (["pair_list"] if config["dataset"] == "scannet" else [])
    for key in needed:
        if not config[key]:
            raise InputError(f"{key} is not set: give it in {path} or as --{key}")
    if not all(isinstance(scene, str) for scene in config["scenes"]):
        raise InputError(f"scenes {config['scenes']}: expected names; put quotes round a name of digits")
    if len(config["resize"]) > 2 or not all(type(side) is int and side > 0 for side in config["resize"]):
        raise InputError(f"resize {config['resize']}: expected nothing, [longer side] or [width, height] in pixels")
    config["extractor"] = EXTRACTOR_DEFAULTS[config["feature_type"]]
    for nested, source in extractor_values:
        config["extractor"] = overlay(config["extractor"], nested, source)
    return config


def _yfcc_scene(raw_data_dir, scene) -> list[tuple[View, View]]:
    root = PurePosixPath("yfcc100m", scene, "test")
    images, cameras = (read_lines(Path(raw_data_dir, root, name)) for name in ("images.txt", "calibration.txt"))
    if len(images) != len(cameras):
        raise InputError(f"{Path(raw_data_dir, root)}: images.txt names {len(images)} files, calibration.txt "
                         f"{len(cameras)}; they must go together line by line")
    lists = sorted(Path(raw_data_dir, "pairs").glob(f"{scene}-te-*-pairs.pkl"))
    if not lists:
        raise InputError(f"no {scene}-te-1000-pairs.pkl in {Path(raw_data_dir, 'pairs')}")
    path = next((path for path in lists if path.name == f"{scene}-te-1000-pairs.pkl"), lists[0])
    try:
        pairs = np.array(load_pickle(path), dtype=np.int64).reshape(-1, 2)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no list of pairs of image numbers: {error}") from None
    if len(pairs) and not 0 <= pairs.min() <= pairs.max() < len(images):
        raise InputError(f"{path} names image {pairs.max()} of {len(images)}")
    views = [View(str(root / image), (str(root / camera),), (str(root / "depths" / f"{PurePosixPath(image).stem}.h5"),))
             for image, camera in zip(images, cameras)]
    return [(views[i], views[j]) for i, j in pairs]


def yfcc_pairs(raw_data_dir, scenes: list[str]) -> list[tuple[View, View]]:
    """Pairs of OANet's packaging (SPEC 2), scene by scene; all scenes if `scenes` is empty."""
    if not scenes:
        scenes = sorted(path.parent.name for path in Path(raw_data_dir, "yfcc100m").glob("*/test"))
        if not scenes:
            raise InputError(f"{Path(raw_data_dir, 'yfcc100m')} holds no <scene>/test")
    return [pair for scene in scenes for pair in _yfcc_scene(raw_data_dir, scene)]


def _scannet_view(name, pair_list) -> View:
    original = re.fullmatch(r"(?:.*/)?(scene\d+_\d+)/sens/frame-(\d+)\.color\.jpg", name)
    path = PurePosixPath(original[1], "img", f"{int(original[2])}.jpg") if original else PurePosixPath(name)
    if len(path.parts) < 3 or path.parent.name != "img":
        raise InputError(f"{pair_list}: {name} is neither <scene>/img/<N>.jpg nor <scene>/sens/frame-<N>.color.jpg")
    beside = [str(path.parent.parent / folder / path.stem) for folder in ("intrinsic", "extrinsic", "depth")]
    return View(str(path), (f"{beside[0]}.txt", f"{beside[1]}.txt"), (f"{beside[2]}.png", f"{beside[2]}.h5"))


def scannet_pairs(pair_list) -> list[tuple[View, View]]:
    """Pairs of SGMNet's packaging (SPEC 2) that a pair list names; cameras come from the raw data all the same."""
    return [(_scannet_view(pair.image0, pair_list), _scannet_view(pair.image1, pair_list))
            for pair in read_pair_list(pair_list)]


def _yfcc_camera(raw_data_dir, view, image_size):
    path = Path(raw_data_dir, view.camera_paths[0])
    try:
        with h5py.File(path, "r") as file:
            K, R, T, imsize = (np.asarray(file[name][()], np.float64) for name in ("K", "R", "T", "imsize"))
        pose = make_pose(R, T)
        K = K.reshape(3, 3)
        w, h = np.ravel(imsize)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"not a calibration file: {path} ({error})") from None
    if (w, h) != image_size:
        raise InputError(f"{path} is for an image of {w:g}x{h:g}, it is {image_size[0]}x{image_size[1]}")
    K[:2, 2] = (w - 1) / 2, (h - 1) / 2
    return K, pose


def _scannet_camera(raw_data_dir, view, image_size):
    intrinsic, extrinsic = (Path(raw_data_dir, path) for path in view.camera_paths)
    try:
        K = np.loadtxt(intrinsic)[:3, :3].reshape(3, 3)
        pose = np.linalg.inv(np.loadtxt(extrinsic).reshape(4, 4))
    except (OSError, ValueError, IndexError, np.linalg.LinAlgError) as error:
        raise InputError(f"cannot read {intrinsic} and {extrinsic.parent.name}/{extrinsic.name}: {error}") from None
    return K, pose


def read_camera(dataset: str, raw_data_dir, view: View, image_size: tuple[int, int]):
    """(K (3, 3) in OpenCV's convention, pose (4, 4) world-to-camera) of a view; InputError if they cannot be used."""
    K, pose = (_yfcc_camera if dataset == "yfcc" else _scannet_camera)(raw_data_dir, view, image_size)
    if not (np.isfinite(K).all() and np.isfinite(pose).all() and K[0, 0] > 0 and K[1, 1] > 0):
        raise InputError(f"camera not usable: {' '.join(view.camera_paths)}")
    return K, pose


def resized(image: np.ndarray, resize: list[int]) -> np.ndarray:
    """Image (H, W) at the size that `resize` asks for (see DEFAULTS), enlarged if need be."""
    h, w = image.shape
    if len(resize) == 1:
        scale = resize[0] / max(w, h)
        resize = [round(w * scale), round(h * scale)]
    # linear, also when shrinking: what the published results were made with
    return cv2.resize(image, resize, interpolation=cv2.INTER_LINEAR) if resize else image


def load_view(task: ViewTask):
    """(image (H, W) uint8, depth map or None, what is wrong with that or None); a string if the image is unreadable."""
    try:
        image = read_image(Path(task.raw_data_dir, task.view.image_path))
    except (InputError, cv2.error) as error:
        return str(error)
    path = next((path for path in task.view.depth_paths if Path(task.raw_data_dir, path).is_file()), None)
    if path is None:
        return image, None, None
    try:
        depth = read_depth(Path(task.raw_data_dir, path))
        if abs(depth.shape[1] / depth.shape[0] / (image.shape[1] / image.shape[0]) - 1) > MAX_ASPECT_DIFFERENCE:
            raise InputError(f"depth map {path} is of another shape than its image")
    except InputError as error:
        return image, None, str(error)
    return image, depth, None


def dump_view(task: ViewTask, loaded):
    """Extract features and write the part. Returns None, or why the image cannot be used, as a string."""
    if isinstance(loaded, str):
        return loaded
    image, depth, depth_problem = loaded
    h, w = image.shape
    small = resized(image, task.config["resize"])
    features = extractor(task.config["feature_type"], task.config["extractor"], task.device)(small)
    # in double precision, so that keypoints of an image that was not resized stay what they are
    found = features.keypoints.astype(np.float64)
    keypoints = resize_keypoints(found, w / small.shape[1], h / small.shape[0]).astype(np.float32)
    part = {
        "size": np.array([w, h], np.int32),
        "kpt": np.c_[keypoints, features.scores].astype(np.float32),
        "desc": features.descriptors.astype(np.float32),
        "depth_problem": depth_problem,
    }
    if depth is not None:
        # a sensor's depth maps are often smaller than its images, of the same view
        places = resize_keypoints(keypoints.astype(np.float64), depth.shape[1] / w, depth.shape[0] / h)
        part["depth"] = depth_at(depth, places)
    write_record(task.part_path, part)
    return None


def _part_path(parts, view):
    return Path(parts, f"{view.image_path}.npy")


def _extract(views, config, parts, workers, device) -> dict:
    """Make the parts that are not there yet; why not, by view, for images that cannot be used."""
    for stray in parts.rglob(".*.tmp.npy"):
        stray.unlink()
    missing = [view for view in views if not _part_path(parts, view).exists()]
    tasks = [ViewTask(config["raw_data_dir"], view, _part_path(parts, view), config, device) for view in missing]
    unusable = {}
    with worker_pool(workers) as pool:
        results = each_image(pool, workers, config["feature_type"], load_view, dump_view, tasks)
        for problem, view in tqdm(zip(results, missing), "images", len(views), initial=len(views) - len(missing),
                                  disable=None):
            if problem:
                unusable[view] = problem
    return unusable


def _write_pair(file, number, view1, view2, cameras):
    (K1, pose1), (K2, pose2) = cameras[view1], cameras[view2]
    T_1to2 = relative_pose(pose1, pose2)
    e = essential_matrix(T_1to2)
    f = np.linalg.inv(K2).T @ e @ np.linalg.inv(K1)
    values = {"K1": K1, "K2": K2, "R": T_1to2[:3, :3], "T": T_1to2[:3, 3], "e": e, "f": f,
              "img_path1": view1.image_path, "img_path2": view2.image_path}
    for name, value in values.items():
        file[f"{name}/{number}"] = value
    for side, view in (("1", view1), ("2", view2)):
        for name, dataset in file["images"][view.image_path].items():
            file[f"{name}{side}/{number}"] = dataset


def _settings(config):
    which_pairs = "scenes" if config["dataset"] == "yfcc" else "pair_list"
    return {"format": FORMAT, "version": VERSION, "dataset": config["dataset"], "feature_type": config["feature_type"],
            "settings": {which_pairs: config[which_pairs], "resize": config["resize"], **config["extractor"]}}


def _read_finished(path, config) -> tuple[int, list]:
    """Number of pairs of a finished file, and what was left out; InputError if other settings made it."""
    try:
        with h5py.File(path, "r") as file:
            made = {**file.attrs, "settings": json.loads(file.attrs["settings"])}
            n_pairs, skipped = len(file["K1"]), json.loads(file["skipped"].asstr()[()])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is there but no finished dump ({error}): delete it, or change output") from None
    check_settings({name: value.item() if isinstance(value, np.generic) else value for name, value in made.items()},
                   _settings(config), path)
    return n_pairs, skipped


def dump_eval(config: dict, workers: int = 1, device: str = "auto") -> tuple[int, list]:
    """Make the HDF5 file of a configuration (see load_config) -> (number of pairs, [(image, why it was left out)]).

    A finished file made with the same settings is kept. Raises InputError if nothing can be made of the raw data.
    """
    output, raw_data_dir = Path(config["output"]), config["raw_data_dir"]
    if output.exists():
        return _read_finished(output, config)
    if not Path(raw_data_dir).is_dir():
        raise InputError(f"raw_data_dir {raw_data_dir} is not a folder")
    if config["dataset"] == "yfcc":
        pairs = yfcc_pairs(raw_data_dir, config["scenes"])
    else:
        pairs = scannet_pairs(config["pair_list"])
    views = sorted({view for pair in pairs for view in pair}, key=lambda view: view.image_path)
    extractor(config["feature_type"], config["extractor"], device)  # bad settings must stop here, not at each image
    parts = Path(f"{output}.parts")
    claim(parts, {"format": f"{FORMAT}-parts", "version": VERSION, "feature_type": config["feature_type"],
                  "settings": {"resize": config["resize"], **config["extractor"]}})
    unusable = _extract(views, config, parts, workers, device)

    for stray in output.parent.glob(f".{output.stem}.*.tmp{output.suffix}"):
        stray.unlink()
    cameras, depth_problems = {}, []
    with atomic_path(output) as temporary, h5py.File(temporary, "w") as file:
        for view in tqdm(views, "images written", disable=None):
            if view in unusable:
                continue
            part = read_record(_part_path(parts, view))
            try:
                cameras[view] = read_camera(config["dataset"], raw_data_dir, view, tuple(part["size"].tolist()))
            except InputError as error:
                unusable[view] = str(error)
                continue
            if part["depth_problem"]:
                depth_problems.append((view.image_path, part["depth_problem"]))
            for name in ("kpt", "desc", "size", "depth"):
                if name in part:
                    file[f"images/{view.image_path}/{name}"] = part[name]
        good = [pair for pair in pairs if not unusable.keys() & set(pair)]
        if not good:
            raise InputError(f"none of {len(pairs)} pairs in {raw_data_dir} can be used"
                             + "".join(f"; {reason}" for reason in list(unusable.values())[:1]))
        for number, pair in enumerate(tqdm(good, "pairs written", disable=None)):
            _write_pair(file, number, *pair, cameras)
        uses = Counter(view for pair in pairs for view in set(pair))
        skipped = [(view.image_path, f"{reason}; its {uses[view]} pairs are left out")
                   for view, reason in unusable.items()] + depth_problems
        made = _settings(config)
        file.attrs.update({**made, "settings": json.dumps(made["settings"])})
        file["skipped"] = json.dumps(skipped)
    if not skipped:
        shutil.rmtree(parts)
    return len(good), skipped


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="dump.dump", description="Features and pairs of raw YFCC or ScanNet data in one HDF5 file.",
        epilog="Any key of the YAML file can be given as --KEY VALUE: "
               f"{', '.join(DEFAULTS)}; extractor settings as --extractor.max_keypoints 500.")
    parser.add_argument("--config", required=True, help="YAML file, such as configs/yfcc_eval_sift.yaml")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
    parser.add_argument("--device", default="auto", help="for spp: auto, cpu, cuda or cuda:N")
    args, others = parser.parse_known_args(argv)
    config = load_config(args.config, others)
    stop_on_sigterm()
    started = time.perf_counter()
    try:
        n_pairs, skipped = dump_eval(config, args.workers, args.device)
    except OSError as error:
        raise InputError(f"cannot write {config['output']}: {error.strerror or error}; what is done is kept") from None
    print(f"{config['output']}: {n_pairs} pairs, {Path(config['output']).stat().st_size / 1e6:.1f} MB, "
          f"{time.perf_counter() - started:.1f} s")
    status = report_skipped(skipped, "images or depth maps")
    if skipped:
        print(f"to try them again, delete {config['output']}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run(main))
