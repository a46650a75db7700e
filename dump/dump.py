"""Offline step: raw YFCC or ScanNet evaluation data -> one HDF5 file of features and pairs.

    python3 -m dump.dump --config configs/yfcc_eval_sift.yaml [--raw_data_dir DIR] [--output FILE] [--KEY VALUE ...]
                         [--workers 8] [--shard 0/4]

A YAML file of the original (data_name, rawdata_dir, ..., extractor: {name, num_kpt, ...}) is read as it is.

docs/formats.md lists what the file holds. A pair of which an image, its camera or its pose cannot be read is left out,
and the numbers close up. Depth is for images that have a depth map: YFCC test/depths/<image stem>.h5, ScanNet
depth/<N>.png (16-bit millimetres) or depth/<N>.h5.

It may be stopped at any moment: the features of each image wait in OUTPUT.parts/, from which the next run resumes, and
the HDF5 file appears when it is whole. The folder goes when nothing had to be left out.

Shards, one a machine, extract the features of every N-th image. The run without --shard that follows them makes what
they lack and joins all into the HDF5 file: the same bytes as without shards. Under torchrun the first process does so.

Memory: per worker one image with its depth map; one image's features, and a few KB a pair, while joining.
"""
import argparse
import contextlib
import errno
import json
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

from dump.report import peak_memory_mb, print_rates, report_verified, why, write_report
from dump.shards import parse_shard, under_torchrun, wait_for_all
from dump.workers import (
    available_cores,
    batches_of,
    check_name,
    each_image,
    extractor,
    is_whole,
    stop_on_sigterm,
    weights_of,
    worker_pool,
)
from tools.cli import InputError, OutputError, describe_error, reason, report_skipped, run
from tools.config import overlay, parse_overrides, read_config
from tools.correspondences import depth_at
from tools.features import FEATURE_TYPES, Features
from tools.files import (
    atomic_path,
    below,
    check_folder,
    hdf5_array,
    header_size,
    open_hdf5,
    read_depth,
    read_image,
    read_lines,
)
from tools.geometry import (
    essential_matrix,
    make_pose,
    relative_pose,
    resize_keypoints,
)
from tools.locks import locked
from tools.manifest import check_settings, claim
from tools.original import from_dump_config, is_dump_config
from tools.pair_list import read_pair_list
from tools.records import Field, read_record, write_record
from tools.safe_pickle import load_pickle, numbers
from tools.scannet import beside, packed_name, read_scannet_camera, usable_camera

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
    "workers": 0,  # processes; 0: one per core
}
MAX_ASPECT_DIFFERENCE = 0.02
PART_FIELDS = {"size": Field("i", (2,)), "kpt": Field("f", ("N", 3)), "desc": Field("f", ("N", "D")),
               "depth_problem": Field("U"), "depth": Field("f", ("N",), optional=True)}
BYTES_PER_PAIR = 8192  # about what a pair takes in the HDF5 file besides its images


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


def _whole(value):
    """A whole number that a YAML file has as 1600.0 or "1600"; anything else as it is."""
    try:
        return int(float(value)) if not isinstance(value, bool) and float(value) == int(float(value)) else value
    except (TypeError, ValueError, OverflowError):
        return value


