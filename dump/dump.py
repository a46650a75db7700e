"""Offline step: raw YFCC or ScanNet evaluation data -> one HDF5 file of features and pairs.

    python3 -m dump.dump --config configs/yfcc_eval_sift.yaml [--raw_data_dir DIR] [--output FILE] [--KEY VALUE ...]
                         [--workers 8] [--shard 0/4]

A YAML file of the original is read as it is. docs/formats.md lists what the HDF5 file holds. A pair of which an image,
its camera or its pose cannot be read is left out, and the numbers close up. Depth is for images that have a depth map:
YFCC test/depths/<image stem>.h5, ScanNet depth/<N>.png (16-bit millimetres) or depth/<N>.h5.

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
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import h5py
import numpy as np
from tqdm import tqdm

from dump.command import add_common_options, finish_report, report_verified, writing
from dump.features import check_name, extract_missing, extractor, weights_of
from dump.raw_pairs import View, list_pairs, read_camera
from dump.verify import verify_eval
from dump.workers import available_cores, parse_shard, under_torchrun, wait_for_all
from tools.cli import InputError, OutputError, describe_error, reason, report_skipped, run
from tools.config import overlay, parse_overrides, read_config
from tools.correspondences import depth_at
from tools.features import FEATURE_TYPES, Features
from tools.files import atomic_path, below, check_folder, header_size, read_depth, read_image
from tools.geometry import essential_matrix, relative_pose, resize_keypoints
from tools.locks import locked
from tools.manifest import check_settings, claim
from tools.original import from_dump_config, is_dump_config
from tools.processes import peak_memory_mb, stop_on_sigterm, worker_pool
from tools.records import Field, read_record, write_record

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
        for key in {"scenes", "resize"} & set(values):
            value = values[key]
            values[key] = [] if value is None else [value] if isinstance(value, str | int | float) else value
        config = overlay(config, values, source)
    for key, known in (("dataset", ("yfcc", "scannet")), ("feature_type", tuple(FEATURE_TYPES))):
        if config[key] not in known:
            raise InputError(f"{key} {config[key]!r} is unknown: known are {', '.join(known)}")
    for key in ("raw_data_dir", "output", "pair_list"):
        if not config[key] and (key != "pair_list" or config["dataset"] == "scannet"):
            raise InputError(f"{key} is not set: give it in {path} or as --{key}")
    if not all(isinstance(scene, str) for scene in config["scenes"]):
        raise InputError(f"scenes {config['scenes']}: expected names; put quotes round a name of digits")
    sides = config["resize"]  # YAML writers write 1600.0 or "1600", too
    if len(sides) > 2 or not all(re.fullmatch(r"[1-9]\d{0,8}(\.0)?", str(side)) for side in sides):
        raise InputError(f"resize {sides}: expected nothing, [longer side] or [width, height] in pixels")
    config["resize"] = [int(float(side)) for side in sides]
    config["workers"] = config["workers"] or available_cores()
    config["extractor"] = FEATURE_TYPES[config["feature_type"]].eval_settings
    for nested, source in extractor_values:
        config["extractor"] = overlay(config["extractor"], nested, source)
    return config


def resized(image_size: tuple[int, int], resize: list[int]) -> tuple[int, int]:
    """Size (w, h) that an image of `image_size` is brought to, enlarged if need be (see DEFAULTS)."""
    if len(resize) == 1:
        scale = resize[0] / max(image_size)
        return round(image_size[0] * scale), round(image_size[1] * scale)
    return tuple(resize) or image_size


@dataclass(frozen=True)
class ViewTask:
    """One image to extract features from, into a part."""

    raw_data_dir: str
    view: View
    record_path: Path
    config: dict

    def image_size(self):
        size = header_size(Path(self.raw_data_dir, self.view.image_path))
        return size and resized(size, self.config["resize"])

    def load(self) -> tuple:
        """(image at the size of the config, (w, h) as stored, depth map or None, what is wrong with that or None);
        InputError if the image is unreadable."""
        check_name(self.record_path)
        image = read_image(below(self.raw_data_dir, self.view.image_path),
                           FEATURE_TYPES[self.config["feature_type"]].color)
        h, w = image.shape[:2]
        size = resized((w, h), self.config["resize"])
        if size != (w, h):
            # linear, also when shrinking: what the published results were made with
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        depth_path = next((path for path in self.view.depth_paths if below(self.raw_data_dir, path).exists()), None)
        if depth_path is None:
            return image, (w, h), None, None
        try:
            depth = read_depth(below(self.raw_data_dir, depth_path))
            if not depth.size or abs(depth.shape[1] / depth.shape[0] / (w / h) - 1) > MAX_ASPECT_DIFFERENCE:
                raise InputError(f"depth map {depth_path} is of another shape than its image")
            return image, (w, h), depth, None
        except Exception as error:
            return image, (w, h), None, reason(error)

    def finish(self, loaded: tuple, features: Features) -> bool:
        image, (w, h), depth, depth_problem = loaded
        # in double precision, so that keypoints of an image that was not resized stay what they are
        keypoints = resize_keypoints(features.keypoints.astype(np.float64), w / image.shape[1], h / image.shape[0])
        keypoints = keypoints.astype(np.float32)
        part = {"size": np.array([w, h], np.int32), "kpt": np.c_[keypoints, features.scores].astype(np.float32),
                "desc": features.descriptors.astype(np.float32), "depth_problem": depth_problem}
        if depth is not None:
            # a sensor's depth maps are often smaller than its images, of the same view
            places = resize_keypoints(keypoints.astype(np.float64), depth.shape[1] / w, depth.shape[0] / h)
            part["depth"] = depth_at(depth, places)
        write_record(self.record_path, part)
        return True


def _extract(views, config, parts, recipe, shard) -> tuple[dict, dict, int]:
    """Make the parts that are missing -> {view: its part}, {view that cannot be used: why}, how many were made."""
    tasks, made, unusable = [], {}, {}
    for view in views:
        try:
            view.check_name()
            path = below(parts, f"{view.image_path}.npy")
            tasks.append(ViewTask(config["raw_data_dir"], view, path, config))
        except InputError as error:
            unusable[view] = str(error)
    with worker_pool(config["workers"]) as pool:
        outcomes, n_missing = extract_missing(tasks, recipe, PART_FIELDS, pool, config["workers"], shard)
    for task in tasks:
        outcome = outcomes.get(task.record_path)  # None: of another shard
        if outcome is True:
            made[task.view] = task.record_path
        elif outcome:
            unusable[task.view] = outcome
    return made, unusable, n_missing


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


def _join(output, config, settings, pairs, parts, unusable) -> tuple[dict, list]:
    """Write the HDF5 file from the parts -> (counts, [(image, why it was left out)]), which it holds, too."""
    for stray in output.parent.glob(f".{output.stem}.*.tmp{output.suffix}"):
        stray.unlink()
    # h5py cannot recover from a full disk: it would crash
    needed = sum(part.stat().st_size for part in parts.values()) + BYTES_PER_PAIR * len(pairs)
    if shutil.disk_usage(output.parent).free < needed:
        raise OutputError(errno.ENOSPC, f"No space left on device: {needed / 1e6:.0f} MB are needed", str(output))
    cameras, depth_problems = {}, []
    with atomic_path(output) as temporary, _new_hdf5(temporary) as file:
        for view, path in tqdm(parts.items(), "images written", disable=None):
            part = read_record(path, PART_FIELDS)
            try:
                size = tuple(part["size"].tolist())
                cameras[view] = read_camera(config["dataset"], config["raw_data_dir"], view, size)
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
            (K1, pose1), (K2, pose2) = (cameras[view] for view in pair)
            T_1to2 = relative_pose(pose1, pose2)
            e = essential_matrix(T_1to2)
            f = np.linalg.inv(K2).T @ e @ np.linalg.inv(K1)
            for name, value in (("K1", K1), ("K2", K2), ("R", T_1to2[:3, :3]), ("T", T_1to2[:3, 3]), ("e", e), ("f", f),
                                # of one element, as readers made for the original's files expect
                                ("img_path1", [pair[0].image_path]), ("img_path2", [pair[1].image_path])):
                file[f"{name}/{number}"] = value
            for side, view in zip("12", pair):
                for name, dataset in file["images"][view.image_path].items():
                    file[f"{name}{side}/{number}"] = dataset
        uses = Counter(view for pair in pairs for view in set(pair))
        skipped = [(view.image_path, f"{unusable[view]}; its {uses[view]} pairs are left out")
                   for view in sorted(unusable, key=lambda view: view.image_path)] + depth_problems
        counts = {"images": len(cameras), "pairs_tried": len(pairs), "pairs": len(good),
                  "rejected": {"image_left_out": len(pairs) - len(good)}}
        file.attrs.update({**settings, "settings": json.dumps(settings["settings"])})
        file["counts"], file["skipped"] = json.dumps(counts), json.dumps(skipped)
    return counts, skipped


def dump_eval(config: dict, device: str = "auto", shard=None) -> dict:
    """Make the HDF5 file of a configuration (see load_config), or, for shard (i, n), its part of the features.

    A finished file made with the same settings is kept. Returns {"images", "pairs_tried", "pairs", "rejected" (pairs,
    by reason), "skipped" [(image, why it was left out)], "images_per_second", "pairs_per_second"}; of a shard, pairs
    are None. Raises InputError if nothing can be made of the raw data, InUse if another process is at it.
    """
    output, raw_data_dir, dataset = Path(config["output"]), config["raw_data_dir"], config["dataset"]
    recipe = config["feature_type"], config["extractor"], device
    extractor(*recipe)  # bad settings must stop here, not at each image
    part_settings = {"resize": config["resize"], **config["extractor"], **weights_of(recipe)}
    which_pairs = "scenes" if dataset == "yfcc" else "pair_list"
    settings = {"format": FORMAT, "version": VERSION, "dataset": dataset, "feature_type": config["feature_type"],
                "settings": {which_pairs: config[which_pairs], **part_settings}}
    if output.exists():
        return _read_finished(output, settings)
    if not Path(raw_data_dir).is_dir():
        raise InputError(f"raw_data_dir {raw_data_dir} is not a folder")
    pairs = list_pairs(config)
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
                      "settings": part_settings})
        if not shard:
            for stray in parts.rglob(".*.tmp.npy"):
                stray.unlink()
        started = time.perf_counter()
        made, unusable, n_missing = _extract(views, config, parts, recipe, shard)
        rates = {"images_per_second": n_missing / (time.perf_counter() - started) if n_missing else None,
                 "pairs_per_second": None}
        if shard:
            return {"images": len(made), "pairs_tried": None, "pairs": None, "rejected": None,
                    "skipped": [(view.image_path, problem) for view, problem in unusable.items()], **rates}
        started = time.perf_counter()
        counts, skipped = _join(output, config, settings, pairs, made, unusable)
        rates["pairs_per_second"] = counts["pairs"] / (time.perf_counter() - started)
        if not skipped:
            shutil.rmtree(parts)
    return {**counts, "skipped": skipped, **rates}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="dump.dump", description="Features and pairs of raw YFCC or ScanNet data in one HDF5 file.",
        epilog="Any key of the YAML file can be given as --KEY VALUE: "
               f"{', '.join(DEFAULTS)}; extractor settings as --extractor.max_keypoints 500.")
    parser.add_argument("--config", required=True, help="YAML file, such as configs/yfcc_eval_sift.yaml")
    parser.add_argument("--shard", metavar="I/N", help="just the features of each N-th image, I = 0 .. N-1; a run "
                                                       "without --shard joins them; torchrun's processes do all that")
    add_common_options(parser)
    args, others = parser.parse_known_args(argv)
    config = load_config(args.config, others)
    if args.verify:
        return report_verified(*verify_eval(config["output"]), "pairs")
    output, workers = Path(config["output"]), config["workers"]
    stop_on_sigterm()
    started, shard = time.perf_counter(), parse_shard(args.shard)
    with writing(output):
        report = dump_eval(config, args.device, shard)
        wait_for_all("features")
        if under_torchrun() and shard[0] == 0:
            report = dump_eval(config, args.device)
    seconds, n_bytes = time.perf_counter() - started, output.stat().st_size if report["pairs"] else 0
    report |= {"seconds": seconds, "peak_memory_mb": peak_memory_mb(workers),
               "megabytes_per_image": n_bytes / report["images"] / 1e6 if n_bytes else None}
    if report["pairs"] is None:
        print(f"features of {report['images']} images are in {output}.parts, {seconds:.1f} s; after all shards, run "
              "without --shard")
    else:
        print(f"{output}: {report['images']} images, {report['pairs']} of {report['pairs_tried']} pairs, "
              f"{n_bytes / 1e6:.1f} MB, {seconds:.1f} s")
    finish_report(args.report, report)
    status = report_skipped(report["skipped"], "images or depth maps")
    if report["skipped"] and output.exists():
        print(f"to try them again, delete {output}", file=sys.stderr)
    wait_for_all("the end")
    return status


if __name__ == "__main__":
    sys.exit(run(main))
