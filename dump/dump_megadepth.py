"""Offline step: MegaDepth, or anything in its layout, -> keypoint and match records to train on (SPEC 3, 4, 5).

    python3 -m dump.dump_megadepth --feature_type sift --base_path MEGADEPTH --save_path OUT [--workers 8]

Scene by scene: features of every image that has a candidate pair, then the correspondences of the pairs. It may be
stopped at any moment, and goes on where it was with a result identical to the byte: a record appears whole or not at
all, pairs are tried in a fixed order, so the last match record says where to go on; a scene is complete when
OUT/scenes/<scene>.json is there. `tools/manifest.py` describes the folder and reads it.

Memory: the scene_info of one scene in the parent; per worker one image with its depth while extracting, and
VIEWS_KEPT views (about 50 KB each) while matching.
"""
import argparse
import functools
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy.sparse import csr_matrix
from tqdm import tqdm

from dump.workers import available_cores, each_image, extractor, in_order, stop_on_sigterm, worker_pool
from tools.cli import InputError, report_skipped, run
from tools.correspondences import depth_at, match_by_projection
from tools.features import DESCRIPTOR_DIM
from tools.files import read_depth, read_image, read_lines, write_json
from tools.manifest import (
    FORMAT,
    VERSION,
    begun_scenes,
    claim,
    keypoint_path,
    match_path,
    read_manifest,
    read_scene,
    scene_path,
)
from tools.records import read_record, write_record
from tools.scene_info import list_scenes, load_scene_info

FEATURE_SETTINGS = {  # SPEC 3, "Dump"
    "sift": {"max_keypoints": 4096, "contrast_threshold": 0.04, "unique_locations": False},
    "spp": {"max_keypoints": 4096, "keypoint_threshold": 0.001, "nms_radius": 3},
}
MIN_OVERLAP, MAX_OVERLAP = 0.1, 0.8
MIN_SHARED_POINTS = 20
MIN_WITH_DEPTH = 20  # more than that, in each image
MIN_MATCHES = 20  # more than that
PAIRS_AT_ONCE = 16
VIEWS_KEPT = 256

KEYPOINT_FIELDS = ("image_path", "depth_path", "image_size", "intrinsics", "pose", "keypoints", "scores",
                   "descriptors", "depth")
MATCH_FIELDS = ("image_path0", "image_path1", "intrinsics0", "intrinsics1", "pose0", "pose1", "matches", "overlap")


@dataclass(frozen=True)
class Recipe:
    """Everything that a record depends on besides the data; `manifest` is what the dump keeps of it."""

    feature_type: str
    extractor: dict  # keyword arguments of the extractor
    min_keypoints: int = 1024
    descriptor_dtype: str = "float16"
    device: str = "auto"  # for networks; not part of the manifest

    def manifest(self) -> dict:
        return {"format": FORMAT, "version": VERSION, "feature_type": self.feature_type,
                "settings": {**self.extractor, "min_keypoints": self.min_keypoints,
                             "descriptor_dtype": self.descriptor_dtype}}


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


def load_view(task: ImageTask):
    """(image (H, W) uint8, depth (H, W) float32), or why they cannot be used, as a string."""
    try:
        image = read_image(Path(task.base_path, task.image_path))
        depth = read_depth(Path(task.base_path, task.depth_path))
    except (InputError, cv2.error) as error:
        return str(error)
    if depth.shape != image.shape:
        sizes = [f"{array.shape[1]}x{array.shape[0]}" if array.ndim == 2 else f"{array.shape}"
                 for array in (depth, image)]
        return f"depth map {task.depth_path} is {sizes[0]}, the image {sizes[1]}"
    return image, depth


def dump_view(task: ImageTask, loaded):
    """Extract features and write the keypoint record. Returns True, False if they are too few, or a string: why not."""
    if isinstance(loaded, str):
        return loaded
    image, depth = loaded
    recipe = task.recipe
    features = extractor(recipe.feature_type, recipe.extractor, recipe.device)(image)
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
        "depth": depth_at(depth, features.keypoints),
    })
    return True


@functools.lru_cache(maxsize=VIEWS_KEPT)
def _read_view(path):
    record = read_record(path, mmap=True)
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


def _check_info(info: dict, path) -> None:
    n = len(info["image_paths"])
    if np.shape(info["overlap_matrix"]) != (n, n):
        raise InputError(f"{path}: overlap_matrix is {np.shape(info['overlap_matrix'])}, for {n} images")
    for name in ("depth_paths", "intrinsics", "poses", "points3D_id_to_2D"):
        if name not in info or len(info[name]) != n:
            raise InputError(f"{path}: {name} is missing, or not for {n} images")