def load_config(path, arguments: list[str]) -> dict:
    """Defaults, overlaid by a YAML file and by `--key value` arguments; `--extractor.max_keypoints 500` reaches in.

    A YAML file of the original's form is read, too; its num_process is our `workers`.
    Raises InputError for a key that is unknown, naming the nearest known one, of the wrong type, or missing.
    """
    config, extractor_values = dict(DEFAULTS), []
    file = read_config(path)
    if is_dump_config(file):
        file = from_dump_config(file, str(path))
    for values, source in ((file, str(path)), (parse_overrides(arguments), "command line")):
        nested = values.pop("extractor", None) or {}
        if not isinstance(nested, dict):
            raise InputError(f"{source}: extractor should hold keys and values, not {nested!r}")
        nested |= {key.partition(".")[2]: values.pop(key) for key in list(values) if key.startswith("extractor.")}
        extractor_values.append((nested, f"{source}, extractor"))
        for key in ("scenes", "resize"):
            if values.get(key, []) is None:
                values[key] = []
            elif isinstance(values.get(key), (str, int, float)):
                values[key] = [values[key]]
        config = overlay(config, values, source)
    for key, known in (("dataset", ("yfcc", "scannet")), ("feature_type", tuple(FEATURE_TYPES))):
        if config[key] not in known:
            raise InputError(f"{key} {config[key]!r} is unknown: known are {', '.join(known)}")
    needed = ["raw_data_dir", "output"] + (["pair_list"] if config["dataset"] == "scannet" else [])
    for key in needed:
        if not config[key]:
            raise InputError(f"{key} is not set: give it in {path} or as --{key}")
    if not all(isinstance(scene, str) for scene in config["scenes"]):
        raise InputError(f"scenes {config['scenes']}: expected names; put quotes round a name of digits")
    config["resize"] = [_whole(side) for side in config["resize"]]
    if len(config["resize"]) > 2 or not all(type(side) is int and side > 0 for side in config["resize"]):
        raise InputError(f"resize {config['resize']}: expected nothing, [longer side] or [width, height] in pixels")
    if config["workers"] < 0:
        raise InputError(f"workers must be at least 1, not {config['workers']}")
    config["extractor"] = FEATURE_TYPES[config["feature_type"]].eval_settings
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
    content = load_pickle(path)
    try:
        numbers(content, None, 2)  # level by level: a list of a pickle may hold itself, which has no size
        pairs = np.array(content).reshape(len(content), -1)
    except Exception as error:  # ragged, for one
        raise InputError(f"{path} is not a list of pairs of image numbers: {error}") from None
    if len(content) and (pairs.dtype.kind not in "iu" or pairs.shape[1] != 2):
        raise InputError(f"{path} is not a list of pairs of image numbers")
    if len(content) and not 0 <= pairs.min() <= pairs.max() < len(images):
        raise InputError(f"{path} names image {pairs.max() if pairs.min() >= 0 else pairs.min()} of {len(images)}")
    views = [View(str(root / image), (str(root / camera),), (str(root / "depths" / f"{PurePosixPath(image).stem}.h5"),))
             for image, camera in zip(images, cameras)]
    return [(views[i], views[j]) for i, j in pairs]


def yfcc_pairs(raw_data_dir, scenes: list[str]) -> list[tuple[View, View]]:
    """Pairs of OANet's packaging, scene by scene; all scenes if `scenes` is empty."""
    if not scenes:
        scenes = sorted(path.parent.name for path in Path(raw_data_dir, "yfcc100m").glob("*/test"))
        if not scenes:
            raise InputError(f"{Path(raw_data_dir, 'yfcc100m')} holds no <scene>/test")
    return [pair for scene in scenes for pair in _yfcc_scene(raw_data_dir, scene)]


def _scannet_view(name) -> View:
    name = packed_name(name)
    path = PurePosixPath(name)
    if len(path.parts) < 3 or path.parent.name != "img":
        return View(name, (), ())  # _view_task says what is wrong
    return View(name, (beside(name, "intrinsic", ".txt"), beside(name, "extrinsic", ".txt")),
                (beside(name, "depth", ".png"), beside(name, "depth", ".h5")))


def scannet_pairs(pair_list) -> list[tuple[View, View]]:
    """Pairs of SGMNet's packaging that a pair list names; cameras come from the raw data all the same."""
    return [(_scannet_view(pair.image0), _scannet_view(pair.image1)) for pair in read_pair_list(pair_list)]


def _yfcc_camera(raw_data_dir, view, image_size):
    path = below(raw_data_dir, view.camera_paths[0])
    try:
        with open_hdf5(path) as file:
            K, R, T, imsize = (hdf5_array(file, name).astype(np.float64) for name in ("K", "R", "T", "imsize"))
            K, pose = K.reshape(3, 3), make_pose(R.reshape(3, 3), T.reshape(3))
            w, h = np.ravel(imsize)
    except InputError as error:
        raise InputError(f"not a calibration file: {path} ({error})") from None
    if (w, h) != image_size:
        raise InputError(f"{path} is for an image of {w:g}x{h:g}, it is {image_size[0]}x{image_size[1]}")
    K[:2, 2] = (w - 1) / 2, (h - 1) / 2
    return K, pose


