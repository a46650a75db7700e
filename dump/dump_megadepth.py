"""Offline step: MegaDepth, or anything in its layout, -> keypoint and match records to train on.

    python3 -m dump.dump_megadepth --feature_type sift --base_path MEGADEPTH --save_path OUT [--workers 8] [--shard 0/4]

Scene by scene: features of every image that has a candidate pair, then the correspondences of the pairs. It may be
stopped at any moment, and resumes where it was with a result identical to the byte: a record appears whole or not at
all, pairs are tried in a fixed order, so the last match record says where to resume; a scene is complete when
OUT/scenes/<scene>.json is there. `tools/manifest.py` describes the folder and reads it.

Shards, one a machine, get whole scenes, every N-th, so that no two write the same file; all N, at once or one after
the other, end with the bytes of one run without them. Whoever writes a scene holds its lock: another run into the same
OUT that comes to it is refused. The bytes of spp are those of one model of processor, or GPU: others round otherwise.

Memory does not grow with the number of images and pairs of a scene, but for: its scene_info while the pairs are chosen
(0.4 KB for each observation of a 3D point, and three matrices), then 100 bytes a pair and 10 KB an image. What does not
grow: per worker one image with its depth and 0.5 KB (sift) or 1 KB (spp) a pixel while extracting, 1 or 2 GB for
1600x1200, and VIEWS_KEPT views (about 50 KB each) while matching. With a GPU, images (2 * workers and a batch) and the
network are in the parent alone.
"""
import argparse
import contextlib
import functools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dump.report import peak_memory_mb, print_rates, report_verified, why, write_report
from dump.shards import deal, parse_shard, wait_for_all
from dump.workers import (
    available_cores,
    batches_of,
    check_name,
    each_image,
    extractor,
    in_order,
    is_whole,
    stop_on_sigterm,
    weights_of,
    worker_pool,
)
from tools.cli import InputError, reason, report_skipped, run
from tools.correspondences import INLIER_TH, depth_at, match_by_projection
from tools.features import FEATURE_TYPES, Features
from tools.files import below, check_folder, header_size, read_depth, read_image, read_lines, write_json
from tools.locks import InUse, locked
from tools.manifest import (
    FORMAT,
    VERSION,
    begun_scenes,
    claim,
    keypoint_path,
    lock_path,
    match_path,
    read_manifest,
    read_scene,
    scene_path,
)
from tools.records import KEYPOINT_FIELDS, MATCH_FIELDS, check_matches, read_record, write_record
from tools.scene_info import candidate_pairs, list_scenes, load_scene_info

MIN_WITH_DEPTH = 20  # more than that, in each image
MIN_MATCHES = 20  # more than that
PAIRS_AT_ONCE = 16
VIEWS_KEPT = 256


@dataclass(frozen=True)
class Recipe:
    """Everything that a record depends on besides the data; `manifest` is what the dump keeps of it."""

    feature_type: str
    extractor: dict  # keyword arguments of the extractor
    min_keypoints: int = 1024
    descriptor_dtype: str = "float16"
    device: str = "auto"  # for networks; not part of the manifest

    @property
    def of_extractor(self) -> tuple:
        """Arguments of `dump.workers.extractor`."""
        return self.feature_type, self.extractor, self.device

    def manifest(self) -> dict:
        return {"format": FORMAT, "version": VERSION, "feature_type": self.feature_type,
                "settings": {**self.extractor, **weights_of(*self.of_extractor), "min_keypoints": self.min_keypoints,
                             "descriptor_dtype": self.descriptor_dtype, "inlier_th": INLIER_TH}}


@dataclass(frozen=True)
class ImageTask:
    """One image to extract features from."""

    base_path: str
    image_path: str  # relative to base_path, as is depth_path
    depth_path: str
    intrinsics: np.ndarray
    pose: np.ndarray
    record_path: Path
    recipe: Recipe


@dataclass
class Work:
    """What a run did, apart from what it found done: for its rates."""

    images: int = 0
    image_seconds: float = 0.0
    pairs: int = 0
    pair_seconds: float = 0.0