def _remove_strays(save_path, scene):
    """Remove what a killed run left half-written in this scene."""
    for folder, pattern in (("keypoints", f"{scene}/.*.tmp.npy"), ("matches", f"{scene}/.*.tmp.npy"),
                            ("scenes", f".{scene}.*.tmp.json")):
        for stray in (Path(save_path) / folder).glob(pattern):
            stray.unlink()


def _matches_done(save_path, scene):
    """How many match records there are from 0 on; records after a gap are removed, to be made again."""
    numbers = {int(path.stem) for path in match_path(save_path, scene, 0).parent.glob("*.npy") if path.stem.isdigit()}
    done = next(i for i in itertools.count() if i not in numbers)
    for number in numbers:
        if number > done:
            match_path(save_path, scene, number).unlink()
    return done


def _position_after(save_path, scene, done, pairs, image_paths):
    """Index in `pairs` (P, 2) from which to go on when `done` match records exist."""
    if not done:
        return 0
    last = match_path(save_path, scene, done - 1)
    record = read_record(last)
    names = [record["image_path0"], record["image_path1"]]
    paths = np.array(image_paths, dtype=object)
    same = np.flatnonzero((paths[pairs] == names).all(axis=1))
    if not len(same):
        raise InputError(f"{last} holds a pair that this scene does not have: the data changed since it was begun; "
                         f"delete {last.parent} and run again")
    return same[0] + 1


def dump_scene(scene: str, info_path, base_path, save_path, recipe: Recipe, pool=None, workers: int = 1) -> dict:
    """Dump one scene, going on with what is there; return its counts, which are also OUT/scenes/<scene>.json.

    info_path: its scene_info file. pool: from worker_pool(workers). Counts: pairs, images, candidate_pairs,
    candidate_images, few_keypoints (images), rejected (pairs, by reason), skipped ([name, reason] of images), bytes.
    Raises InputError if the scene_info, or a record made before, cannot be used.
    """
    _remove_strays(save_path, scene)
    info = load_scene_info(info_path)
    _check_info(info, info_path)
    pairs = candidate_pairs(info)
    image_paths, overlap = info["image_paths"], info["overlap_matrix"]
    images = [int(i) for i in np.unique(pairs)]
    record_paths = {i: keypoint_path(save_path, scene, image_paths[i], recipe.feature_type) for i in images}
    if len(set(record_paths.values())) < len(images):
        raise InputError(f"{info_path}: two images have the same file name, and would share a keypoint record")
    intrinsics = {i: np.asarray(info["intrinsics"][i], np.float64) for i in images}
    poses = {i: np.asarray(info["poses"][i], np.float64) for i in images}

    outcome = {i: True for i in images if record_paths[i].exists()}
    missing = [i for i in images if i not in outcome]
    tasks = [ImageTask(str(base_path), image_paths[i], info["depth_paths"][i], intrinsics[i], poses[i],
                       record_paths[i], recipe) for i in missing]
    del info  # its points are most of the memory
    started = time.perf_counter()
    results = each_image(pool, workers, recipe.feature_type, load_view, dump_view, tasks)
    for result, i in tqdm(zip(results, missing), f"{scene} images", len(images), initial=len(outcome), leave=False,
                          disable=None):
        outcome[i] = result
    print(f"{scene}: {len(missing)} images in {time.perf_counter() - started:.1f} s", end="", flush=True)

    left_out = [i for i in images if outcome[i] is not True]
    usable = pairs[~np.isin(pairs, left_out).any(axis=1)]
    done = _matches_done(save_path, scene)
    position = _position_after(save_path, scene, done, usable, image_paths)
    chunks = [usable[k:k + PAIRS_AT_ONCE] for k in range(position, len(usable), PAIRS_AT_ONCE)]
    path_pairs = ([(record_paths[i], record_paths[j]) for i, j in chunk] for chunk in chunks)
    _read_view.cache_clear()
    started = time.perf_counter()
    with tqdm(desc=f"{scene} pairs", total=len(usable), initial=position, leave=False, disable=None) as progress:
        for found, chunk in zip(in_order(pool, match_pairs, path_pairs, ahead=4 * workers), chunks):
            for matches, (i, j) in zip(found, chunk):
                if isinstance(matches, str):
                    continue
                write_record(match_path(save_path, scene, done), {
                    "image_path0": image_paths[i], "image_path1": image_paths[j],
                    "intrinsics0": intrinsics[i], "intrinsics1": intrinsics[j], "pose0": poses[i], "pose1": poses[j],
                    "matches": matches, "overlap": np.float64(overlap[i, j]),
                })
                done += 1
            progress.update(len(chunk))
    print(f", {len(usable) - position} pairs in {time.perf_counter() - started:.1f} s, {done} valid")

    # from here on all follows from the data and the files, so that an interrupted run ends with the same
    kept = [i for i in images if outcome[i] is True]
    without_depth = [i for i in kept if _read_view(record_paths[i])[1] <= MIN_WITH_DEPTH]
    few_with_depth = int(np.isin(usable, without_depth).any(axis=1).sum())
    files = [record_paths[i] for i in kept] + [match_path(save_path, scene, k) for k in range(done)]
    counts = {
        "pairs": done,
        "images": len(kept),
        "candidate_pairs": len(pairs),
        "candidate_images": len(images),
        "few_keypoints": sum(outcome[i] is False for i in images),
        "rejected": {"image_left_out": len(pairs) - len(usable), "few_keypoints_with_depth": few_with_depth,
                     "few_matches": len(usable) - few_with_depth - done},
        "skipped": [[image_paths[i], outcome[i]] for i in left_out if outcome[i] is not False],
        "bytes": sum(path.stat().st_size for path in files),
    }
    write_json(scene_path(save_path, scene), counts)
    return counts