def read_camera(dataset: str, raw_data_dir, view: View, image_size: tuple[int, int]):
    """(K (3, 3) in OpenCV's convention, pose (4, 4) world-to-camera) of a view; InputError if they cannot be used."""
    if dataset == "scannet":
        return read_scannet_camera(raw_data_dir, view.image_path)
    return usable_camera(*_yfcc_camera(raw_data_dir, view, image_size), " ".join(view.camera_paths))


def resized(image_size: tuple[int, int], resize: list[int]) -> tuple[int, int]:
    """Size (w, h) that an image of `image_size` is brought to, enlarged if need be (see DEFAULTS)."""
    if len(resize) == 1:
        scale = resize[0] / max(image_size)
        return round(image_size[0] * scale), round(image_size[1] * scale)
    return tuple(resize) or image_size


def load_view(task: ViewTask):
    """(image at the size of the config (H, W) uint8, (w, h) as stored, depth map or None, what is wrong with that or
    None); InputError if the image is unreadable."""
    image = read_image(below(task.raw_data_dir, task.view.image_path),
                       FEATURE_TYPES[task.config["feature_type"]].color)
    h, w = image.shape[:2]
    size = resized((w, h), task.config["resize"])
    if size != (w, h):
        # linear, also when shrinking: what the published results were made with
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    path = next((path for path in task.view.depth_paths if below(task.raw_data_dir, path).exists()), None)
    if path is None:
        return image, (w, h), None, None
    try:
        depth = read_depth(below(task.raw_data_dir, path))
        if not depth.size or abs(depth.shape[1] / depth.shape[0] / (w / h) - 1) > MAX_ASPECT_DIFFERENCE:
            raise InputError(f"depth map {path} is of another shape than its image")
    except Exception as error:
        return image, (w, h), None, reason(error)
    return image, (w, h), depth, None


def finish_view(task: ViewTask, loaded: tuple, features: Features) -> None:
    """Write the part of an image as load_view read it."""
    image, (w, h), depth, depth_problem = loaded
    # in double precision, so that keypoints of an image that was not resized stay what they are
    found = features.keypoints.astype(np.float64)
    keypoints = resize_keypoints(found, w / image.shape[1], h / image.shape[0]).astype(np.float32)
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


def _extracted_size(task: ViewTask):
    size = header_size(Path(task.raw_data_dir, task.view.image_path))
    return size and resized(size, task.config["resize"])


def _part_path(parts, view):
    return check_name(below(parts, f"{view.image_path}.npy"))


def _view_task(config, view, parts) -> ViewTask:
    """InputError if the view's names cannot be used."""
    if not view.camera_paths:
        raise InputError(f"{view.image_path} is neither <scene>/img/<N>.jpg nor <scene>/sens/frame-<N>.color.jpg")
    for path in (*view.camera_paths, *view.depth_paths):
        below(config["raw_data_dir"], path)
    return ViewTask(config["raw_data_dir"], view, _part_path(parts, view), config)


def _extract(views, config, parts, recipe, workers, shard) -> tuple[dict, int, int]:
    """Make the parts that are not there -> ({view that cannot be used: why}, number of images, of missing parts)."""
    tasks, unusable = [], {}
    for view in views:
        try:
            tasks.append(_view_task(config, view, parts))
        except InputError as error:
            unusable[view] = str(error)
    there = {task.part_path for task in tasks if is_whole(task.part_path, PART_FIELDS)}
    batches = batches_of(tasks, recipe, _extracted_size, shard)
    own = [task for batch in batches for task in batch]
    n_missing = sum(task.part_path not in there for task in own)
    with worker_pool(workers) as pool:
        results = each_image(pool, workers, recipe, batches, lambda task: task.part_path in there, load_view,
                             finish_view)
        for task, problem in tqdm(results, "images", len(own), initial=len(own) - n_missing, disable=None):
            if problem:
                unusable[task.view] = problem
    return unusable, len(own) + len(views) - len(tasks), n_missing