def load_view(task: ImageTask):
    """(image (H, W) uint8, depth (H, W) float32); InputError if they cannot be used."""
    image = read_image(below(task.base_path, task.image_path), FEATURE_TYPES[task.recipe.feature_type].color)
    depth = read_depth(below(task.base_path, task.depth_path))
    if depth.shape != image.shape[:2]:
        raise InputError(f"depth map {task.depth_path} is {depth.shape[1]}x{depth.shape[0]}, "
                         f"the image {image.shape[1]}x{image.shape[0]}")
    return image, depth


def finish_view(task: ImageTask, loaded: tuple, features: Features) -> bool:
    """Write the keypoint record of (image, depth); False if there are too few keypoints."""
    recipe = task.recipe
    if len(features.keypoints) < recipe.min_keypoints:
        return False
    write_record(task.record_path, {
        "image_path": task.image_path,
        "depth_path": task.depth_path,
        "image_size": np.array(features.image_size, np.int32),
        "intrinsics": task.intrinsics,
        "pose": task.pose,
        "keypoints": features.keypoints.astype(np.float32),
        "scores": features.scores.astype(np.float32),
        "descriptors": features.descriptors.astype(recipe.descriptor_dtype),
        "depth": depth_at(loaded[1], features.keypoints),
    })
    return True


@functools.lru_cache(maxsize=VIEWS_KEPT)
def _read_view(path):
    record = read_record(path, KEYPOINT_FIELDS, mmap=True)
    view = [np.array(record[name]) for name in ("keypoints", "depth", "intrinsics", "pose")]
    return view, np.count_nonzero(view[1] > 0)


def match_pairs(pairs: list):
    """Pairs of keypoint record paths -> for each the matches (M, 2), or why there are too few, as a string."""
    outcomes = []
    for path0, path1 in pairs:
        (view0, known0), (view1, known1) = _read_view(path0), _read_view(path1)
        if min(known0, known1) <= MIN_WITH_DEPTH:
            outcomes.append("few_keypoints_with_depth")
            continue
        matches = match_by_projection(*view0, *view1)
        outcomes.append(matches if len(matches) > MIN_MATCHES else "few_matches")
    return outcomes


def _remove_strays(save_path, scene):
    """Remove what a killed run left half-written in this scene."""
    for folder, pattern in (("keypoints", f"{scene}/.*.tmp.npy"), ("matches", f"{scene}/.*.tmp.npy"),
                            ("scenes", f".{scene}.*.tmp.json")):
        for stray in (Path(save_path) / folder).glob(pattern):
            stray.unlink()


def _match_numbers(save_path, scene):
    """Numbers of the match records that are there, sorted."""
    with contextlib.suppress(FileNotFoundError), os.scandir(match_path(save_path, scene, 0).parent) as entries:
        stems = (entry.name.removesuffix(".npy") for entry in entries)
        return np.sort(np.fromiter((int(stem) for stem in stems if stem.isdecimal()), np.int64))
    return np.zeros(0, np.int64)


def _is_complete(save_path, scene) -> bool:
    """Whether a scene was finished and none of its records has been deleted since."""
    if not scene_path(save_path, scene).is_file():
        return False
    counts = read_scene(save_path, scene)
    n_images = sum(1 for _ in (Path(save_path) / "keypoints" / scene).glob("[!.]*.npy"))
    return n_images >= counts["images"] and len(_match_numbers(save_path, scene)) >= counts["pairs"]


def _matches_done(save_path, scene):
    """How many whole match records there are from 0 on; those after a gap are removed, to be made again."""
    numbers = _match_numbers(save_path, scene)
    done = 0
    while done < len(numbers) and numbers[done] == done and is_whole(match_path(save_path, scene, done), MATCH_FIELDS):
        done += 1
    for number in numbers[done:]:
        match_path(save_path, scene, number).unlink(missing_ok=True)
    return done


def _position_after(save_path, scene, done, pairs, image_paths):
    """Index in `pairs` (P, 2) from which to resume when `done` match records exist."""
    if not done:
        return 0
    last = match_path(save_path, scene, done - 1)
    record = read_record(last, MATCH_FIELDS)
    names = [record["image_path0"], record["image_path1"]]
    paths = np.array(image_paths, dtype=object)
    same = np.flatnonzero((paths[pairs] == names).all(axis=1))
    if not len(same):
        raise InputError(f"{last} holds a pair that this scene does not have: the data changed since it was begun; "
                         f"delete {last.parent} and run again")
    return same[0] + 1