def dump_megadepth(base_path, save_path, recipe: Recipe, scenes=None, workers: int = 1) -> dict:
    """Dump the scenes (ids; all if None) of `base_path` into `save_path`; complete ones are only read.

    Returns {"scenes": {scene: counts as from dump_scene}, "skipped": [(scene or image, reason)]}. Raises InputError
    for bad input of the whole run.
    """
    if not Path(base_path).is_dir():
        raise InputError(f"--base_path {base_path} is not a folder")
    files = list_scenes(base_path, scenes)
    extractor(recipe.feature_type, recipe.extractor, recipe.device)  # bad settings must stop here, not in each scene
    claim(save_path, recipe.manifest())
    summary = {"scenes": {}, "skipped": []}
    with worker_pool(workers) as pool:
        for scene, info_path in files.items():
            try:
                if scene_path(save_path, scene).is_file():
                    counts = read_scene(save_path, scene)
                else:
                    counts = dump_scene(scene, info_path, base_path, save_path, recipe, pool, workers)
            except InputError as error:
                summary["skipped"].append((f"scene {scene}", str(error)))
                continue
            summary["scenes"][scene] = counts
            summary["skipped"] += [(f"{scene} {name}", reason) for name, reason in counts["skipped"]]
    return summary


def _verify_keypoints(path, manifest: dict) -> tuple[int, list]:
    """Number of keypoints of a record, and what is wrong with it."""
    record = read_record(path)
    if tuple(record) != KEYPOINT_FIELDS:
        return 0, [f"its fields are {', '.join(record)}"]
    n = len(record["keypoints"])
    shapes = {"keypoints": (n, 2), "scores": (n,), "depth": (n,), "intrinsics": (3, 3), "pose": (4, 4),
              "descriptors": (n, DESCRIPTOR_DIM[manifest["feature_type"]])}
    problems = [f"{name} is {record[name].shape}, not {shape}" for name, shape in shapes.items()
                if record[name].shape != shape]
    problems += [f"{name} has values that are not finite" for name in shapes if not np.isfinite(record[name]).all()]
    if n < manifest["settings"]["min_keypoints"]:
        problems.append(f"{n} keypoints are fewer than min_keypoints")
    if record["descriptors"].dtype != manifest["settings"]["descriptor_dtype"]:
        problems.append(f"descriptors are {record['descriptors'].dtype}")
    return n, problems


def _verify_matches(path, n_keypoints: dict, feature_type: str) -> list:
    """What is wrong with a match record; n_keypoints: by name of the keypoint record."""
    record = read_record(path)
    if tuple(record) != MATCH_FIELDS:
        return [f"its fields are {', '.join(record)}"]
    matches, problems = record["matches"], []
    if matches.ndim != 2 or matches.shape[1] != 2 or len(matches) <= MIN_MATCHES:
        return [f"matches are {matches.shape}"]
    for side in (0, 1):
        name = keypoint_path("", "", record[f"image_path{side}"], feature_type).name
        indices = matches[:, side]
        if name not in n_keypoints:
            problems.append(f"its keypoint record {name} is missing or damaged")
        elif indices.min() < 0 or indices.max() >= n_keypoints[name]:
            problems.append(f"match indices out of the range of {name}")
        if len(np.unique(indices)) < len(indices):
            problems.append(f"a keypoint of view {side} is matched twice")
    return problems


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
            n_keypoints[file.name], found = _verify_keypoints(file, manifest)
        except InputError as error:
            found = [error]
        problems += [(file, what) for what in found]
    for file in match_files:
        try:
            found = _verify_matches(file, n_keypoints, manifest["feature_type"])
        except InputError as error:
            found = [error]
        problems += [(file, what) for what in found]
    return len(keypoint_files) + n_pairs, problems