def _write_pair(file, number, view1, view2, cameras):
    (K1, pose1), (K2, pose2) = cameras[view1], cameras[view2]
    T_1to2 = relative_pose(pose1, pose2)
    e = essential_matrix(T_1to2)
    f = np.linalg.inv(K2).T @ e @ np.linalg.inv(K1)
    values = {"K1": K1, "K2": K2, "R": T_1to2[:3, :3], "T": T_1to2[:3, 3], "e": e, "f": f,
              # of one element, as readers made for the original's files expect
              "img_path1": [view1.image_path], "img_path2": [view2.image_path]}
    for name, value in values.items():
        file[f"{name}/{number}"] = value
    for side, view in (("1", view1), ("2", view2)):
        for name, dataset in file["images"][view.image_path].items():
            file[f"{name}{side}/{number}"] = dataset


def _settings(config, weights):
    which_pairs = "scenes" if config["dataset"] == "yfcc" else "pair_list"
    return {"format": FORMAT, "version": VERSION, "dataset": config["dataset"], "feature_type": config["feature_type"],
            "settings": {which_pairs: config[which_pairs], **_feature_settings(config, weights)}}


def _feature_settings(config, weights):
    return {"resize": config["resize"], **config["extractor"], **weights}


def _read_finished(path, settings) -> dict:
    """What dump_eval returns, of a finished file; InputError if other settings made it."""
    try:
        with h5py.File(path, "r") as file:
            made = {**file.attrs, "settings": json.loads(file.attrs["settings"])}
            counts, skipped = (json.loads(file[name].asstr()[()]) for name in ("counts", "skipped"))
    except Exception as error:
        raise InputError(f"{path} is there but not a finished dump ({describe_error(error)}): delete it, or change "
                         "output") from None
    check_settings({name: value.item() if isinstance(value, np.generic) else value for name, value in made.items()},
                   settings, path)
    return {**counts, "skipped": skipped, "images_per_second": None, "pairs_per_second": None}