def _image_task(info, i, scene, base_path, save_path, recipe) -> ImageTask:
    """The task of image i of a checked scene_info; InputError if its name is too long for a record's."""
    image_path, depth_path, K, pose = (info[name][i] for name in ("image_paths", "depth_paths", "intrinsics", "poses"))
    record_path = check_name(keypoint_path(save_path, scene, image_path, recipe.feature_type))
    return ImageTask(str(base_path), image_path, depth_path, K, pose, record_path, recipe)


def dump_scene(scene: str, info_path, base_path, save_path, recipe: Recipe, pool=None, workers: int = 1,
               work: Work | None = None) -> dict:
    """Dump one scene, resuming from what is there; return its counts, which are also OUT/scenes/<scene>.json.

    info_path: its scene_info file. pool: from worker_pool(workers). work: is added to. Counts: pairs, images,
    candidate_pairs, candidate_images, few_keypoints (images), rejected (pairs, by reason), skipped ([name, reason] of
    images), bytes, keypoint_bytes. Raises InputError if the scene_info, or a record made before, cannot be used.
    """
    work = work or Work()
    info = load_scene_info(info_path)
    pairs = candidate_pairs(info)
    image_paths, overlap = info["image_paths"], np.float64(info["overlap_matrix"][tuple(pairs.T)])
    images = [int(i) for i in np.unique(pairs)]
    task_of, outcome = {}, {}  # the latter of each image: True for a record, False for too few keypoints, or a reason
    for i in images:
        try:
            task_of[i] = _image_task(info, i, scene, base_path, save_path, recipe)
        except Exception as error:
            outcome[i] = reason(error)
    record_paths = {i: task.record_path for i, task in task_of.items()}
    index_of = {path: i for i, path in record_paths.items()}
    if len(index_of) < len(record_paths):
        raise InputError(f"{info_path}: two images have the same file name, and would share a keypoint record")
    skipped = info.get("left_out", [])
    del info  # its points are most of the memory

    tasks = list(task_of.values())
    dim = FEATURE_TYPES[recipe.feature_type].dim
    done_before = {i for i, path in record_paths.items() if is_whole(path, KEYPOINT_FIELDS, D=dim)}
    outcome |= dict.fromkeys(done_before, True)
    n_missing = len(tasks) - len(done_before)
    started = time.perf_counter()
    batches = batches_of(tasks, recipe.of_extractor, lambda task: header_size(Path(task.base_path, task.image_path)))
    results = each_image(pool, workers, recipe.of_extractor, batches,
                         lambda task: index_of[task.record_path] in done_before, load_view, finish_view)
    for task, result in tqdm(results, f"{scene} images", len(tasks), initial=len(done_before), leave=False,
                             disable=None):
        outcome[index_of[task.record_path]] = result
    work.images += n_missing
    work.image_seconds += (seconds := time.perf_counter() - started)
    print(f"{scene}: {n_missing} images in {seconds:.1f} s", end="", flush=True)

    left_out = [i for i in images if outcome[i] is not True]
    good = ~np.isin(pairs, left_out).any(axis=1)
    usable, overlap = pairs[good], overlap[good]
    done = _matches_done(save_path, scene)
    position = _position_after(save_path, scene, done, usable, image_paths)
    starts = range(position, len(usable), PAIRS_AT_ONCE)
    path_pairs = ([(record_paths[i], record_paths[j]) for i, j in usable[k:k + PAIRS_AT_ONCE].tolist()] for k in starts)
    _read_view.cache_clear()
    started = time.perf_counter()
    with tqdm(desc=f"{scene} pairs", total=len(usable), initial=position, leave=False, disable=None) as progress:
        for found, k in zip(in_order(pool, match_pairs, path_pairs, ahead=4 * workers), starts):
            for at, matches in enumerate(found, start=k):
                if isinstance(matches, str):
                    continue
                view0, view1 = task_of[usable[at, 0]], task_of[usable[at, 1]]
                write_record(match_path(save_path, scene, done), {
                    "image_path0": view0.image_path, "image_path1": view1.image_path,
                    "intrinsics0": view0.intrinsics, "intrinsics1": view1.intrinsics,
                    "pose0": view0.pose, "pose1": view1.pose,
                    "matches": matches, "overlap": overlap[at],
                })
                done += 1
            progress.update(len(found))
    work.pairs += len(usable) - position
    work.pair_seconds += (seconds := time.perf_counter() - started)
    print(f", {len(usable) - position} pairs in {seconds:.1f} s, {done} valid")

    # from here on all follows from the data and the files, so that an interrupted run ends with the same
    kept = [i for i in images if outcome[i] is True]
    without_depth = [i for i in kept if _read_view(record_paths[i])[1] <= MIN_WITH_DEPTH]
    few_with_depth = int(np.isin(usable, without_depth).any(axis=1).sum())
    keypoint_bytes = sum(record_paths[i].stat().st_size for i in kept)
    counts = {
        "pairs": done,
        "images": len(kept),
        "candidate_pairs": len(pairs),
        "candidate_images": len(images),
        "few_keypoints": sum(result is False for result in outcome.values()),
        "rejected": {"image_left_out": len(pairs) - len(usable), "few_keypoints_with_depth": few_with_depth,
                     "few_matches": len(usable) - few_with_depth - done},
        "skipped": skipped + [[str(image_paths[i]), outcome[i]] for i in left_out if outcome[i] is not False],
        "bytes": keypoint_bytes + sum(match_path(save_path, scene, k).stat().st_size for k in range(done)),
        "keypoint_bytes": keypoint_bytes,
    }
    _remove_strays(save_path, scene)  # now, when a worker that outlived its killed parent by a moment has ended too
    write_json(scene_path(save_path, scene), counts)
    return counts