def verify_dump(path, scenes=None) -> tuple[int, list]:
    """Re-read a dump -> (number of records, [(file or scene, what is wrong)]).

    scenes: ids that must be complete; all begun ones if None. Raises InputError for a folder that is no dump.
    """
    manifest = read_manifest(path)
    n_records, problems = 0, []
    for scene in tqdm(begun_scenes(path) if scenes is None else scenes, "scenes verified", disable=None):
        if scene_path(path, scene).is_file():
            n, found = _verify_scene(path, scene, manifest)
            n_records += n
            problems += found
        else:
            problems.append((f"scene {scene}", "not complete: run the dump again"))
    return n_records, problems


def print_summary(summary: dict, seconds: float) -> None:
    """Counts of a dump_megadepth summary; the same per scene are in OUT/scenes."""
    counts = summary["scenes"]
    totals = {name: sum(scene[name] for scene in counts.values())
              for name in ("images", "pairs", "candidate_images", "candidate_pairs", "few_keypoints", "bytes")}
    print(f"{len(counts)} scenes, {totals['images']} of {totals['candidate_images']} images, {totals['pairs']} of "
          f"{totals['candidate_pairs']} pairs, {totals['bytes'] / 1e6:.1f} MB, {seconds:.1f} s")
    if totals["few_keypoints"]:
        print(f"{totals['few_keypoints']} images have fewer keypoints than --min_keypoints")
    for reason in ("image_left_out", "few_keypoints_with_depth", "few_matches"):
        print(f"pairs rejected, {reason.replace('_', ' ')}: "
              f"{sum(scene['rejected'][reason] for scene in counts.values())}")
    empty = [scene for scene, of_scene in counts.items() if not of_scene["pairs"]]
    if empty:
        print(f"{len(empty)} scenes have no valid pair: {', '.join(empty)}")


def recipe_of(feature_type: str, min_keypoints: int = 1024, descriptor_dtype: str = "float16", device: str = "auto",
              **settings) -> Recipe:
    """The recipe of SPEC 3 with some `settings` of the extractor changed; InputError for one it does not have."""
    defaults = FEATURE_SETTINGS[feature_type]
    foreign = sorted(set(settings) - set(defaults))
    if foreign:
        raise InputError(f"--{foreign[0]} is no setting of {feature_type}: it has {', '.join(defaults)}")
    return Recipe(feature_type, {**defaults, **settings}, min_keypoints, descriptor_dtype, device)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="dump.dump_megadepth", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Features and correspondences of scenes in MegaDepth's layout. Run it again to go on.")
    parser.add_argument("--feature_type", choices=sorted(FEATURE_SETTINGS))
    parser.add_argument("--base_path", help="folder that holds scene_info/")
    parser.add_argument("--save_path", required=True, help="folder of the dump; one feature type each")
    parser.add_argument("--scene_list", help="file of scene ids, one a line; default: all")
    parser.add_argument("--min_keypoints", type=int, default=1024, help="images with fewer are left out")
    parser.add_argument("--max_keypoints", type=int, default=argparse.SUPPRESS, help="strongest kept (4096)")
    parser.add_argument("--contrast_threshold", type=float, default=argparse.SUPPRESS, help="of sift (0.04)")
    parser.add_argument("--unique_locations", action="store_true", default=argparse.SUPPRESS,
                        help="sift: one keypoint per place")
    parser.add_argument("--descriptor_dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
    parser.add_argument("--device", default="auto", help="for spp: auto, cpu, cuda or cuda:N")
    parser.add_argument("--verify", action="store_true", help="only re-read the dump in --save_path")
    args = parser.parse_args(argv)
    scenes = read_lines(args.scene_list) if args.scene_list else None
    if args.verify:
        n_records, problems = verify_dump(args.save_path, scenes)
        print(f"{n_records} records read, {len(problems)} problems")
        for name, problem in problems:
            print(f"  {name}: {problem}", file=sys.stderr)
        return 1 if problems else 0
    if not args.feature_type or not args.base_path:
        parser.error("--feature_type and --base_path are needed")

    stop_on_sigterm()
    extractor_settings = {name: value for name, value in vars(args).items()
                          if name in ("max_keypoints", "contrast_threshold", "unique_locations")}
    recipe = recipe_of(args.feature_type, args.min_keypoints, args.descriptor_dtype, args.device,
                       **extractor_settings)
    started = time.perf_counter()
    try:
        summary = dump_megadepth(args.base_path, args.save_path, recipe, scenes, args.workers)
    except OSError as error:
        raise InputError(f"cannot write to {args.save_path}: {error.strerror or error}; what is done is kept") from None
    print_summary(summary, time.perf_counter() - started)
    status = report_skipped(summary["skipped"], "images or scenes")
    return status if summary["scenes"] else 2


if __name__ == "__main__":
    sys.exit(run(main))