@contextlib.contextmanager
def _new_hdf5(path):
    """An HDF5 file to write; what HDF5 says when that fails is an OSError."""
    try:
        with h5py.File(path, "w") as file:
            yield file
    except (InputError, OSError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from None


def _join(output, config, settings, pairs, views, unusable, parts) -> tuple[dict, list]:
    """Write the HDF5 file from the parts -> (counts, [(image, why it was left out)]), which it holds, too."""
    for stray in output.parent.glob(f".{output.stem}.*.tmp{output.suffix}"):
        stray.unlink()
    # h5py cannot recover from a full disk: it would crash
    needed = sum(_part_path(parts, view).stat().st_size for view in views if view not in unusable) \
        + BYTES_PER_PAIR * len(pairs)
    if shutil.disk_usage(output.parent).free < needed:
        raise OutputError(errno.ENOSPC, f"No space left on device: {needed / 1e6:.0f} MB are needed", str(output))
    cameras, depth_problems = {}, []
    with atomic_path(output) as temporary, _new_hdf5(temporary) as file:
        for view in tqdm(views, "images written", disable=None):
            if view in unusable:
                continue
            part = read_record(_part_path(parts, view), PART_FIELDS)
            try:
                cameras[view] = read_camera(config["dataset"], config["raw_data_dir"], view,
                                            tuple(part["size"].tolist()))
            except Exception as error:
                unusable[view] = reason(error)
                continue
            if part["depth_problem"]:
                depth_problems.append((view.image_path, part["depth_problem"]))
            for name in ("kpt", "desc", "size", "depth"):
                if name in part:
                    file[f"images/{view.image_path}/{name}"] = part[name]
        good = [pair for pair in pairs if not unusable.keys() & set(pair)]
        if not good:
            raise InputError(f"none of {len(pairs)} pairs in {config['raw_data_dir']} can be used"
                             + "".join(f"; {problem}" for problem in list(unusable.values())[:1]))
        for number, pair in enumerate(tqdm(good, "pairs written", disable=None)):
            _write_pair(file, number, *pair, cameras)
        uses = Counter(view for pair in pairs for view in set(pair))
        skipped = [(view.image_path, f"{unusable[view]}; its {uses[view]} pairs are left out")
                   for view in views if view in unusable] + depth_problems
        counts = {"images": len(cameras), "pairs_tried": len(pairs), "pairs": len(good),
                  "rejected": {"image_left_out": len(pairs) - len(good)}}
        file.attrs.update({**settings, "settings": json.dumps(settings["settings"])})
        file["counts"], file["skipped"] = json.dumps(counts), json.dumps(skipped)
    return counts, skipped


def dump_eval(config: dict, workers: int = 1, device: str = "auto", shard=None) -> dict:
    """Make the HDF5 file of a configuration (see load_config), or, for shard (i, n), its part of the features.

    A finished file made with the same settings is kept. Returns {"images", "pairs_tried", "pairs", "rejected" (pairs,
    by reason), "skipped" [(image, why it was left out)], "images_per_second", "pairs_per_second"}; of a shard, pairs
    are None. Raises InputError if nothing can be made of the raw data, InUse if another process is at it.
    """
    output, raw_data_dir = Path(config["output"]), config["raw_data_dir"]
    recipe = config["feature_type"], config["extractor"], device
    extractor(*recipe)  # bad settings must stop here, not at each image
    weights = weights_of(*recipe)
    settings = _settings(config, weights)
    if output.exists():
        return _read_finished(output, settings)
    if not Path(raw_data_dir).is_dir():
        raise InputError(f"raw_data_dir {raw_data_dir} is not a folder")
    if config["dataset"] == "yfcc":
        pairs = yfcc_pairs(raw_data_dir, config["scenes"])
    else:
        pairs = scannet_pairs(config["pair_list"])
    check_folder(output.parent)
    views = sorted({view for pair in pairs for view in pair}, key=lambda view: view.image_path)
    parts = Path(f"{output}.parts")
    busy = f"another process writes {output}: wait for it, or give each its own --shard"
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(output.with_name(f".{output.name}.lock"), busy, shared=bool(shard)))
        if shard:
            stack.enter_context(locked(output.with_name(f".{output.name}.{shard[0]}.lock"), busy))
        if output.exists():  # by now
            return _read_finished(output, settings)
        claim(parts, {"format": f"{FORMAT}-parts", "version": VERSION, "feature_type": config["feature_type"],
                      "settings": _feature_settings(config, weights)})
        if not shard:
            for stray in parts.rglob(".*.tmp.npy"):
                stray.unlink()
        started = time.perf_counter()
        unusable, n_images, n_missing = _extract(views, config, parts, recipe, workers, shard)
        rates = {"images_per_second": n_missing / (time.perf_counter() - started) if n_missing else None,
                 "pairs_per_second": None}
        if shard:
            return {"images": n_images - len(unusable), "pairs_tried": None, "pairs": None, "rejected": None,
                    "skipped": [(view.image_path, unusable[view]) for view in unusable], **rates}
        started = time.perf_counter()
        counts, skipped = _join(output, config, settings, pairs, views, unusable, parts)
        rates["pairs_per_second"] = counts["pairs"] / (time.perf_counter() - started)
        if not skipped:
            shutil.rmtree(parts)
    return {**counts, "skipped": skipped, **rates}


def _shape_problems(where, group, shapes) -> list:
    problems = []
    for name, shape in shapes.items():
        if name not in group or group[name].shape != shape:
            problems.append((where, f"{name} is {group[name].shape if name in group else 'missing'}, not {shape}"))
        elif not np.isfinite(group[name][()]).all():
            problems.append((where, f"{name} has values that are not finite"))
    return problems