def dump_megadepth(base_path, save_path, recipe: Recipe, scenes=None, workers: int = 1, shard=None) -> dict:
    """Dump the scenes (ids; all if None) of `base_path` into `save_path`; complete ones are only read.

    shard: (i, n) for every n-th of the scenes from the i-th on. Returns {"scenes": {scene: counts as from dump_scene},
    "skipped": [(scene or image, reason)], "work": Work}. Raises InputError for bad input of the whole run, InUse if
    another process writes one of the scenes.
    """
    if not Path(base_path).is_dir():
        raise InputError(f"--base_path {base_path} is not a folder")
    check_folder(save_path)
    files = list_scenes(base_path, scenes)
    extractor(*recipe.of_extractor)  # bad settings must stop here, not in each scene
    claim(save_path, recipe.manifest())
    summary = {"scenes": {}, "skipped": [], "work": Work()}
    with worker_pool(workers) as pool:
        for scene, info_path in deal(files.items(), shard):
            try:
                with locked(lock_path(save_path, scene), busy=f"another process writes scene {scene} of {save_path}: "
                                                              "wait for it, or give each its own --shard"):
                    if _is_complete(save_path, scene):
                        counts = read_scene(save_path, scene)
                    else:
                        counts = dump_scene(scene, info_path, base_path, save_path, recipe, pool, workers,
                                            summary["work"])
            except InUse:
                raise
            except Exception as error:
                summary["skipped"].append((f"scene {scene}", reason(error)))
                continue
            summary["scenes"][scene] = counts
            summary["skipped"] += [(f"{scene} {name}", reason) for name, reason in counts["skipped"]]
    return summary


def _verify_keypoints(path, manifest: dict) -> int:
    """Number of keypoints of a record; InputError says what is wrong with it."""
    record = read_record(path, KEYPOINT_FIELDS, D=FEATURE_TYPES[manifest["feature_type"]].dim)
    n, settings, dtype = len(record["keypoints"]), manifest["settings"], record["descriptors"].dtype
    if not np.isfinite(record["descriptors"]).all():
        raise InputError(f"{path} is damaged: its descriptors has values that are not finite")
    if n < settings["min_keypoints"]:
        raise InputError(f"{n} keypoints are fewer than min_keypoints")
    if dtype != settings["descriptor_dtype"]:
        raise InputError(f"descriptors are {dtype}")
    return n


def _verify_matches(path, n_keypoints: dict, feature_type: str) -> None:
    """InputError says what is wrong with a match record; n_keypoints: by name of the keypoint record."""
    record = read_record(path, MATCH_FIELDS)
    if len(record["matches"]) <= MIN_MATCHES:
        raise InputError(f"it has {len(record['matches'])} matches, more than {MIN_MATCHES} are needed")
    names = [keypoint_path("", "", record[f"image_path{v}"], feature_type).name for v in "01"]
    for name in names:
        if name not in n_keypoints:
            raise InputError(f"its keypoint record {name} is missing or damaged")
    check_matches(path, record["matches"], [n_keypoints[name] for name in names])


def _verify_scene(path, scene, manifest) -> tuple[int, list]:
    n_pairs, n_images = (read_scene(path, scene)[name] for name in ("pairs", "images"))
    keypoint_files = sorted((Path(path) / "keypoints" / scene).glob("*"))
    match_files = [match_path(path, scene, i) for i in range(n_pairs)]
    extra = set((Path(path) / "matches" / scene).glob("*")) - set(match_files)
    problems = [(file, "does not belong to the dump") for file in sorted(extra)]
    if len(keypoint_files) != n_images:
        problems.append((f"scene {scene}", f"{len(keypoint_files)} keypoint records, {n_images} expected"))
    n_keypoints = {}
    for file in keypoint_files:
        try:
            n_keypoints[file.name] = _verify_keypoints(file, manifest)
        except Exception as error:
            problems.append((file, reason(error)))
    for file in match_files:
        try:
            _verify_matches(file, n_keypoints, manifest["feature_type"])
        except Exception as error:
            problems.append((file, reason(error)))
    return len(keypoint_files) + n_pairs, problems


def verify_dump(path, scenes=None) -> tuple[int, list]:
    """Re-read a dump -> (number of records, [(file or scene, what is wrong)]).

    scenes: ids that must be complete; all begun ones if None. Raises InputError for a folder that is not a dump.
    """
    manifest = read_manifest(path)
    n_records, problems = 0, []
    for scene in tqdm(begun_scenes(path) if scenes is None else scenes, "scenes verified", disable=None):
        if not scene_path(path, scene).is_file():
            problems.append((f"scene {scene}", "not complete: run the dump again"))
            continue
        try:
            n, found = _verify_scene(path, scene, manifest)
            n_records += n
            problems += found
        except Exception as error:
            problems.append((f"scene {scene}", reason(error)))
    return n_records, problems


def report_of(summary: dict, seconds: float, workers: int) -> dict:
    """What became of the images and pairs of a dump_megadepth summary; rates are of this run, None if it did nothing.

    images, pairs: kept; pairs_tried: those with enough overlap; megabytes_per_image: of keypoint records;
    peak_memory_mb: see dump.workers.peak_memory_mb.
    """
    def total(name):
        return sum(scene[name] for scene in summary["scenes"].values())

    work, rejected = summary["work"], {}
    for scene in summary["scenes"].values():
        for why_not, n in scene["rejected"].items():
            rejected[why_not] = rejected.get(why_not, 0) + n
    return {
        "images": total("images"), "pairs_tried": total("candidate_pairs"), "pairs": total("pairs"),
        "rejected": rejected, "skipped": summary["skipped"], "seconds": seconds,
        "images_per_second": work.images / work.image_seconds if work.images else None,
        "pairs_per_second": work.pairs / work.pair_seconds if work.pairs else None,
        "megabytes_per_image": total("keypoint_bytes") / total("images") / 1e6 if total("images") else None,
        "peak_memory_mb": peak_memory_mb(workers),
    }


def print_summary(summary: dict, report: dict) -> None:
    """What report_of says, for people; the counts of each scene are in OUT/scenes."""
    counts = summary["scenes"].values()
    n_bytes, tried, few = (sum(scene[name] for scene in counts) for name in ("bytes", "candidate_images",
                                                                             "few_keypoints"))
    print(f"{len(counts)} scenes, {report['images']} of {tried} images, {report['pairs']} of {report['pairs_tried']} "
          f"pairs, {n_bytes / 1e6:.1f} MB, {report['seconds']:.1f} s")
    print_rates(report)
    if few:
        print(f"{few} images have fewer keypoints than --min_keypoints")
    for why_not, n in report["rejected"].items():
        print(f"pairs rejected, {why_not.replace('_', ' ')}: {n}")
    empty = [scene for scene, of_scene in summary["scenes"].items() if not of_scene["pairs"]]
    if empty:
        print(f"{len(empty)} scenes have no valid pair: {', '.join(empty)}")