def verify_eval(path) -> tuple[int, list]:
    """Re-read a finished file -> (number of pairs, [(image or pair, what is wrong)]); InputError if it is none."""
    groups = {"K1": (3, 3), "K2": (3, 3), "R": (3, 3), "T": (3,), "e": (3, 3), "f": (3, 3)}
    links = [f"{name}{side}" for name in ("kpt", "desc", "size", "img_path") for side in (1, 2)]
    try:
        with h5py.File(path, "r") as file:
            n_pairs = json.loads(file["counts"].asstr()[()])["pairs"]
            dim, names, problems = FEATURE_TYPES[file.attrs["feature_type"]].dim, set(), []
            file["images"].visititems(lambda name, item: names.add(name.rpartition("/")[0])
                                      if isinstance(item, h5py.Dataset) else None)
            for name in tqdm(sorted(names), "images verified", disable=None):
                image = file["images"][name]
                n = len(image["kpt"]) if "kpt" in image else 0
                shapes = {"kpt": (n, 3), "desc": (n, dim), "size": (2,)} | ({"depth": (n,)} if "depth" in image else {})
                problems += _shape_problems(name, image, shapes)
            numbers = {group: set(file[group]) if group in file else set() for group in [*groups, *links]}
            wrong = [(group, f"{len(there)} pairs, not 0 to {n_pairs - 1}") for group, there in numbers.items()
                     if there != {str(number) for number in range(n_pairs)}]
            problems += wrong
            for number in range(0 if wrong else n_pairs):
                pair = {name: file[name][str(number)] for name in [*groups, *links]}
                problems += _shape_problems(f"pair {number}", pair, groups)
                for side in (1, 2):
                    image = file["images"].get(np.ravel(pair[f"img_path{side}"].asstr()[()])[0], {})
                    problems += [(f"pair {number}", f"{name}{side} is not that of its image")
                                 for name in ("kpt", "desc", "size") if image.get(name) != pair[f"{name}{side}"]]
    except Exception as error:
        raise InputError(f"{path} is not a finished dump, or damaged ({describe_error(error)}): delete it and run again"
                         ) from None
    return n_pairs, problems


def print_summary(output, report: dict) -> None:
    """What became of a run, for people."""
    if report["pairs"] is None:
        print(f"features of {report['images']} images are in {output}.parts, {report['seconds']:.1f} s; after all "
              "shards, run without --shard")
    else:
        print(f"{output}: {report['images']} images, {report['pairs']} of {report['pairs_tried']} pairs, "
              f"{Path(output).stat().st_size / 1e6:.1f} MB, {report['seconds']:.1f} s")
    print_rates(report)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="dump.dump", description="Features and pairs of raw YFCC or ScanNet data in one HDF5 file.",
        epilog="Any key of the YAML file can be given as --KEY VALUE: "
               f"{', '.join(DEFAULTS)}; extractor settings as --extractor.max_keypoints 500.")
    parser.add_argument("--config", required=True, help="YAML file, such as configs/yfcc_eval_sift.yaml")
    parser.add_argument("--device", default="auto", help="for spp: auto, cpu, cuda or cuda:N")
    parser.add_argument("--shard", metavar="I/N", help="just the features of each N-th image, I = 0 .. N-1; a run "
                                                       "without --shard joins them; torchrun's processes do all that")
    parser.add_argument("--report", metavar="FILE", help="write counts, rates and memory of this process as JSON")
    parser.add_argument("--verify", action="store_true", help="only re-read the output")
    args, others = parser.parse_known_args(argv)
    config = load_config(args.config, others)
    if args.verify:
        return report_verified(*verify_eval(config["output"]), "pairs")
    workers = config["workers"] or available_cores()
    stop_on_sigterm()
    started, shard = time.perf_counter(), parse_shard(args.shard)
    try:
        report = dump_eval(config, workers, args.device, shard)
        wait_for_all("features")
        if under_torchrun() and shard[0] == 0:
            report = dump_eval(config, workers, args.device)
    except OSError as error:
        raise InputError(f"cannot write {config['output']}: {why(error)}; what is done is kept") from None
    output = Path(config["output"])
    report |= {"seconds": time.perf_counter() - started, "peak_memory_mb": peak_memory_mb(workers),
               "megabytes_per_image": output.stat().st_size / report["images"] / 1e6 if report["pairs"] else None}
    print_summary(output, report)
    if args.report:
        write_report(args.report, report)
    status = report_skipped(report["skipped"], "images or depth maps")
    if report["skipped"] and output.exists():
        print(f"to try them again, delete {output}", file=sys.stderr)
    wait_for_all("the end")
    return status


if __name__ == "__main__":
    sys.exit(run(main))