def recipe_of(feature_type: str, min_keypoints: int = 1024, descriptor_dtype: str = "float16", device: str = "auto",
              **settings) -> Recipe:
    """The published recipe with some `settings` of the extractor changed; InputError for one it does not have."""
    defaults = FEATURE_TYPES[feature_type].dump_settings
    foreign = sorted(set(settings) - set(defaults))
    if foreign:
        raise InputError(f"--{foreign[0]} is not a setting of {feature_type}: it has {', '.join(defaults)}")
    return Recipe(feature_type, {**defaults, **settings}, min_keypoints, descriptor_dtype, device)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="dump.dump_megadepth", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Features and correspondences of scenes in MegaDepth's layout. Run it again to resume.")
    parser.add_argument("--feature_type", choices=list(FEATURE_TYPES))
    parser.add_argument("--base_path", help="folder that holds scene_info/")
    parser.add_argument("--save_path", required=True, help="folder of the dump; one feature type each")
    parser.add_argument("--scene_list", help="file of scene ids, one a line; default: all")
    parser.add_argument("--min_keypoints", type=int, default=1024, help="images with fewer are left out")
    parser.add_argument("--max_keypoints", type=int, default=argparse.SUPPRESS, help="strongest kept (4096)")
    parser.add_argument("--contrast_threshold", type=float, default=argparse.SUPPRESS, help="of sift (0.04)")
    parser.add_argument("--unique_locations", action="store_true", default=argparse.SUPPRESS,
                        help="sift: one keypoint per place")
    parser.add_argument("--no_align_corners", dest="align_corners", action="store_false",
                        default=argparse.SUPPRESS, help="spp: sample descriptors as published, under torch 1.10-1.13")
    parser.add_argument("--descriptor_dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
    parser.add_argument("--device", default="auto", help="for spp: auto, cpu, cuda or cuda:N")
    parser.add_argument("--shard", metavar="I/N", help="just the scenes I, I+N, I+2N, ..., I = 0 .. N-1, one shard a "
                                                       "machine; under torchrun each process takes its own")
    parser.add_argument("--report", metavar="FILE", help="write counts, rates and memory of this process as JSON")
    parser.add_argument("--verify", action="store_true", help="only re-read the dump in --save_path")
    args = parser.parse_args(argv)
    scenes = read_lines(args.scene_list) if args.scene_list else None
    if args.verify:
        status = report_verified(*verify_dump(args.save_path, scenes), "records")
        if status:
            print("delete the files named here and run the dump again: it makes them again", file=sys.stderr)
        return status
    if not args.feature_type or not args.base_path:
        parser.error("--feature_type and --base_path are needed")

    stop_on_sigterm()
    extractor_settings = {name: value for name, value in vars(args).items()
                          if name in ("max_keypoints", "contrast_threshold", "unique_locations", "align_corners")}
    recipe = recipe_of(args.feature_type, args.min_keypoints, args.descriptor_dtype, args.device,
                       **extractor_settings)
    started, shard = time.perf_counter(), parse_shard(args.shard)
    try:
        summary = dump_megadepth(args.base_path, args.save_path, recipe, scenes, args.workers, shard)
    except OSError as error:
        raise InputError(f"cannot write to {args.save_path}: {why(error)}; what is done is kept") from None
    report = report_of(summary, time.perf_counter() - started, args.workers)
    if shard:
        print(f"shard {shard[0]}/{shard[1]}:")
    print_summary(summary, report)
    if args.report:
        write_report(args.report, report)
    status = report_skipped(summary["skipped"], "images or scenes")
    wait_for_all("the end")
    return status if summary["scenes"] or not summary["skipped"] else 2


if __name__ == "__main__":
    sys.exit(run(main))
